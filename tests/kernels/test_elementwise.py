"""Norm, rotary embedding and activation against float64, in odd shapes; a row's bits are its own."""

import pytest
import torch

from quire.kernels.activation import silu_mul
from quire.kernels.kv_write import kv_write
from quire.kernels.rms_norm import add_rms_norm, rms_norm
from quire.kernels.rope import rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8), (7, 100), (12, 33), (300, 64)]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    eps = torch.finfo(dtype).eps
    return {"atol": 4 * eps, "rtol": 4 * eps}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-6).double(), expected, **tolerance(dtype))


def test_add_rms_norm_returns_the_sum() -> None:
    delta, residual, weight = torch.randn(5, 12), torch.randn(5, 12), torch.randn(12)
    normed, total = add_rms_norm(delta, residual, weight, 1e-5)
    assert torch.equal(total, delta + residual)
    assert torch.equal(normed, rms_norm(delta + residual, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(shape[0], 2 * shape[1]) * 5).to(dtype)
    gate, up = x.double().chunk(2, -1)
    torch.testing.assert_close(silu_mul(x).double(), gate * torch.sigmoid(gate) * up, **tolerance(dtype))


def test_silu_mul_of_extremes() -> None:
    x = torch.tensor([[-1e4, 1e4, -88.0, 1.0, 1.0, 1.0]])
    assert silu_mul(x)[0].tolist() == pytest.approx([0.0, 1e4, 0.0], abs=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_is_a_rotation(dtype: torch.dtype) -> None:
    x, angle = torch.randn(7, 3, 10).to(dtype), torch.randn(7, 5)
    got = rope(x, angle.cos(), angle.sin()).double()
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(
        torch.ones(7, 1, 5).double(), angle[:, None].double()
    )
    torch.testing.assert_close(got, torch.cat((turned.real, turned.imag), -1), **tolerance(dtype))


@pytest.mark.parametrize("width", [33, 48, 704])
def test_a_rows_bits_do_not_depend_on_its_neighbours(width: int) -> None:
    x, weight = torch.randn(120, 2 * width), torch.randn(2 * width)
    norm, act = rms_norm(x, weight, 1e-6), silu_mul(x)
    for count in range(4, 120, 4):
        assert torch.equal(rms_norm(x[:count], weight, 1e-6), norm[:count])
        assert torch.equal(silu_mul(x[:count]), act[:count])


def test_kv_write_touches_the_named_slots_only() -> None:
    cache = torch.zeros(4, 3, 2, 2, 5, 8)
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    kv_write(k, v, cache, 1, torch.tensor([3 * 5 + 4, 0, 2 * 5]))
    for t, (block, slot) in enumerate([(3, 4), (0, 0), (2, 0)]):
        assert torch.equal(cache[block, 1, 0, :, slot], k[t])
        assert torch.equal(cache[block, 1, 1, :, slot], v[t])
        cache[block, 1, :, :, slot] = 0
    assert (cache == 0).all()

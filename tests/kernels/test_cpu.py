"""What a CPU computes between attentions, against float64: odd widths, every rounding at the end, bits of a row alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import rotary as reference
from quire.kernels.cpu import activation, linear, rms_norm, rotary, sampling
from quire.kernels.cpu.vectors import LANES
from quire.worker.backends import Requirements, available
from quire.worker.cpu import backends

from .test_paged_attention import with_lanes

DTYPES = (torch.float32, torch.bfloat16)
WIDTHS = (3, 16, 27, 48, 81, 576)


def close(got: Tensor, want: Tensor) -> None:
    """`want` is float64, of inputs that are exact in the dtype of `got`."""
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=2 * torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_of_a_sum(width: int, dtype: torch.dtype) -> None:
    delta, residual, weight = (
        torch.randn(37, width).to(dtype),
        torch.randn(37, width).to(dtype),
        torch.rand(width).to(dtype),
    )
    kept = delta.clone(), residual.clone()
    normed, summed = rms_norm.add_rms_norm(delta, residual, weight, 1e-5)
    assert torch.equal(summed, residual + delta)
    wide = summed.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    tolerance = 2 if width >= LANES else 4  # narrow ones are the reference's, which rounds twice
    torch.testing.assert_close(normed.double(), want, atol=1e-6, rtol=tolerance * torch.finfo(dtype).eps)
    assert torch.equal(delta, kept[0])
    assert torch.equal(residual, kept[1])
    alone = rms_norm.add_rms_norm(delta[5:6].clone(), residual[5:6].clone(), weight, 1e-5)[0]
    assert torch.equal(alone[0], normed[5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_gated_silu(width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(9, 2 * width) * 8).to(dtype)
    gate, up = x.double().chunk(2, -1)
    got = activation.silu_mul(x)
    close(got, gate * gate.sigmoid() * up)
    assert torch.equal(activation.silu_mul(x[4:5].clone())[0], got[4])


def test_silu_of_what_is_far_out() -> None:
    """exp overflows and vanishes where it should; NaN stays."""
    gate = torch.tensor(
        [-1e30, -100.0, -88.5, -87.0, -1e-30, 0.0, 1e-30, 87.0, 88.5, 100.0, 1e30, float("nan"), 1, 2, 3, 4]
    )
    got = activation.silu_mul(torch.cat((gate, torch.ones(16)))[None])[0]
    want = gate.double() * gate.double().sigmoid()
    torch.testing.assert_close(got.double(), want, atol=1e-35, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "slots"), [(4, 2, 32, 16), (9, 3, 64, 48), (5, 1, 96, 32)])
def test_rotation_and_the_cache(
    heads: int, kv_heads: int, head_dim: int, slots: int, normed: bool, dtype: torch.dtype
) -> None:
    """Against the reference in float64; slots that are not named stay as they are."""
    num_tokens = 21
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angle = torch.rand(num_tokens, head_dim // 2) * 100
    norms = (
        reference.HeadNorms(torch.rand(head_dim).to(dtype), torch.rand(head_dim).to(dtype), 1e-6) if normed else None
    )
    where = torch.randperm(6 * slots)[:num_tokens]
    before = torch.randn(6, 3, 2, kv_heads, slots, head_dim).to(dtype)
    exact = reference.HeadNorms(norms.query.double(), norms.key.double(), 1e-6) if norms else None
    want = before.double()
    want_q = in_float64(qkv, heads, angle, exact, want, where)
    got = with_lanes(before)
    got_q = rotary.rotate_and_write(qkv.clone(), heads, (angle.cos(), angle.sin()), norms, got, 1, where)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got_q.double(), want_q, atol=tolerance * 4, rtol=tolerance)
    torch.testing.assert_close(got.double(), with_lanes(want), atol=tolerance * 4, rtol=tolerance)
    named = torch.zeros(6 * slots, dtype=torch.bool)
    named[where] = True
    untouched = with_lanes(before)[:, [0, 2]]
    assert torch.equal(got[:, [0, 2]], untouched)
    values = (got[:, 1, 1] != before[:, 1, 1]).any(-1).any(1).reshape(-1)
    assert not values[~named].any()


def in_float64(
    qkv: Tensor, heads: int, angle: Tensor, norms: reference.HeadNorms | None, cache: Tensor, where: Tensor
) -> Tensor:
    kv_heads, slots, head_dim = cache.shape[3:]
    q, k, v = qkv.double().view(len(qkv), -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    cos, sin = angle.cos().double()[:, None], angle.sin().double()[:, None]

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    cache[where // slots, 1, 0, :, where % slots] = turned(k, norms.key if norms else None)
    cache[where // slots, 1, 1, :, where % slots] = v
    return turned(q, norms.query if norms else None)


@pytest.mark.parametrize("width", [3, 16, 17, 331, 4096])
def test_the_first_largest_of_each_row(width: int) -> None:
    """Ties and infinities among them; a row with NaN is told, wherever it is, and no other."""
    x = torch.randint(-5, 6, (60, width)).float()
    x[:20] = torch.randn(20, width)
    x[50], x[51, width // 2], x[52, -1] = -torch.inf, torch.inf, 100.0
    ids, faulty = sampling.largest(x)
    assert torch.equal(ids, x.argmax(-1))
    assert not faulty.any()
    x[7, 0] = x[8, -1] = x[9, width // 2] = x[50, 1] = torch.nan
    told = sampling.largest(x)
    assert told[1].nonzero()[:, 0].tolist() == [7, 8, 9, 50]
    assert torch.equal(told[0][~told[1]], ids[~told[1]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(48, 80), (576, 960), (81, 331), (1536, 64)])
def test_a_rows_product_is_the_same_bits_among_any_others(inputs: int, outputs: int, dtype: torch.dtype) -> None:
    if not linear.is_supported(dtype):
        assert not any(dtype in backend.supports.dtypes for backend in backends())
        return
    weight, bias, x = (
        torch.randn(outputs, inputs).to(dtype),
        torch.randn(outputs).to(dtype),
        torch.randn(520, inputs).to(dtype),
    )
    apply = linear.linear(weight, bias)
    whole = apply(x)
    want = x.double() @ weight.double().T + bias.double()
    bound = inputs * 2**-24 * (x.double().abs() @ weight.double().abs().T) + torch.finfo(dtype).eps * want.abs()
    assert ((whole.double() - want).abs() <= bound).all()  # of a sum in float32, in any order, rounded once
    for rows in (4, 8, 12, 32, 36, 64, 100, 256, 516):
        assert torch.equal(apply(x[:rows].clone()), whole[:rows])


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({}, "numba"),
        ({"dtype": torch.float16}, "torch"),
        ({"head_dim": 80}, "torch"),
        ({"block_size": 8}, "torch"),
    ],
)
def test_who_computes_what(asked: dict[str, Any], name: str) -> None:
    needs = {"dtype": torch.float32, "head_dim": 64, "block_size": 16, **asked}
    required = Requirements(
        device="cpu",
        dtype=needs["dtype"],
        head_dims=frozenset({needs["head_dim"]}),
        block_size=needs["block_size"],
        windows=True,
    )
    able = [backend.name for backend in available(torch.device("cpu")) if not required.unmet(backend.supports)]
    assert able[0] == name


@pytest.mark.parametrize("damage", ["truncated", "emptied", "none", "no folder"])
def test_compiled_code_that_cannot_be_read_is_compiled_again(damage: str, tmp_path: Path) -> None:
    """In a process of its own each: what was kept, what has become of it, or nowhere to keep it."""
    code = """
import sys, numba
numba.config.CACHE_DIR = sys.argv[1]
import torch
from quire.kernels.cpu import sampling
print(sampling.largest(torch.arange(64.0).view(2, 32))[0].tolist())
"""
    folder = tmp_path / "kept"

    def run() -> str:
        command = [sys.executable, "-c", code, str(folder)]
        return subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout

    if damage == "no folder":
        folder.write_text("a file is in its place")
    else:
        assert run() == "[31, 31]\n"
        (data,) = folder.rglob("*.nbc")
        content = data.read_bytes()
        data.write_bytes({"truncated": content[:99], "emptied": b"", "none": content}[damage])
    assert run() == "[31, 31]\n"

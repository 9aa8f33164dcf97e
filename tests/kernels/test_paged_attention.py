"""Against softmax in float64 on random ragged steps, with NaN in every slot that no query may read."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.kernels import paged_attention as reference
from quire.kernels.cpu import paged_attention as cpu
from quire.kernels.cpu.vectors import LANES
from quire.kernels.kv_write import kv_write
from quire.kernels.paged_attention import paged_attention, plan_attention

HEAD_DIM, NUM_LAYERS = 16, 2


def with_lanes(cache: Tensor) -> Tensor:
    """The same content as the kernels for a CPU have it: sixteen keys side by side."""
    blocks, layers, _, heads, slots, head_dim = cache.shape
    keys = cache[:, :, 0].reshape(blocks, layers, heads, slots // LANES, LANES, head_dim).transpose(-1, -2)
    laid_out = cache.clone()
    laid_out[:, :, 0] = keys.reshape(blocks, layers, heads, slots, head_dim)
    return laid_out


class Step:
    """A random step: every row has a context of its own keys and values, in blocks dealt at random."""

    def __init__(
        self,
        seed: int,
        lengths: list[tuple[int, int]],
        *,
        heads: int,
        kv_heads: int,
        block_size: int,
        head_dim: int = HEAD_DIM,
    ) -> None:
        torch.manual_seed(seed)
        self.head_dim = head_dim
        self.lengths, self.heads, self.kv_heads, self.block_size = lengths, heads, kv_heads, block_size
        sizes = [math.ceil((start + count) / block_size) for start, count in lengths]
        num_blocks = sum(sizes) + 1
        self.cache = torch.full((num_blocks, NUM_LAYERS, 2, kv_heads, block_size, head_dim), float("nan"))
        deal = (torch.randperm(num_blocks - 1) + 1).split(sizes)
        self.tables = torch.zeros(len(lengths), max(sizes) + 3, dtype=torch.int32)
        self.keys, self.values = [], []
        for row, (start, count) in enumerate(lengths):
            self.tables[row, : sizes[row]] = deal[row].int()
            shape = (start + count, kv_heads, head_dim)
            self.keys.append(torch.randn(shape))
            self.values.append(torch.randn(shape))
            positions = torch.arange(start + count)
            slots = self.tables[row, positions // block_size].long() * block_size + positions % block_size
            for layer in range(NUM_LAYERS):
                kv_write(self.keys[row] + layer, self.values[row] + layer, self.cache, layer, slots)
        self.queries = torch.randn(sum(count for _, count in lengths), heads, head_dim)

    def attend(
        self, rows: list[int] | None = None, window: int | None = None, layer: int = 1, *, kernels: Any = reference
    ) -> list[Tensor]:
        """The results of some rows computed together, one tensor a row."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        queries = self.queries.split([count for _, count in self.lengths])
        starts, counts = torch.tensor([self.lengths[row] for row in rows]).T
        plan = kernels.plan_attention(
            starts.contiguous(), counts.contiguous(), self.tables[rows], block_size=self.block_size, window=window
        )
        cache = with_lanes(self.cache) if kernels is cpu else self.cache
        chosen = torch.cat([queries[row] for row in rows])
        out = kernels.paged_attention(chosen, cache, layer, plan, self.head_dim**-0.5)
        return list(out.split(counts.tolist()))

    def expected(self, row: int, window: int | None = None, layer: int = 1) -> Tensor:
        start, count = self.lengths[row]
        group = self.heads // self.kv_heads
        q = self.queries.split([count for _, count in self.lengths])[row].double()
        k, v = ((x[row] + layer).double().repeat_interleave(group, 1) for x in (self.keys, self.values))
        scores = torch.einsum("qnh,knh->nqk", q, k) * self.head_dim**-0.5
        distance = (start + torch.arange(count))[:, None] - torch.arange(start + count)
        hidden = (distance < 0) | (distance >= (window or 1 << 30))
        return torch.einsum("nqk,knh->qnh", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


def random_lengths(seed: int) -> list[tuple[int, int]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    return [(draw(0, 200), 1 if draw(0, 3) else draw(1, 90)) for _ in range(draw(1, 9))]


@pytest.mark.parametrize("block_size", [1, 5, 16, 100])
@pytest.mark.parametrize("window", [None, 1, 7, 70])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3), (5, 1)])
def test_ragged_steps(heads: int, kv_heads: int, block_size: int, window: int | None) -> None:
    for seed in range(2):
        step = Step(seed, random_lengths(seed), heads=heads, kv_heads=kv_heads, block_size=block_size)
        for row, result in enumerate(step.attend(window=window)):
            torch.testing.assert_close(result.double(), step.expected(row, window), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (9, 3)])
def test_a_rows_bits_do_not_depend_on_its_neighbours(heads: int, kv_heads: int, window: int | None) -> None:
    for seed in range(10, 16):
        step = Step(seed, random_lengths(seed), heads=heads, kv_heads=kv_heads, block_size=16)
        together = step.attend(window=window)
        for row, result in enumerate(together):
            assert torch.equal(step.attend([row], window)[0], result)


@pytest.mark.parametrize("window", [None, 40])
def test_a_prompts_bits_do_not_depend_on_how_it_is_cut(window: int | None) -> None:
    whole = Step(3, [(0, 170)], heads=6, kv_heads=2, block_size=16)
    expected = whole.attend(window=window)[0]
    for cuts in ([1] * 170, [3, 60, 1, 1, 105], [64, 106], [169, 1]):
        results, start = [], 0
        for count in cuts:
            plan = plan_attention(
                torch.tensor([start]), torch.tensor([count]), whole.tables, block_size=16, window=window
            )
            queries = whole.queries[start : start + count]
            results.append(paged_attention(queries, whole.cache, 1, plan, HEAD_DIM**-0.5))
            start += count
        assert torch.equal(torch.cat(results), expected)


def test_work_larger_than_the_scratch_space(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(5, [(150, 1), (20, 1), (100, 60), (0, 33)], heads=4, kv_heads=2, block_size=8)
    expected = step.attend()
    monkeypatch.setattr("quire.kernels.paged_attention.SCRATCH", 1 << 11)
    for result, want in zip(step.attend(), expected, strict=True):
        assert torch.equal(result, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_output(dtype: torch.dtype) -> None:
    step = Step(6, [(80, 1), (10, 30)], heads=4, kv_heads=2, block_size=16)
    step.cache, step.queries = step.cache.to(dtype), step.queries.to(dtype)
    step.keys, step.values = ([(x + 1).to(dtype).float() - 1 for x in xs] for xs in (step.keys, step.values))
    for row, result in enumerate(step.attend()):
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), step.expected(row), atol=1e-2, rtol=torch.finfo(dtype).eps)


def test_nan_in_one_row_stays_there() -> None:
    step = Step(7, [(40, 1), (30, 1), (8, 20)], heads=4, kv_heads=2, block_size=16)
    clean = step.attend()
    step.queries[0] = float("nan")
    poisoned = step.attend()
    assert poisoned[0].isnan().all()
    assert torch.equal(poisoned[1], clean[1])
    assert torch.equal(poisoned[2], clean[2])


def test_padding_queries_give_zero() -> None:
    step = Step(8, [(12, 1)], heads=4, kv_heads=2, block_size=16)
    plan = plan_attention(torch.tensor([12]), torch.tensor([1]), step.tables, block_size=16)
    out = paged_attention(torch.randn(4, 4, HEAD_DIM), step.cache, 0, plan, 1.0)
    assert out[0].isfinite().all()
    assert (out[1:] == 0).all()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


LONG = [(700, 1), (300, 40), (0, 300), (17, 1), (255, 1), (256, 3)]  # several splits, and their edges


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 1, 7, 270])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(4, 4, 32, 16), (9, 3, 64, 32), (17, 1, 96, 16), (12, 4, 128, 48)]
)
def test_on_a_cpu(heads: int, kv_heads: int, head_dim: int, block_size: int, window: int | None) -> None:
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size}
    for seed, lengths in enumerate((random_lengths(1), LONG)):
        step = Step(seed, lengths, **shape)
        for row, result in enumerate(step.attend(window=window, kernels=cpu)):
            torch.testing.assert_close(result.double(), step.expected(row, window), atol=4e-6, rtol=1e-5)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40, 300])
def test_bits_on_a_cpu_depend_neither_on_neighbours_nor_on_cuts(window: int | None, dtype: torch.dtype) -> None:
    step = Step(12, LONG, heads=6, kv_heads=2, block_size=16, head_dim=64)
    step.cache, step.queries = step.cache.to(dtype), step.queries.to(dtype)
    together = step.attend(window=window, kernels=cpu)
    torch.set_num_threads(2)
    for row, result in enumerate(together):  # by another number of threads
        assert torch.equal(step.attend([row], window, kernels=cpu)[0], result)
    cache, begin = with_lanes(step.cache), sum(count for _, count in LONG[:2])
    for cuts in ([1] * 300, [3, 190, 1, 1, 105], [256, 44]):
        results, start = [], 0
        for count in cuts:
            numbers = torch.tensor([start]), torch.tensor([count])
            plan = cpu.plan_attention(*numbers, step.tables[2:3], block_size=16, window=window)
            queries = step.queries[begin + start : begin + start + count]
            results.append(cpu.paged_attention(queries, cache, 1, plan, 64**-0.5))
            start += count
        assert torch.equal(torch.cat(results), together[2])


def test_bfloat16_on_a_cpu_rounds_only_inputs_and_output() -> None:
    step = Step(6, [(80, 1), (10, 30)], heads=4, kv_heads=2, block_size=16, head_dim=32)
    step.cache, step.queries = step.cache.bfloat16(), step.queries.bfloat16()
    step.keys, step.values = ([(x + 1).bfloat16().float() - 1 for x in xs] for xs in (step.keys, step.values))
    for row, result in enumerate(step.attend(kernels=cpu)):
        torch.testing.assert_close(result.double(), step.expected(row), atol=1e-3, rtol=2**-8)


def test_nan_in_one_row_stays_there_on_a_cpu() -> None:
    step = Step(7, [(40, 1), (30, 1), (8, 20)], heads=4, kv_heads=2, block_size=16, head_dim=32)
    clean = step.attend(kernels=cpu)
    step.queries[0] = float("nan")
    poisoned = step.attend(kernels=cpu)
    assert poisoned[0].isnan().all()
    assert torch.equal(poisoned[1], clean[1])
    assert torch.equal(poisoned[2], clean[2])


def test_padding_queries_give_zero_on_a_cpu() -> None:
    step = Step(8, [(12, 1)], heads=4, kv_heads=2, block_size=16, head_dim=32)
    plan = cpu.plan_attention(torch.tensor([12]), torch.tensor([1]), step.tables, block_size=16)
    out = cpu.paged_attention(torch.randn(4, 4, 32), with_lanes(step.cache), 0, plan, 1.0)
    assert out[0].isfinite().all()
    assert (out[1:] == 0).all()

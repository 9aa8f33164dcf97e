"""Causal attention of a step's queries over the paged cache, prefill chunks and decodes in one call.

t tokens, n heads, h head dim, r rows, i items, c slots of a chunk, g query heads of a KV head, m queries of a tile.

The keys of a row are cut into chunks at fixed slots; each chunk gives a partial softmax, and a row's partials are added
in order (flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html, with chunks of fixed size). A query's
result is therefore the same bits whoever else is in the batch, whether it is decoded or prefilled, and however a
prompt is cut. Chunks that a query does not see add an exact zero. All arithmetic is float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = (
    64  # slots; 32 wastes less on short contexts and pays more per long one: within 10 % of each other at 20 to 2000
)
QUERIES = 4  # a CPU's matrix product gives a row the same bits at every multiple of 4 rows, not below
SCRATCH = (
    1 << 18
)  # float32 elements that one piece of work gathers or scores: stays in a CPU's cache; twice as fast as 1 << 22
_FAR = -1e30  # in place of a maximum over nothing, which would make NaN of -inf - -inf


@dataclass(frozen=True, slots=True)
class Decodes:
    """Rows with one query, as items: one (row, chunk) each, rows ascending and chunks ascending in a row."""

    tokens_r: Tensor  # int64, index of the query
    rows_i: Tensor  # int64, index into tokens_r
    blocks_ib: Tensor  # int64, the cache blocks of the chunk
    seen_ic: Tensor  # bool, slots that the query sees
    partly_i: Tensor  # bool, items of which it does not see every slot


@dataclass(frozen=True, slots=True)
class Prefill:
    """One row with several queries."""

    first: int  # index of its first query
    start: int  # position of that query
    count: int
    first_chunk: int  # earlier ones lie before the window
    blocks_ib: Tensor  # int64, of the chunks from first_chunk on


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a step's attention reads: made once per step and window, used by every layer of that window."""

    window: int | None
    decodes: Decodes | None
    prefills: list[Prefill]


def plan_attention(
    starts_r: Tensor, counts_r: Tensor, tables: Tensor, *, block_size: int, window: int | None = None
) -> AttentionPlan:
    """`starts_r`, `counts_r` [r] int64 on the CPU: row i computes positions [start, start + count), its queries being
    the next `count` of the step. `tables` [r, blocks] int32 on the device, entries behind a row's last block ignored.
    A query sees itself and what is before it, at most `window` tokens in all.
    """
    per_chunk = max(1, CHUNK // block_size)
    chunk = per_chunk * block_size
    oldest = starts_r - (window - 1) if window else torch.zeros_like(starts_r)
    first_chunk = oldest.clamp_min(0) // chunk
    num_chunks = (starts_r + counts_r - 1) // chunk + 1 - first_chunk
    firsts = counts_r.cumsum(0) - counts_r

    def blocks(rows: Tensor, chunks: Tensor) -> Tensor:
        columns = (chunks[:, None] * per_chunk + torch.arange(per_chunk)).clamp_max_(tables.shape[1] - 1)
        return tables[rows[:, None].to(tables.device), columns.to(tables.device)].long()

    decodes = None
    if len(rows := (counts_r == 1).nonzero()[:, 0]):
        item_row = torch.arange(len(rows)).repeat_interleave(num_chunks[rows])
        item_chunk = torch.arange(len(item_row)) - (num_chunks[rows].cumsum(0) - num_chunks[rows])[item_row]
        item_chunk += first_chunk[rows][item_row]
        slots = item_chunk[:, None] * chunk + torch.arange(chunk)
        position = starts_r[rows][item_row][:, None]
        seen = slots <= position
        if window:
            seen &= slots > position - window
        device = tables.device
        decodes = Decodes(
            tokens_r=firsts[rows].to(device),
            rows_i=item_row.to(device),
            blocks_ib=blocks(rows[item_row], item_chunk),
            seen_ic=seen.to(device),
            partly_i=(~seen.all(-1)).to(device),
        )
    prefills = []
    for row in (counts_r > 1).nonzero()[:, 0].tolist():
        chunks = torch.arange(int(num_chunks[row])) + first_chunk[row]
        prefills.append(
            Prefill(
                first=int(firsts[row]),
                start=int(starts_r[row]),
                count=int(counts_r[row]),
                first_chunk=int(first_chunk[row]),
                blocks_ib=blocks(torch.full_like(chunks, row), chunks),
            )
        )
    return AttentionPlan(window, decodes, prefills)


def paged_attention(q_tnh: Tensor, cache: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
    """softmax(scale * q k) v for every query: [t, n, h] in q's dtype; queries that no row owns (padding) give 0.

    `cache` is [block, layer, 2, kv_head, slot, h], contiguous, this step's keys and values already in it; query heads
    [j * g, (j + 1) * g) read KV head j. Slots that no query sees may hold anything, NaN included.
    """
    num_kv, head_dim = cache.shape[3], cache.shape[5]
    queries = (q_tnh.float() * scale).view(len(q_tnh), num_kv, -1, head_dim)
    out = torch.zeros_like(queries)
    if plan.decodes:
        out[plan.decodes.tokens_r] = _decode(queries, cache, layer, plan.decodes)
    for prefill in plan.prefills:
        for first, result in _prefill(queries, cache, layer, prefill, plan.window):
            out[first : first + len(result)] = result
    return out.view_as(q_tnh).to(q_tnh.dtype)


def _decode(queries: Tensor, cache: Tensor, layer: int, work: Decodes) -> Tensor:
    q_rnmh = queries[work.tokens_r]
    group = q_rnmh.shape[2]
    q_rnmh = _padded(q_rnmh)
    step = max(1, SCRATCH // (work.seen_ic.shape[1] * cache.shape[3] * cache.shape[5]))
    partials = []
    for first in range(0, len(work.rows_i), step):
        items = slice(first, first + step)
        seen = work.seen_ic[items, None, None]
        keys, values = _gather(cache, layer, work.blocks_ib[items])
        partly = work.partly_i[items]
        values[partly] = values[partly].masked_fill_(~seen[partly].transpose(-1, -2), 0.0)  # 0 times NaN is NaN
        partials.append(_partial(q_rnmh[work.rows_i[items]], keys, values, seen))
    top, total, value = (torch.cat(parts) for parts in zip(*partials, strict=True))
    return _combined(work.rows_i, len(q_rnmh), top, total, value)[:, :, :group]


def _prefill(
    queries: Tensor, cache: Tensor, layer: int, work: Prefill, window: int | None
) -> Iterator[tuple[int, Tensor]]:
    """The results in tiles of queries, each with the index of its first."""
    keys, values = _gather(cache, layer, work.blocks_ib)
    (_, num_kv, group, head_dim), chunk = queries.shape, keys.shape[2]
    device, end = queries.device, work.start + work.count
    slots = (torch.arange(len(keys), device=device) + work.first_chunk)[:, None] * chunk
    slots = slots + torch.arange(chunk, device=device)
    unseen = slots >= end if window is None else (slots >= end) | (slots <= work.start - window)
    values.masked_fill_(unseen[:, None, :, None], 0.0)
    tile = max(QUERIES, SCRATCH // (num_kv * group * keys.shape[0] * chunk) // QUERIES * QUERIES)
    for first in range(0, work.count, tile):
        count = min(tile, work.count - first)
        positions = work.start + first + torch.arange(count, device=device)
        low = 0 if window is None else max(0, (work.start + first - window + 1) // chunk - work.first_chunk)
        high = (work.start + first + count - 1) // chunk + 1 - work.first_chunk
        seen = slots[low:high, None] <= positions[:, None]
        if window:
            seen &= slots[low:high, None] > positions[:, None] - window
        begin = work.first + first
        q_nmh = _padded(queries[begin : begin + count].transpose(0, 1).reshape(1, num_kv, -1, head_dim))
        seen = seen.repeat_interleave(group, 1)
        seen = torch.nn.functional.pad(seen, (0, 0, 0, q_nmh.shape[2] - count * group), value=True)[:, None]
        partial = _partial(q_nmh.expand(high - low, -1, -1, -1), keys[low:high], values[low:high], seen)
        same_row = torch.zeros(high - low, dtype=torch.int64, device=device)
        result = _combined(same_row, 1, *partial)[0, :, : count * group]
        yield begin, result.view(num_kv, count, group, head_dim).transpose(0, 1)


def _padded(q: Tensor) -> Tensor:
    """Queries [..., m, h] filled up to a multiple of QUERIES."""
    return torch.nn.functional.pad(q, (0, 0, 0, -q.shape[-2] % QUERIES))


def _gather(cache: Tensor, layer: int, blocks_ib: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of the keys and the values of chunks: [i, kv_head, c, h] float32."""
    _, num_layers, _, num_kv, block_slots, head_dim = cache.shape
    heads = torch.arange(num_kv, device=cache.device)[:, None]
    keys = ((blocks_ib * num_layers + layer) * 2 * num_kv)[:, None] + heads
    flat = cache.view(-1, block_slots * head_dim)
    shape = (len(blocks_ib), num_kv, -1, head_dim)
    k = flat.index_select(0, keys.view(-1)).view(shape)
    v = flat.index_select(0, (keys + num_kv).view(-1)).view(shape)
    return k.float(), v.float()


def _partial(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per item: the largest score, the sum of exp(score - largest), and the values weighed by it."""
    scores = (q @ k.transpose(-1, -2)).masked_fill_(~seen, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp_min_(_FAR)
    weights = scores.sub_(top).exp_()
    return top, weights.sum(-1, keepdim=True), weights @ v


def _combined(rows_i: Tensor, num_rows: int, top: Tensor, total: Tensor, value: Tensor) -> Tensor:
    """The partials of each row, put on one scale and added in order."""
    if num_rows == len(rows_i):  # one chunk each: the scale would be 1
        return value / total
    best = torch.full((num_rows, *top.shape[1:]), _FAR, device=top.device)
    best.scatter_reduce_(0, rows_i[:, None, None, None].expand_as(top), top, "amax")
    scale = torch.exp(top - best[rows_i])
    shape = (num_rows, *value.shape[1:])
    values = torch.zeros(shape, device=top.device).index_add_(0, rows_i, value * scale)
    totals = torch.zeros_like(best).index_add_(0, rows_i, total * scale)
    return values / totals

"""Paged attention on a CPU: the signature and the meaning of `kernels/paged_attention.py`.

h head dim, g query heads of a KV head, n KV heads.

A row's keys are cut into splits at fixed slots. Of each split a query gets a partial softmax, and partials are merged
in order (flash-decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). Scores and sums are added up in one
order whatever shares the work, so a query's result is the same bits alone or in a batch, decoded or prefilled.

Keys lie in the cache with the slots as lanes, `[block, layer, 0, kv_head, slot / LANES, h, slot % LANES]`, so that a vector holds a
coordinate of sixteen keys and no sum runs across lanes; values lie as everywhere, h being the lanes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from .panel import add_panel, panel
from .pool import OWN, Kernel, alike, as_float, bfloats, bits_of, floats, int32s, ints, next_task, thread_number
from .vectors import LANES, exp, fma, larger, largest, load, prefetch, shifted, splat, store, total, within

SPLIT = 256  # slots
ROW = SPLIT + LANES  # of scores: the last may be computed in pairs of vectors of which one is too many
QUERIES = 8  # of one row and one KV head, that one task computes
FAR = np.float32(-1e30)  # in place of a maximum over nothing

# Columns of an item: (first query's token, queries, first query's position, table row, first split, end split, first
# partial or -1 when the item is the whole of its queries).
COLUMNS = 7
SPREAD = 4  # times as many items as there are threads are enough to keep all busy


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    items: NDArray[np.int64]  # [items, COLUMNS]
    merges: NDArray[np.int64]  # [m, 3]: token, first partial, partials
    tables: NDArray[np.int32]
    block_size: int
    window: int
    num_partials: int


def plan_attention(
    starts_r: Tensor, counts_r: Tensor, tables: Tensor, *, block_size: int, window: int | None = None
) -> AttentionPlan:
    """As `kernels.paged_attention.plan_attention`."""
    starts, counts = starts_r.numpy(), counts_r.numpy()
    firsts = counts.cumsum() - counts
    threads = torch.get_num_threads()
    single = counts == 1
    # Rows are split among threads only where there are few: the result is the same.
    spread = single & (single.sum() + (-(-counts[~single] // QUERIES)).sum() < SPREAD * threads)
    oldest = np.maximum(starts - (window - 1), 0) if window else np.zeros_like(starts)
    first_split, end_split = oldest // SPLIT, (starts + counts - 1) // SPLIT + 1
    pieces = np.where(spread, end_split - first_split, -(-counts // QUERIES))
    rows = np.arange(len(counts)).repeat(pieces)
    nth = np.arange(len(rows)) - (pieces.cumsum() - pieces).repeat(pieces)
    alone = spread[rows] & (pieces[rows] > 1)
    offset = np.where(spread[rows], 0, nth * QUERIES)
    queries = np.where(spread[rows], 1, np.minimum(QUERIES, counts[rows] - offset))
    position = starts[rows] + offset
    begin = np.maximum(position - (window - 1), 0) // SPLIT if window else np.zeros_like(position)
    partial = np.where(alone, alone.cumsum() - 1, -1)
    items = np.stack(
        (
            firsts[rows] + offset,
            queries,
            position,
            rows,
            np.where(alone, first_split[rows] + nth, begin),
            np.where(alone, first_split[rows] + nth + 1, (position + queries - 1) // SPLIT + 1),
            partial,
        ),
        axis=1,
    )
    merged = (spread & (pieces > 1)).nonzero()[0]
    first_partial = partial[(pieces.cumsum() - pieces)[merged]]
    merges = np.stack((firsts[merged], first_partial, pieces[merged]), axis=1)
    return AttentionPlan(
        items=np.ascontiguousarray(items),
        merges=np.ascontiguousarray(merges),
        tables=np.ascontiguousarray(tables.numpy()),
        block_size=block_size,
        window=window or 0,
        num_partials=int(alone.sum()),
    )


def paged_attention(q_tnh: Tensor, cache: Tensor, layer: int, plan: AttentionPlan, scale: float) -> Tensor:
    """As `kernels.paged_attention.paged_attention`, over a cache that `rotate_and_write` has filled."""
    _, num_heads, head_dim = q_tnh.shape
    _, num_layers, _, num_kv, block_slots, _ = cache.shape
    out = torch.zeros_like(q_tnh)
    partials = torch.empty(plan.num_partials * num_heads, head_dim + 2)
    scratch = torch.empty(torch.get_num_threads(), QUERIES * num_heads // num_kv * (ROW + 3 * head_dim + 4))
    places = torch.empty(torch.get_num_threads(), SPLIT // LANES, dtype=torch.int64)
    attend, merge = KERNELS[q_tnh.dtype]
    attend(
        len(plan.items) * num_kv,
        q_tnh.data_ptr(), out.data_ptr(), cache.data_ptr(), plan.items.ctypes.data, plan.tables.ctypes.data,
        partials.data_ptr(), scratch.data_ptr(), scratch.shape[1], plan.tables.shape[1], bits_of(scale),
        num_heads, num_kv, head_dim, block_slots, num_layers, layer, plan.window, places.data_ptr(),
    )  # fmt: skip
    if plan.num_partials:
        merge(
            len(plan.merges) * num_heads,
            plan.merges.ctypes.data, partials.data_ptr(), out.data_ptr(), scratch.data_ptr(), scratch.shape[1],
            num_heads, head_dim,
        )  # fmt: skip
    return out


# What `attend` is given, in order.
Q, OUT, CACHE, ITEMS, TABLES, PARTIALS, SCRATCH, SCRATCH_SIZE, TABLE_WIDTH, SCALE = range(OWN, OWN + 10)
NUM_HEADS, NUM_KV, HEAD_DIM, BLOCK_SLOTS, NUM_LAYERS, LAYER, WINDOW, PLACES = range(OWN + 10, OWN + 18)


@njit(error_model="numpy")
def _tile(task, args, scratch, places, memory):
    """The queries of one item, for one KV head."""
    num_heads, num_kv, head_dim = args[NUM_HEADS], args[NUM_KV], args[HEAD_DIM]
    window, group = args[WINDOW], num_heads // num_kv
    item, head = shifted(ints(args[ITEMS]), task // num_kv * COLUMNS), task % num_kv
    rows, position, partial = item[1] * group, item[2], item[6]
    table = shifted(int32s(args[TABLES]), item[3] * args[TABLE_WIDTH])
    queries = shifted(scratch, rows * ROW)
    values, part = shifted(queries, rows * head_dim), shifted(queries, 2 * rows * head_dim)
    bests = shifted(queries, 3 * rows * head_dim)
    sums, best, summed = shifted(bests, rows), shifted(bests, 2 * rows), shifted(bests, 3 * rows)
    head_of = item[0] * num_heads + head * group

    _copy_queries(alike(args[Q], memory), head_of, num_heads, rows, group, head_dim, as_float(args[SCALE]), queries)
    _zero(values, rows * head_dim)
    for i in range(rows):
        best[i], summed[i] = FAR, np.float32(0.0)
    for split in range(item[4], item[5]):
        start = split * SPLIT
        stop = min(SPLIT, position + item[1] - start)
        low = max(0, position - window + 1 - start) if window else 0
        _find(table, start, low, stop, head, args, places)
        _scores(queries, rows, places, low, stop, args, memory, scratch)
        for i in range(rows):
            at = position + i // group - start
            end = max(0, min(stop, at + 1))
            begin = min(end, max(0, at - window + 1)) if window else 0
            bests[i], sums[i] = _softmax(shifted(scratch, i * ROW), begin, end, low // LANES * LANES, stop)
        _weigh(scratch, rows, places, low, stop, args, memory, part)
        if partial < 0:
            for i in range(rows):
                at = i * head_dim
                best[i], summed[i] = _merge(
                    shifted(values, at), shifted(part, at), head_dim, best[i], summed[i], bests[i], sums[i]
                )
    for i in range(rows):
        if partial < 0:
            to = (head_of + i // group * num_heads + i % group) * head_dim
            _finish(shifted(values, i * head_dim), summed[i], head_dim, shifted(alike(args[OUT], memory), to))
        else:
            to = shifted(floats(args[PARTIALS]), (partial * num_heads + head * group + i) * (head_dim + 2))
            _copy(shifted(part, i * head_dim), head_dim, to)
            to[head_dim], to[head_dim + 1] = bests[i], sums[i]


@njit(error_model="numpy")
def _find(table, start, low, stop, head, args, places):
    """Where in the cache the keys of each LANES slots are, of those from `start` on that are in [low, stop)."""
    block_slots, num_kv = args[BLOCK_SLOTS], args[NUM_KV]
    for i in range(low // LANES, (stop + LANES - 1) // LANES):
        slot = start + i * LANES
        block = slot // block_slots
        layer = table[block] * args[NUM_LAYERS] + args[LAYER]
        places[i] = ((layer * 2 * num_kv + head) * block_slots + slot - block * block_slots) * args[HEAD_DIM]


@njit(error_model="numpy")
def _scores(queries, rows, places, low, stop, args, memory, to):
    """Of all rows and those slots, a row of ROW each."""
    head_dim, cache = args[HEAD_DIM], alike(args[CACHE], memory)
    values = shifted(cache, args[NUM_KV] * args[BLOCK_SLOTS] * head_dim)
    last = (stop - 1) // LANES
    for i in range(low // LANES, last + 1, 2):
        second = min(i + 1, last)  # the first once more, for nothing, when there is no other
        for ahead in range(i + 2, min(i + 4, last + 1)):
            _prefetch(shifted(cache, places[ahead]), head_dim)
        _prefetch(shifted(values, places[i]), head_dim)
        _prefetch(shifted(values, places[second]), head_dim)
        left, right = shifted(cache, places[i]), shifted(cache, places[second])
        panel(rows, head_dim, queries, head_dim, left, right, LANES, shifted(to, i * LANES), ROW)


@njit(error_model="numpy")
def _weigh(weights, rows, places, low, stop, args, memory, to):
    """The values of the same slots, weighed and added up."""
    head_dim = args[HEAD_DIM]
    values = shifted(alike(args[CACHE], memory), args[NUM_KV] * args[BLOCK_SLOTS] * head_dim)
    _zero(to, rows * head_dim)
    for i in range(low // LANES, (stop + LANES - 1) // LANES):
        begin, end = max(i * LANES, low), min((i + 1) * LANES, stop)
        at = shifted(values, places[i] + (begin - i * LANES) * head_dim)
        add_panel(rows, end - begin, shifted(weights, begin), ROW, at, head_dim, to)


@njit(error_model="numpy")
def _prefetch(pointer, head_dim):
    for i in range(0, LANES * head_dim, 32):
        prefetch(shifted(pointer, i))


@njit(error_model="numpy")
def _copy_queries(q, first, num_heads, rows, group, head_dim, scale, to):
    for i in range(rows):
        at = (first + i // group * num_heads + i % group) * head_dim
        for d in range(0, head_dim, LANES):
            store(to, i * head_dim + d, load(q, at + d) * splat(scale))


@njit(error_model="numpy")
def _copy(value, count, to):
    for c in range(0, count, LANES):
        store(to, c, load(value, c))


@njit(error_model="numpy")
def _zero(to, count):
    for c in range(0, count, LANES):
        store(to, c, splat(np.float32(0.0)))


@njit(error_model="numpy")
def _softmax(scores, low, high, begin, end):
    """Turn one query's scores of a split, of which it sees [low, high), into weights; its largest score, and the sum of
    the weights. In [begin, end) what it does not see becomes 0."""
    first, last = low // LANES * LANES, (high + LANES - 1) // LANES * LANES
    highest = splat(FAR)
    for c in range(first, last, LANES):
        highest = larger(highest, within(load(scores, c), low - c, high - c, FAR))
    best = largest(highest)
    sums = splat(np.float32(0.0))
    for c in range(begin, end, LANES):
        weights = splat(np.float32(0.0))
        if first <= c < last:
            weights = within(exp(load(scores, c) - splat(best)), low - c, high - c, np.float32(0.0))
            sums = sums + weights
        store(scores, c, weights)
    return best, total(sums)


@njit(error_model="numpy")
def _merge(value, later, head_dim, best, summed, later_best, later_sum):
    """Add a partial to those before it, in their place; the largest score and the sum of all."""
    at = larger(splat(best), splat(later_best))
    keep, take = exp(splat(best) - at), exp(splat(later_best) - at)
    for d in range(0, head_dim, LANES):
        store(value, d, fma(load(later, d), take, load(value, d) * keep))
    return largest(at), largest(fma(splat(later_sum), take, splat(summed) * keep))


@njit(error_model="numpy")
def _finish(value, summed, head_dim, to):
    for d in range(0, head_dim, LANES):
        store(to, d, load(value, d) / splat(summed))


# What `merge` is given, in order.
M_MERGES, M_PARTIALS, M_OUT, M_SCRATCH, M_SCRATCH_SIZE, M_NUM_HEADS, M_HEAD_DIM = range(OWN, OWN + 7)


@njit(error_model="numpy")
def _row(task, args, scratch, memory):
    """The partials of one query and one head, in order."""
    num_heads, head_dim = args[M_NUM_HEADS], args[M_HEAD_DIM]
    merge, head = shifted(ints(args[M_MERGES]), task // num_heads * 3), task % num_heads
    _zero(scratch, head_dim)
    best, summed = FAR, np.float32(0.0)
    for i in range(merge[1], merge[1] + merge[2]):
        part = shifted(floats(args[M_PARTIALS]), (i * num_heads + head) * (head_dim + 2))
        best, summed = _merge(scratch, part, head_dim, best, summed, part[head_dim], part[head_dim + 1])
    to = (merge[0] * num_heads + head) * head_dim
    _finish(scratch, summed, head_dim, shifted(alike(args[M_OUT], memory), to))


@njit(error_model="numpy")
def _attend(args, memory):
    thread = thread_number(args)
    scratch = shifted(floats(args[SCRATCH]), thread * args[SCRATCH_SIZE])
    places = shifted(ints(args[PLACES]), thread * (SPLIT // LANES))
    task = next_task(args)
    while task >= 0:
        _tile(task, args, scratch, places, memory)
        task = next_task(args)


@njit(error_model="numpy")
def _merge_rows(args, memory):
    scratch = shifted(floats(args[M_SCRATCH]), thread_number(args) * args[M_SCRATCH_SIZE])
    task = next_task(args)
    while task >= 0:
        _row(task, args, scratch, memory)
        task = next_task(args)


def _attend_float32(args):
    _attend(args, floats(0))


def _attend_bfloat16(args):
    _attend(args, bfloats(0))


def _merge_float32(args):
    _merge_rows(args, floats(0))


def _merge_bfloat16(args):
    _merge_rows(args, bfloats(0))


KERNELS = {
    torch.float32: (Kernel(_attend_float32), Kernel(_merge_float32)),
    torch.bfloat16: (Kernel(_attend_bfloat16), Kernel(_merge_bfloat16)),
}

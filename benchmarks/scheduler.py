"""Time of one schedule() and update() while every row decodes, and of finding a cached prefix, without any device.

python benchmarks/scheduler.py [--rows 64 256 1024] [--waiting 0] [--steps 400] [--depth 2] [--match 1000 100000] [--out FILE]
"""

import argparse
import statistics
import sys
import time
from array import array
from pathlib import Path

from quire.benchmarks import drawing, report
from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import StepResult, pack
from quire.common.sampling import SamplingParams
from quire.scheduler.kv_cache import KvCache
from quire.scheduler.request import Request
from quire.scheduler.scheduler import Scheduler, Step

PROMPT = 64
BLOCK = 16


def decoding(num_rows: int, num_steps: int) -> Scheduler:
    """A scheduler whose rows are all past their prompt."""
    length = PROMPT + num_steps + 16
    config = SchedulerConfig(max_num_seqs=num_rows, max_num_batched_tokens=max(num_rows * PROMPT, 2048))
    scheduler = Scheduler(config, CacheConfig(block_size=BLOCK), num_rows * -(-length // BLOCK), length)
    sampling = SamplingParams(max_tokens=num_steps + 8, seed=0, stop_token_ids=[2])
    for id in range(num_rows):
        scheduler.add(Request(id, array("i", range(id, id + PROMPT)), PROMPT, sampling))
    return scheduler


def answer(step: Step) -> StepResult:
    count = len(step.sampled)
    return StepResult(1, step.plan.step, pack([1] * count), pack(range(10, 10 + count)), 9000 + len(step.plan.rows) % 7)


def measure(num_rows: int, num_waiting: int, num_steps: int, depth: int) -> tuple[list[float], list[float]]:
    """Microseconds of each schedule() and each update()."""
    scheduler = decoding(num_rows, num_steps)
    while any(request.computed < PROMPT for request in scheduler.running) or scheduler.waiting:
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(answer(step))
    for id in range(num_rows, num_rows + num_waiting):
        sampling = SamplingParams(max_tokens=8, seed=0)
        scheduler.add(Request(id, array("i", range(id, id + PROMPT)), PROMPT, sampling, tenant=str(id)))
    for _ in range(depth - 1):
        scheduler.schedule()
    schedules, updates = [], []
    for _ in range(num_steps - 8):
        start = time.perf_counter()
        step = scheduler.schedule()
        middle = time.perf_counter()
        assert step is not None and len(step.sampled) == num_rows
        result = answer(scheduler.dispatched[0])
        before = time.perf_counter()
        scheduler.update(result)
        after = time.perf_counter()
        schedules.append((middle - start) * 1e6)
        updates.append((after - before) * 1e6)
    return schedules, updates


def matching(num_tokens: int, times: int = 60) -> list[float]:
    """Microseconds of naming and finding the blocks of a prompt, all of which are cached, for requests that are new."""
    kv = KvCache(2 * num_tokens // BLOCK + 2, BLOCK, caching=True)

    def asking() -> Request:
        tokens = array("i", range(num_tokens))
        return Request(0, tokens, num_tokens, SamplingParams(max_tokens=8, seed=0))

    first, taken = asking(), []
    hit = kv.find(first, 0)
    assert hit is not None and not hit.blocks
    kv.admit(first, hit)
    first.computed = num_tokens
    kv.publish(first)
    for _ in range(times):
        request = asking()
        start = time.perf_counter()
        hit = kv.find(request, 0)
        taken.append((time.perf_counter() - start) * 1e6)
        assert hit is not None and len(hit.blocks) == (num_tokens - 1) // BLOCK
    return taken


def main() -> None:
    options = parse()
    taken: dict[str, dict[str, list[float]]] = {}
    for num_rows in options.rows:
        schedules, updates = measure(num_rows, options.waiting, options.steps, options.depth)
        both = [a + b for a, b in zip(schedules, updates, strict=True)]
        taken[f"{num_rows} rows"] = {"schedule": schedules, "update": updates, "both": both}
        print(f"{num_rows} rows: {told(both)} us", file=sys.stderr, flush=True)
    found = {f"{num_tokens} tokens": matching(num_tokens) for num_tokens in options.match}
    steps = [[name, *(told(times) for times in parts.values())] for name, parts in taken.items()]
    text = f"Microseconds, median (1st to 99th percentile) of {options.steps - 8} steps at depth {options.depth}:\n\n"
    text += report.table(["", "schedule", "update", "both"], steps)
    text += "\n\nTo name and find a cached prompt:\n\n"
    text += report.table(["", "find"], [[name, told(times)] for name, times in found.items()])
    print(f"\n{text}")
    if options.out:
        medians = {name: {part: statistics.median(of) for part, of in parts.items()} for name, parts in taken.items()}
        result = {"step_us": medians, "find_us": {name: statistics.median(of) for name, of in found.items()}}
        report.write(options.out, result, text)
        with drawing.figure(options.out.with_suffix(".png")) as (panel,):
            drawing.shares(panel, {name: parts["both"] for name, parts in taken.items()}, "schedule and update, µs")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--waiting", type=int, default=0, help="requests that wait for a row, each of another tenant")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--match", type=int, nargs="*", default=[1_000, 100_000], help="lengths of cached prompts")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    return parser.parse_args()


def told(times: list[float]) -> str:
    percentiles = statistics.quantiles(times, n=100)
    return f"{statistics.median(times):,.0f} ({percentiles[0]:,.0f} to {percentiles[-1]:,.0f})"


if __name__ == "__main__":
    main()

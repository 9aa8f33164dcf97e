"""Time of one schedule() and update() while every row decodes, without any device.

python benchmarks/scheduler.py [--rows 64 256 1024] [--waiting 0] [--steps 400] [--depth 2]
"""

import argparse
import statistics
import time
from array import array

from quire.common.config import CacheConfig, SchedulerConfig
from quire.common.messages import StepResult, pack
from quire.common.sampling import SamplingParams
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--waiting", type=int, default=0, help="requests that wait for a row, each of another tenant")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--depth", type=int, default=2)
    options = parser.parse_args()
    print(f"microseconds, median (1st to 99th percentile) of {options.steps - 8} steps at depth {options.depth}")
    print(f"{'rows':>6} {'schedule':>22} {'update':>22} {'both':>22}")
    for num_rows in options.rows:
        schedules, updates = measure(num_rows, options.waiting, options.steps, options.depth)
        both = [a + b for a, b in zip(schedules, updates, strict=True)]
        print(f"{num_rows:>6} {spread(schedules):>22} {spread(updates):>22} {spread(both):>22}")


def spread(times: list[float]) -> str:
    percentiles = statistics.quantiles(times, n=100)
    return f"{statistics.median(times):.0f} ({percentiles[0]:.0f} to {percentiles[-1]:.0f})"


if __name__ == "__main__":
    main()

"""Latency and throughput over HTTP, of any OpenAI-compatible server, or of several in turns.

    python benchmarks/serve.py --url quire=127.0.0.1:8000 --clients 1 16 64
    python benchmarks/serve.py --url quire=127.0.0.1:8000 --rate 2 4 8 --work sharegpt --ttft-ms 500 --itl-ms 50
    python benchmarks/serve.py --clients 1 64 --rounds 5 --start 'quire=quire serve MODEL --port {port}'
        --start 'vllm=PYTHON -m vllm.entrypoints.openai.api_server --model MODEL --port {port}'

A server runs already (--url) or is started here (--start) and stopped while another is measured. Load is closed
(--clients: so many, each asks again when it has its answer) or open (--rate: requests a second, at the times of a Poisson
process, whatever became of those before; a latency counts from that time). Every request streams, greedily and past any
end of sequence. Tokens are counted as the server's `usage` says. The client reads events as bytes: what it used of the
cores is in the table. With several rounds the figures are medians over them; ratios are of runs of one round.

A request is good when its first token came within --ttft-ms, and its tokens within --itl-ms of each other on the average.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from quire.benchmarks import drawing, report, traffic
from quire.benchmarks.engines import Turns, quiet
from quire.benchmarks.figures import percentile, ratios, spread
from quire.benchmarks.load import PERCENTS, Objective, Run, Target, closed, opened
from quire.benchmarks.servers import at, started
from quire.benchmarks.traffic import Job

WORK = ("random", "words", "shared-prefix", "sharegpt", "conversations")
PER_CLIENT, AT_LEAST = 8, 24  # requests of a closed load
OPEN_S = 20.0  # an open one
WARM_UP = 64  # clients, before a load's first round: some engines compile what a batch of another size needs
OURS = "quire"

Runs = dict[str, dict[str, list[Run]]]  # load -> server -> rounds


def main() -> None:
    options = parse()
    with ExitStack() as stack:
        targets, turns = servers(options, stack)
        runs = measure(targets, turns, options)
    goal = objective(options)
    text = table(runs, goal)
    print(f"\n{text}")
    if options.out:
        told = {
            load: {n: [run.summary(goal) for run in found] for n, found in one.items()} for load, one in runs.items()
        }
        report.write(options.out, {"loads": told, "idle_cpu_s": turns.stolen_s}, text)
        picture(runs, options.out.with_suffix(".png"))
    if any(run.errors for one in runs.values() for found in one.values() for run in found):
        raise SystemExit(1)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", metavar="NAME=URL", nargs="+", default=[])
    add("--start", metavar="NAME=COMMAND", action="append", default=[], help="{port} stands for a free port")
    add("--model", help="by default the first that a server names")
    add("--clients", type=int, nargs="+", default=[])
    add("--rate", type=float, nargs="+", default=[])
    add(
        "--requests", type=int, help=f"of each run; by default {PER_CLIENT} for each client or {OPEN_S:.0f} s of a rate"
    )
    add("--rounds", type=int, default=1)
    add("--work", choices=WORK, default="random")
    add("--prompt", type=int, default=128, help="tokens (of words and conversations: words)")
    add("--output", type=int, default=64)
    add("--share", type=float, default=0.9, help="of the prompt that is the same for all, of shared-prefix")
    add("--turns", type=int, default=4, help="of each of the conversations")
    add("--longest", type=int, default=2048, help="prompt and output together, of sharegpt")
    add("--lengths", type=Path, help="JSON: [[prompt, output], ...] or ShareGPT's conversations, in place of the above")
    add("--ttft-ms", type=float, help="service objective")
    add("--itl-ms", type=float, help="service objective")
    add("--seed", type=int, default=0)
    add("--lock", type=Path, help="a file whose lock is held alone during each round")
    add("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    options = parser.parse_args(argv)
    if not options.url and not options.start:
        parser.error("name a server: --url or --start")
    if not options.clients and not options.rate:
        options.clients = [1, 16, 64]
    return options


def objective(options: argparse.Namespace) -> Objective | None:
    """None when nothing is asked for."""
    if options.ttft_ms is None and options.itl_ms is None:
        return None
    seconds = [float("inf") if ms is None else ms / 1000 for ms in (options.ttft_ms, options.itl_ms)]
    return Objective(*seconds)


def servers(options: argparse.Namespace, stack: ExitStack) -> tuple[dict[str, Target], Turns]:
    targets, turns = {}, Turns()
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    stack.callback(turns.wake)
    for word in options.start:
        name, _, command = word.partition("=")
        print(f"{name}: starting", file=sys.stderr, flush=True)
        targets[name], pid = stack.enter_context(started(name, command, logs / name))
        stack.callback(turns.wake)
        turns.add(name, pid, stoppable=name != OURS)
        with turns.only(name):
            pass
    for word in options.url:
        name, _, url = word.partition("=")
        targets[name] = at(url, options.model)
    return targets, turns


def jobs(options: argparse.Namespace, seed: object) -> Iterator[Job]:
    lengths = traffic.same_length(options.prompt, options.output)
    if options.lengths:
        lengths = traffic.from_file(options.lengths)
    elif options.work == "sharegpt":
        lengths = traffic.like_sharegpt(seed, options.longest)
    match options.work:
        case "words":
            return traffic.words(lengths, seed)
        case "shared-prefix":
            return traffic.shared_prefix(lengths, options.share, seed)
        case "conversations":
            return traffic.conversations(lengths, options.turns, seed)
        case _:
            return traffic.random_ids(lengths, seed)


def measure(targets: dict[str, Target], turns: Turns, options: argparse.Namespace) -> Runs:
    loads = {f"{n} client{'s' * (n > 1)}": partial(one_closed, options, n) for n in options.clients}
    loads |= {f"{rate:g}/s": partial(one_open, options, rate) for rate in options.rate}
    runs: Runs = {load: {name: [] for name in targets} for load in loads}
    for load, act in loads.items():
        for number in range(options.rounds):
            names = list(targets)
            first = number % len(names)
            with quiet(options.lock):
                for name in names[first:] + names[:first]:
                    with turns.only(name):
                        if not number:
                            warm = jobs(options, f"warm-up/{options.seed}/{load}")
                            closed(targets[name], warm, WARM_UP, 2 * WARM_UP, {})
                        run = act(targets[name], number)
                    runs[load][name].append(run)
                    told = f"{run.tokens_per_s:,.0f} tokens/s, {len(run.errors)} errors"
                    print(f"{load}, round {number + 1}/{options.rounds}, {name}: {told}", file=sys.stderr, flush=True)
    return runs


def one_closed(options: argparse.Namespace, clients: int, target: Target, number: int) -> Run:
    requests = options.requests or max(AT_LEAST, PER_CLIENT * clients)
    return closed(target, jobs(options, f"{options.seed}/{clients}/{number}"), clients, requests, {})


def one_open(options: argparse.Namespace, rate: float, target: Target, number: int) -> Run:
    seed = f"{options.seed}/{rate}/{number}"
    count = options.requests or max(AT_LEAST, round(OPEN_S * rate))
    return opened(target, jobs(options, seed), traffic.poisson(rate, count, seed), {})


def table(runs: Runs, goal: Objective | None) -> str:
    rows: list[list[Any]] = []
    for load, one in runs.items():
        reference = next(iter(one))
        for name, found in one.items():
            row: list[Any] = [load, name, spread([run.tokens_per_s for run in found]).told()]
            row.append(f"{middle(len(run.well) / run.seconds for run in found):,.1f}")
            row += [in_ms(found, values) for values in (Run.ttfts, Run.per_token, Run.gaps, Run.wholes)]
            row.append(sum(len(run.errors) for run in found))
            row.append(f"{100 * middle(run.client_cpu_s / run.seconds for run in found):.0f} %")
            if goal:
                row.append(f"{middle(run.goodput(goal) for run in found):.2f}")
            if len(one) > 1:
                row.append("" if name == reference else against(one[reference], found))
            rows.append(row)
    head = ["load", "server", "output tokens/s", "requests/s", "TTFT, ms", "time per token, ms", "gap, ms", "whole, ms"]
    head += ["errors", "client's share of a core", *(["good/s"] if goal else [])]
    several = len(next(iter(runs.values()))) > 1
    first = next(iter(next(iter(runs.values()))))
    head += [f"{first} over it: tokens/s, median time per token"] if several else []
    return report.table(head, rows) + "\n\nLatencies: 50th, 90th and 99th percentile."


def middle(values: Iterator[float]) -> float:
    return statistics.median(values)


def in_ms(found: Sequence[Run], values: Callable[[Run], list[float]]) -> str:
    return " / ".join(short(middle(1000 * percentile(values(run), p) for run in found)) for p in PERCENTS)


def short(value: float) -> str:
    """Three digits, or as many as it has before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def against(ours: Sequence[Run], theirs: Sequence[Run]) -> str:
    rates = ratios([run.tokens_per_s for run in ours], [run.tokens_per_s for run in theirs])
    times = ratios(*([percentile(run.per_token(), 50) for run in runs] for runs in (ours, theirs)))
    return f"{spread(rates).told(2)}, {spread(times).told(2)}"


def picture(runs: Runs, path: Path) -> None:
    """A row for each load: how many requests had their first token, and tokens their next one, within how long."""
    measured = ((Run.ttfts, "time to first token, ms"), (Run.gaps, "time between events, ms"))
    with drawing.figure(path, columns=2, rows=len(runs)) as panels:
        for row, (load, one) in enumerate(runs.items()):
            for column, (values, name) in enumerate(measured):
                series = {n: [1000 * v for run in found for v in values(run)] for n, found in one.items()}
                drawing.shares(panels[2 * row + column], series, name)
                panels[2 * row + column].set_title(load)


if __name__ == "__main__":
    main()

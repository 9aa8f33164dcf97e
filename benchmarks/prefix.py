"""What the prefix cache is worth: time to the first token when 0, 50 or 90 % of each prompt is the same for all.

    python benchmarks/prefix.py [--model demo] [--share 0 0.5 0.9] [--prompt 1024] [--clients 32] [--rounds 3]
        [--out benchmarks/results/prefix] [-- FLAGS OF launch/serve.py]

Two servers are started, with the cache and without it. In each round, for each share, both are asked by CLIENTS at once,
one after the other; the shared part is new in each round, and was sent once before. The ratio is with the cache over without
it, of the medians of one round.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from quire.benchmarks import drawing, report, traffic
from quire.benchmarks.engines import quiet
from quire.benchmarks.figures import percentile, ratios, spread
from quire.benchmarks.load import Run, Target, closed
from quire.benchmarks.servers import started

SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "serve.py"
KINDS = {"with the cache": "--enable-prefix-caching", "without": "--no-enable-prefix-caching"}

Runs = dict[float, dict[str, list[Run]]]  # share -> kind -> rounds


def main() -> None:
    options = parse()
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        targets: dict[str, Target] = {}
        for kind, flag in KINDS.items():
            words = [sys.executable, str(SCRIPT), "--model", options.model, "--port", "{port}", flag, *options.flags]
            targets[kind], _ = stack.enter_context(started(kind, " ".join(words), logs / "log"))
        runs = measure(targets, options)
    text = table(runs)
    print(f"\n{text}")
    if options.out:
        told = {
            f"{share:g}": {k: [run.summary(None) for run in found] for k, found in one.items()}
            for share, one in runs.items()
        }
        report.write(options.out, {"shares": told}, text)
        picture(runs, options.out.with_suffix(".png"))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--share", type=float, nargs="+", default=[0.0, 0.5, 0.9])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--output", type=int, default=4)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", type=Path, help="a file whose lock is held alone during each round")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    parser.add_argument("flags", nargs="*", help="flags of launch/serve.py, behind --")
    return parser.parse_args(argv)


def measure(targets: dict[str, Target], options: argparse.Namespace) -> Runs:
    runs: Runs = {share: {kind: [] for kind in targets} for share in options.share}
    for number in range(options.rounds):
        for share, one in runs.items():
            with quiet(options.lock):
                for kind, target in targets.items():
                    one[kind].append(run := burst(target, share, number, options))
                    told = f"{1000 * percentile(run.ttfts(), 50):,.0f} ms"
                    print(f"round {number + 1}, {share:.0%} shared, {kind}: {told}", file=sys.stderr, flush=True)
    return runs


def burst(target: Target, share: float, number: int, options: argparse.Namespace) -> Run:
    """All clients at once, behind one that has brought the shared part."""
    lengths = traffic.same_length(options.prompt, options.output)
    jobs = traffic.shared_prefix(lengths, share, f"{share}/{number}")
    closed(target, islice(jobs, 1), 1, 1, {})
    run = closed(target, jobs, options.clients, options.clients, {})
    if run.errors:
        raise SystemExit(f"{len(run.errors)} requests failed: {run.errors[0]}")
    return run


def table(runs: Runs) -> str:
    rows = []
    for share, one in runs.items():
        medians = {kind: [1000 * percentile(run.ttfts(), 50) for run in found] for kind, found in one.items()}
        found_share = statistics.median(run.summary(None)["cached_share"] for run in one["with the cache"])
        ratio = spread(ratios(medians["with the cache"], medians["without"]))
        rows.append(
            [f"{share:.0%}", f"{found_share:.0%}", *(spread(m).told() for m in medians.values()), ratio.told(2)]
        )
    return report.table(
        ["shared", "found in the cache", *(f"{kind}: median TTFT, ms" for kind in KINDS), "ratio"], rows
    )


def picture(runs: Runs, path: Path) -> None:
    with drawing.figure(path, columns=len(runs)) as panels:
        for panel, (share, one) in zip(panels, runs.items(), strict=True):
            series = {kind: [1000 * t for run in found for t in run.ttfts()] for kind, found in one.items()}
            drawing.shares(panel, series, "time to first token, ms")
            panel.set_title(f"{share:.0%} shared")


if __name__ == "__main__":
    main()

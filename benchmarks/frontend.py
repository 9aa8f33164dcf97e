"""How many tokens and requests a second one frontend process carries, for each core that it is given.

    python benchmarks/frontend.py [--streams 64] [--step-ms 0 4 8] [--seconds 5] [--rounds 3] [--out benchmarks/results/frontend]

A frontend as it is shipped stands before a scheduler that costs nothing (stand_in.py) and answers real HTTP clients. The
figures are per second of the frontend's own CPU time, user and kernel, all its threads: what scheduler and clients take
of the cores does not count. Streams: STREAMS clients, 128 tokens each, ever again, with steps of so many milliseconds; at
0 the scheduler does not wait, and several tokens may share an event. Short requests: a text of a dozen words, one token, no stream.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quire.benchmarks import drawing, report, traffic
from quire.benchmarks.engines import cpu_seconds, quiet
from quire.benchmarks.figures import spread
from quire.benchmarks.load import Run, Target, closed
from quire.benchmarks.servers import started

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "launch" / "frontend.py"
PROMPT, OUTPUT, WORDS = 32, 128, 12


@dataclass(frozen=True, slots=True)
class Carried:
    run: Run
    cpu_s: float  # of the frontend

    @property
    def tokens(self) -> float:
        """Streamed tokens for each second of a core."""
        return sum(answer.tokens for answer in self.run.well) / self.cpu_s

    @property
    def events(self) -> float:
        return sum(len(answer.times) for answer in self.run.well) / self.cpu_s

    @property
    def requests(self) -> float:
        return len(self.run.well) / self.cpu_s

    @property
    def busy(self) -> float:
        """Share of one core."""
        return self.cpu_s / self.run.seconds


class Bench:
    """A frontend, its scheduler and its clients."""

    def __init__(
        self, target: Target, pid: int, stand_in: "subprocess.Popen[str]", options: argparse.Namespace
    ) -> None:
        self.target, self._pid, self._stand_in = target, pid, stand_in
        self._options = options

    def streams(self, step_ms: float, number: int) -> Carried:
        self._step_takes(step_ms)
        jobs = traffic.random_ids(traffic.same_length(PROMPT, OUTPUT), number)
        return self._loaded(jobs, self._options.streams, {})

    def short(self, number: int) -> Carried:
        self._step_takes(0)
        jobs = traffic.words(traffic.same_length(WORDS, 1), number)
        return self._loaded(jobs, self._options.streams, {"stream": False})

    def _step_takes(self, step_ms: float) -> None:
        assert self._stand_in.stdin
        self._stand_in.stdin.write(f"{step_ms}\n")

    def _loaded(self, jobs: Iterator[traffic.Job], clients: int, extra: dict[str, object]) -> Carried:
        """As many requests as take about the seconds that were asked for."""
        trial = closed(self.target, jobs, clients, 4 * clients, extra)
        count = max(round(4 * clients * self._options.seconds / trial.seconds), 4 * clients)
        before = cpu_seconds(self._pid)
        run = closed(self.target, jobs, clients, count, extra)
        carried = Carried(run, cpu_seconds(self._pid) - before)
        if run.errors:
            raise SystemExit(f"{len(run.errors)} of {count} requests failed: {run.errors[0]}")
        return carried


@contextmanager
def bench(options: argparse.Namespace) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="quire-", dir="/tmp") as folder:  # the path of a socket must be short
        address = f"ipc://{folder}"
        command = [sys.executable, str(HERE / "stand_in.py"), address]
        with subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1) as stand_in:
            try:
                command = [sys.executable, str(SCRIPT), "--scheduler", address, "--port", "{port}"]
                with started("frontend", " ".join(command), Path(folder) / "log") as (target, pid):
                    yield Bench(target, pid, stand_in, options)
            finally:
                stand_in.terminate()


def main() -> None:
    options = parse()
    streams: dict[float, list[Carried]] = {step_ms: [] for step_ms in options.step_ms}
    short: list[Carried] = []
    with bench(options) as made:
        for number in range(options.rounds):
            with quiet(options.lock):
                for step_ms, found in streams.items():
                    found.append(made.streams(step_ms, number))
                    tell(f"round {number + 1}, steps of {step_ms:g} ms: {found[-1].tokens:,.0f} tokens/s a core")
                short.append(made.short(number))
                tell(f"round {number + 1}, short requests: {short[-1].requests:,.0f}/s a core")
    text = table(streams, short, options.streams)
    print(f"\n{text}")
    if options.out:
        result = {
            "streams": {f"{step_ms:g}": [told(one) for one in found] for step_ms, found in streams.items()},
            "short": [told(one) for one in short],
        }
        report.write(options.out, result, text)
        picture(streams, short, options.out.with_suffix(".png"))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--step-ms", type=float, nargs="+", default=[0.0, 4.0, 8.0])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", type=Path, help="a file whose lock is held alone during each round")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    return parser.parse_args(argv)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def told(one: Carried) -> dict[str, object]:
    per_core = {"tokens": one.tokens, "events": one.events, "requests": one.requests}
    return {"per_core_s": per_core, "busy": one.busy, "seen": one.run.summary(None)}


def table(streams: dict[float, list[Carried]], short: list[Carried], clients: int) -> str:
    def row(name: str, found: list[Carried], per_core: list[float]) -> list[object]:
        rate = statistics.median(one.run.tokens_per_s for one in found)
        merged = statistics.median(one.tokens / one.events for one in found)
        busy = statistics.median(one.busy for one in found)
        return [name, spread(per_core).told(), f"{merged:.2f}", f"{rate:,.0f}", f"{100 * busy:.0f} %"]

    rows = [
        row(f"{clients} streams, tokens, steps of {step_ms:g} ms", found, [one.tokens for one in found])
        for step_ms, found in streams.items()
    ]
    rows.append(row("short requests", short, [one.requests for one in short]))
    head = ["work", "a second of one core", "tokens an event", "tokens/s seen", "core in use"]
    return report.table(head, rows)


def picture(streams: dict[float, list[Carried]], short: list[Carried], path: Path) -> None:
    with drawing.figure(path, columns=2) as (left, right):
        kinds = {
            f"steps of\n{step_ms:g} ms": spread([one.tokens for one in found]) for step_ms, found in streams.items()
        }
        drawing.bars(left, kinds)
        left.set_ylabel("tokens a second of one core")
        drawing.bars(right, {"one token,\nno stream": spread([one.requests for one in short])})
        right.set_ylabel("requests a second of one core")


if __name__ == "__main__":
    main()

"""From `exec` to the first token, and what each process then weighs.

    python benchmarks/startup.py [--runs 5] [--start 'NAME=COMMAND'] [--out benchmarks/results/startup] [-- FLAGS OF launch/serve.py]

Starts the server RUNS times after one warm-up, asks for one token the moment that it is ready, and prints the marks in seconds
since exec, then the resident memory of each process after that first token. With --start other servers take turns with it
({port} in COMMAND is where they are to listen); where there is no /ready, /health says so.
"""

import argparse
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from quire.benchmarks import drawing, report
from quire.benchmarks.engines import ended, family, quiet
from quire.benchmarks.figures import Spread, spread
from quire.benchmarks.servers import free_port

OURS = "quire"
SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "serve.py"
MARKS = ("http", "ready", "first token")
IMPORT = "import quire"
PARTS = ("frontend", "scheduler", "worker")
POLL_S = 0.005

Spreads = dict[str, dict[str, Spread]]  # server -> mark -> seconds


def main() -> None:
    options = parse()
    ours = [sys.executable, str(SCRIPT), "--port", "{port}", *options.flags]
    commands = {
        OURS: ours,
        **{name: shlex.split(command) for name, _, command in (w.partition("=") for w in options.start)},
    }
    marks: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    sizes: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(options.runs + 1):
        for name, command in commands.items():
            with quiet(options.lock):
                seen, weighs = one_run(name, command)
                if name == OURS:
                    seen[IMPORT] = import_seconds()
            told = ", ".join(f"{mark} {seconds:.2f} s" for mark, seconds in seen.items())
            print(f"{name}, run {number or 'to warm up'}: {told}", file=sys.stderr, flush=True)
            if number:
                marks[name].append(seen)
                sizes[name].append(weighs)
    spreads = {name: {mark: spread([run[mark] for run in runs]) for mark in runs[0]} for name, runs in marks.items()}
    memory = {
        name: {part: max(run.get(part, 0.0) for run in runs) for part in runs[-1]} for name, runs in sizes.items()
    }
    text = table(spreads, memory)
    print(f"\n{text}")
    if options.out:
        report.write(options.out, {"seconds": marks, "resident_mb": memory}, text)
        with drawing.figure(options.out.with_suffix(".png"), columns=len(spreads)) as panels:
            for panel, (name, found) in zip(panels, spreads.items(), strict=True):
                drawing.bars(panel, {mark: found[mark] for mark in MARKS}, digits=1)
                panel.set_title(name)
                panel.set_ylabel("seconds since exec")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--start", metavar="NAME=COMMAND", action="append", default=[])
    parser.add_argument("--lock", type=Path, help="a file whose lock is held alone during each round")
    parser.add_argument("--out", type=Path, help="writes OUT.json, OUT.txt and OUT.png")
    parser.add_argument("flags", nargs="*", help="flags of launch/serve.py, behind --")
    return parser.parse_args(argv)


def one_run(name: str, command: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Marks in seconds since exec; resident megabytes by process."""
    port = free_port()
    start = time.perf_counter()
    words = [word.replace("{port}", str(port)) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            marks = {"http": wait_for(http, "/health", name, process) - start}
            path = "/health" if http.get("/ready").status_code == 404 else "/ready"
            marks["ready"] = wait_for(http, path, name, process) - start
            model = http.get("/v1/models").json()["data"][0]["id"]
            http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1}).raise_for_status()
            marks["first token"] = time.perf_counter() - start
        return marks, resident(process.pid)
    finally:
        with ended(process):
            process.send_signal(signal.SIGTERM)


def wait_for(http: httpx.Client, path: str, name: str, process: "subprocess.Popen[bytes]") -> float:
    """Seconds on the clock at which `path` first answered 200."""
    while True:
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with exit code {process.returncode}")
        with suppress(httpx.HTTPError):
            if http.get(path).status_code == 200:
                return time.perf_counter()
        time.sleep(POLL_S)


def resident(pid: int) -> dict[str, float]:
    """Of each process by its part, or by its name where it is none of ours; of several the largest."""
    sizes: dict[str, float] = {}
    for process in family(pid):
        line = " ".join(process.cmdline())
        part = next((part for part in PARTS if f"quire.launch.{part}" in line), process.name())
        sizes[part] = max(sizes.get(part, 0.0), process.memory_info().rss / 1e6)
    return sizes


def import_seconds() -> float:
    """What `import quire` adds to a bare interpreter."""
    code = "import time; t = time.perf_counter(); import quire; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def table(spreads: Spreads, memory: dict[str, dict[str, float]]) -> str:
    rows: list[list[Any]] = [
        [name, mark, f"{seconds.low:.3f}", f"{seconds.median:.3f}", f"{seconds.high:.3f}"]
        for name, found in spreads.items()
        for mark, seconds in found.items()
    ]
    sizes = [[name, part, f"{size:.0f}"] for name, found in memory.items() for part, size in found.items()]
    marks = report.table(["server", "mark, seconds since exec", "min", "median", "max"], rows)
    return f"{marks}\n\n{report.table(['server', 'process', 'resident, MB'], sizes)}"


if __name__ == "__main__":
    main()

"""From `exec` to the first token, and what each process then weighs.

    python benchmarks/startup.py [--runs 5] [--json FILE] [-- FLAGS OF launch/serve.py]

Starts the server RUNS times after one warm-up, asks for one token the moment that /ready is 200, and prints minimum, median
and maximum of each mark in seconds since exec, then the resident memory of each process after that first token.
"""

import argparse
import json
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
MARKS = ("http", "ready", "first token", "import quire")
PARTS = ("frontend", "scheduler", "worker")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(http: httpx.Client, path: str, process: "subprocess.Popen[bytes]") -> float:
    """Seconds on the clock at which `path` first answered 200."""
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}")
        try:
            if http.get(path).status_code == 200:
                return time.perf_counter()
        except httpx.HTTPError:
            pass
        time.sleep(0.005)


def one_run(flags: list[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Marks in seconds since exec; resident megabytes by part."""
    port = free_port()
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), "--port", str(port), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            marks = {
                "http": wait_for(http, "/health", process) - start,
                "ready": wait_for(http, "/ready", process) - start,
            }
            model = http.get("/v1/models").json()["data"][0]["id"]
            http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1}).raise_for_status()
            marks["first token"] = time.perf_counter() - start
        return marks, resident(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def resident(pid: int) -> dict[str, float]:
    sizes: dict[str, float] = {}
    for child in psutil.Process(pid).children(recursive=True):
        part = next((p for p in PARTS if f"quire.launch.{p}" in " ".join(child.cmdline())), None)
        if part:
            sizes[part] = max(sizes.get(part, 0.0), child.memory_info().rss / 1e6)
    return sizes


def import_seconds() -> float:
    """What `import quire` adds to a bare interpreter."""
    code = "import time; t = time.perf_counter(); import quire; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("flags", nargs="*", help="flags of launch/serve.py, behind --")
    options = parser.parse_args()
    runs = []
    for i in range(options.runs + 1):
        marks, sizes = one_run(options.flags)
        marks["import quire"] = import_seconds()
        print(
            f"run {i}{' (warm-up)' if not i else ''}: " + ", ".join(f"{k} {v:.2f} s" for k, v in marks.items()),
            flush=True,
        )
        if i:
            runs.append((marks, sizes))
    table = {mark: sorted(marks[mark] for marks, _ in runs) for mark in MARKS}
    memory = {part: max(sizes[part] for _, sizes in runs) for part in PARTS}
    print("\n| mark | min | median | max |\n|---|---|---|---|")
    for mark, values in table.items():
        print(f"| {mark}, s | {values[0]:.2f} | {statistics.median(values):.2f} | {values[-1]:.2f} |")
    print("\n| process | resident, MB |\n|---|---|")
    for part, size in memory.items():
        print(f"| {part} | {size:.0f} |")
    if options.json:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
        command = " ".join(["benchmarks/startup.py", "--runs", str(options.runs), *options.flags])
        result = {"command": command, "commit": commit, "machine": machine, "seconds": table, "resident_mb": memory}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

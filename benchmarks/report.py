"""What stands beside every figure: how it was taken, of which state of the code, on what machine."""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


def facts() -> dict[str, str]:
    """Of this run: command, commit, machine."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    commit = _git("rev-parse", "HEAD") + (" and changes" if _git("status", "--porcelain", "-uno") else "")
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
    return {"command": shortened(" ".join([str(script), *sys.argv[1:]])), "commit": commit, "machine": machine}


def shortened(command: str) -> str:
    """Of absolute paths only the end: the rest is of one machine."""
    return re.sub(r"(?<![\w./-])/(?:[^\s:=/]+/)+", "", command)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def complaint(check: Callable[[], object]) -> str:
    """What `check` has to say against it; a measurement is worth keeping all the same."""
    try:
        check()
    except AssertionError as error:
        return f"afterwards: {error}"
    return ""


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(out: Path, result: dict[str, Any], text: str) -> None:
    """`out` with .json and .txt behind it: all of it, and what a reader looks at."""
    told = facts()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({**told, **result}, indent=1) + "\n")
    lines = [f"{name + ':':<9}{value}" for name, value in told.items()]
    out.with_suffix(".txt").write_text("\n".join([*lines, "", text]) + "\n")

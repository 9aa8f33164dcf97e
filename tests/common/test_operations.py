"""What docs/operations.md says of numbers and log lines is what the code says."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.common.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
TIMERS = PAGE.partition("## Timers")[2]
PACKAGES = ("common", "frontend", "launch", "scheduler", "worker")


def constants(path: str) -> dict[str, Any]:
    """Names with a number for a value, of a module and of its classes."""
    found: dict[str, Any] = {}
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        match node:
            case ast.Assign(targets=[ast.Name(name)], value=ast.Constant(value)):
                found[name] = value
            case ast.Assign(targets=[ast.Tuple(names)], value=ast.Tuple(values)):
                pairs = zip(names, values, strict=True)
                found |= {n.id: v.value for n, v in pairs if isinstance(n, ast.Name) and isinstance(v, ast.Constant)}
            case ast.AnnAssign(target=ast.Name(name), value=ast.Constant(value)):
                found[name] = value
    return found


def options() -> dict[str, Any]:
    groups = msgspec.structs.asdict(EngineConfig()).values()
    return {name.replace("_", "-"): value for group in groups for name, value in msgspec.structs.asdict(group).items()}


def rows() -> Iterator[tuple[str, str]]:
    """Number and source of each timer that names one."""
    yield from re.findall(r"^\|[^|]+\| (\d+(?:\.\d+)?)[^|]*\| ([^|]+) \|$", TIMERS, re.MULTILINE)


@pytest.mark.parametrize(("number", "source"), rows(), ids=lambda text: re.sub(r"\W+", "-", text).strip("-"))
def test_timers_are_what_the_code_has(number: str, source: str) -> None:
    if found := re.match(r"`(\w+)` in `([\w/]+\.py)`", source):
        assert constants(found[2])[found[1]] == float(number)
    elif found := re.match(r"`--([a-z-]+)`", source):
        assert options()[found[1]] == float(number)
    else:
        assert re.fullmatch(r"`[\w/]+\.py`", source)


def test_options_that_are_named_exist() -> None:
    of_scripts = {"--config", "--listen", "--scheduler", "--rank", "--curve-keys", "--insecure", "--run-dir", "--pid"}
    short = {"--tp"}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", PAGE))
    assert named - of_scripts - short <= {f"--{name}" for name in options()}


SAID = """
likely for lack of memory
; it is started again
: the workers form another group
ready again after
the scheduler is another, or knows this process no more
open sequences again
recovered in
a bug in the scheduler ends it
requests of it were freed
no sign of life for
stalled:
the scheduler has been silent for
was silent for
and was killed
was killed, the engine being stalled
a step did not fit the device's memory: from now on steps have at most
this worker cannot go on
what runs is dropped until the scheduler forms another group
left its group:
a step failed:
a request failed:
times in a row while it computed this request; it is not tried again
the model's logits are NaN
is the limit (--max-restarts)
; the engine ends
refused a peer with another key than this launch's
cannot talk to
it does not know the keys of this process
only one of the two has keys
install the same version of quire
dropped a frame (
connections at most: this process may have
files open (ulimit -n)
places are taken
a client took nothing of its stream for
The keys of before stay
"""


@pytest.mark.parametrize("words", SAID.strip().splitlines())
def test_log_lines_are_those_of_the_code(words: str) -> None:
    code = " ".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    assert words in PAGE
    assert words in code

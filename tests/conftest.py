"""Fixtures that several folders share. Models are built once per run, servers once per module that needs one."""

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import build_checkpoint, load_oracle

# Read when torch loads. The threads of two processes that compute on the same cores wait for each other most of the time,
# and tiny models gain nothing by them. What quire starts has as many as its options say.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="The same tests with the counts that a release is held to: hours, not minutes.",
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two, since tests wait half of the time. One file, or a part of one, begins sooner without; --long wants the host alone."""
    return 2 if all(Path(argument).is_dir() for argument in config.args) and not config.getoption("--long") else 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: what another case shows as well, in less time; runs with --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of it a test does."""

    kills: int = 4
    clients: int = 64  # that hang up at once
    connections: int = 1000  # that are open and idle
    frames: int = 2000  # to each socket
    requests: int = 600  # of which nothing may be left


LONG = Sizes(kills=200, clients=500, connections=10_000, frames=100_000, requests=20_000)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In the place of pytest's, which is deeper than the path of a socket may be."""
    with tempfile.TemporaryDirectory(prefix="tests-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def sizes(pytestconfig: pytest.Config) -> Sizes:
    """Small by default, LONG with --long."""
    return LONG if pytestconfig.getoption("--long") else Sizes()


@pytest.fixture(scope="session")
def checkpoints_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def checkpoint(checkpoints_folder: Path) -> Callable[[str], Path]:
    """checkpoint("qwen3") is the directory of that tiny random model (tests/checkpoints.py names them)."""
    return lambda name: build_checkpoint(name, checkpoints_folder)


@pytest.fixture(scope="session")
def oracle() -> Callable[[Path], Any]:
    """oracle(path) is the transformers model of a directory, loaded once."""
    loaded: dict[Path, Any] = {}

    def load(path: Path) -> Any:
        if path not in loaded:
            loaded[path] = load_oracle(path)
        return loaded[path]

    return load

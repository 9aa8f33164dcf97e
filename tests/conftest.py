"""Fixtures that several folders share. Models are built once per run, servers once per module that needs one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .checkpoints import build_checkpoint, load_oracle


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

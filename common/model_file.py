"""A model's JSON files, read with types and ranges: what is malformed is named, never met later as a TypeError."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError

LARGEST_COUNT = 2**31 - 1
LARGEST_FILE = 64 << 20  # bytes; the index of the largest models has a few millions


def read_text(file: Path) -> str:
    """Raises ConfigError for a file that is not there, is not UTF-8, or is larger than any of its kind."""
    try:
        if (size := file.stat().st_size) > LARGEST_FILE:
            raise ConfigError(f"{file}: {size} bytes; at most {LARGEST_FILE} are read")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


class ModelFile(dict[str, Any]):
    """A JSON object of a model directory, or an object in it. `where` names it in errors; a missing key is an error."""

    def __init__(self, values: Any, where: str = "config.json") -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: expected an object, found {values!r:.80}")
        super().__init__(values)
        self.where = where

    @classmethod
    def read(cls, file: Path) -> "ModelFile":
        """Raises ConfigError for a file that is not there or not a JSON object."""
        try:
            return cls(json.loads(read_text(file)), str(file))
        except (ValueError, RecursionError) as error:  # ValueError: not JSON
            raise ConfigError(f"{file}: cannot be read: {error}") from None

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"{self.where}: {key} is missing")

    def refusal(self, key: str, value: object, *, known: Sequence[str]) -> ConfigError:
        return ConfigError(f"{self.where}: {key} {value!r:.200} is not supported; known are: {', '.join(known)}")

    def part(self, key: str) -> "ModelFile":
        """The object at `key`; an empty one when it is absent or null."""
        value = self.get(key)
        return ModelFile({} if value is None else value, f"{self.where}: {key}")

    def count(self, key: str, default: int | None = None, *, most: int = LARGEST_COUNT) -> int:
        """A positive integer; `default` stands for an absent or null one."""
        value = default if default is not None and self.get(key) is None else self[key]
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"{self.where}: {key} must be an integer from 1 to {most}, got {value!r:.80}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, likewise."""
        value = default if default is not None and self.get(key) is None else self[key]
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise ConfigError(f"{self.where}: {key} must be a positive number, got {value!r:.80}")
        return float(value)

    def flag(self, key: str) -> bool:
        """A boolean; absent and null are false."""
        value = self.get(key)
        if value not in (None, False, True) or type(value) in (int, float):
            raise ConfigError(f"{self.where}: {key} must be true or false, got {value!r:.80}")
        return bool(value)

    def require(self, key: str, known: Sequence[str], default: str | None = None) -> str:
        """One of the `known` values."""
        value = self.get(key, default) if default is not None else self[key]
        if value not in known:
            raise self.refusal(key, value, known=known)
        return str(value)

    def names(self, key: str) -> list[str]:
        """A list of strings; empty when it is absent or null."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            raise ConfigError(f"{self.where}: {key} must be a list of names, got {value!r:.80}")
        return value or []

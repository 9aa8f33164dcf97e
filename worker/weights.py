"""Where weights come from: safetensors of which each rank reads only its slice, or random numbers.

Tensors are pulled: a layer asks for what it needs, by name, with the shape it must have. Whatever is missing or does
not fit is a ConfigError that names file and tensor.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import ConfigError
from ..common.model_file import read_text
from .models.spec import Cat, Names
from .parallel import Group, Part

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DERIVED = "rotary_emb.inv_freq"  # old checkpoints hold it; it follows from config.json

OnBytes = Callable[[int, int], None]  # (bytes of the model done, of all)


class Source(Protocol):
    def read(self, name: str, parts: Sequence[Part]) -> Tensor:
        """This rank's part of tensor `name`, one `Part` per dimension, in any float type on any device."""
        ...


class Checkpoint:
    """The safetensors of a directory. Raises ConfigError when a file is missing, truncated or no safetensors, and when it
    is not clear which tensor is meant.

    What a file says of itself is not believed: names are shown as literals, and a shard outside the directory is not
    opened (a link in it is its owner's choice).
    """

    def __init__(self, path: Path, on_bytes: OnBytes | None = None, *, holds: torch.dtype | None = None) -> None:
        """`holds`: look for weights that are no finite number in this type, and name their tensors in `faulty`."""
        self.path = path
        self.faulty: list[str] = []
        self._holds = holds
        self._on_bytes = on_bytes
        self._files: dict[str, Any] = {}
        self.home = self._indexed() if (path / INDEX).is_file() else self._found()
        self._unread = set(self.home)
        self._total = sum(file.stat().st_size for file in map(self.path.joinpath, set(self.home.values())))
        self._done = 0

    def read(self, name: str, parts: Sequence[Part]) -> Tensor:
        if name not in self.home:
            raise ConfigError(f"{self.path}: the checkpoint has no tensor {name}; config.json asks for it")
        file = self.home[name]
        try:
            stored = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ConfigError(f"{self.path / file}: tensor {name} cannot be read: {str(error)!r:.200}") from None
        shape, expected = tuple(stored.get_shape()), tuple(part.total for part in parts)
        if shape != expected:
            raise ConfigError(f"{self.path / file}: {name} has shape {shape}, config.json asks for {expected}")
        if stored.get_dtype() not in STORED_DTYPES:
            raise ConfigError(f"{self.path / file}: {name} is of type {stored.get_dtype()}; floats are expected")
        self._unread.discard(name)
        tensor: Tensor = stored[tuple(slice(part.mine.start, part.mine.stop) for part in parts)]
        if self._holds and (wrong := int((~tensor.to(self._holds).isfinite()).sum())):
            self.faulty.append(f"{name} in {file} ({wrong} of {tensor.numel()})")
        self._done += tensor.element_size() * math.prod(shape)
        if self._on_bytes:
            self._on_bytes(min(self._done, self._total), self._total)
        return tensor

    @property
    def unread(self) -> set[str]:
        """Tensors that nobody asked for."""
        return {name for name in self._unread if not name.endswith(DERIVED)}

    def _indexed(self) -> dict[str, str]:
        index = self.path / INDEX
        try:
            home = json.loads(read_text(index), object_pairs_hook=_unique)["weight_map"]
            pairs = {str(name): str(file) for name, file in home.items()}
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: cannot be read: {error!r:.200}") from None
        said: dict[str, set[str]] = {}
        for name, file in pairs.items():
            if not file.isprintable() or not file.endswith(".safetensors") or file != Path(file).name:
                raise ConfigError(
                    f"{index}: {name!r:.200} is said to be in {file!r:.200}; a shard lies beside its index"
                )
            said.setdefault(file, set()).add(name)
        for file, names in said.items():
            if not os.path.isfile(self.path / file):  # noqa: PTH113 (Path.is_file raises for a name that is too long)
                raise ConfigError(f"{self.path / file}: this shard is missing; by {INDEX} it holds {some(names)}")
            if absent := names - set(self._open(file).keys()):
                raise ConfigError(f"{self.path / file}: there is no {some(absent)} in it, as {INDEX} says")
        return pairs

    def _found(self) -> dict[str, str]:
        files = (
            [SINGLE]
            if (self.path / SINGLE).is_file()
            else sorted(f.name for f in self.path.glob("*.safetensors") if f.is_file())
        )
        if not files:
            pickled = sorted(f.name for pattern in PICKLED for f in self.path.glob(pattern))
            advice = f" {pickled[0]} is a pickle, which can run code: convert it to safetensors." if pickled else ""
            raise ConfigError(
                f"{self.path}: there is no *.safetensors here.{advice} --load-format dummy serves random weights"
            )
        pairs: dict[str, str] = {}
        for file in files:
            names = set(self._open(file).keys())
            if twice := names & pairs.keys():
                other = pairs[min(twice)]
                raise ConfigError(f"{self.path / file}: {some(twice)} is in {other} too, and there is no {INDEX}")
            pairs |= dict.fromkeys(names, file)
        return pairs

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{self.path / file}: truncated, or not in safetensors format: {str(error)!r:.200}"
                ) from None
        return self._files[file]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"{twice!r:.200} is there twice")
    return made


def some(names: Iterable[str]) -> str:
    """For a message: ten at most."""
    shown = sorted(names)
    more = f" and {len(shown) - 10} more" if len(shown) > 10 else ""
    return ", ".join(f"{name!r:.200}" for name in shown[:10]) + more


class RandomWeights:
    """Random weights by name: the same for every split of the model, on devices of one type."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device

    def read(self, name: str, parts: Sequence[Part]) -> Tensor:
        shape = [part.total for part in parts]
        if len(shape) == 1 and name.endswith(".weight"):  # of a norm
            return torch.ones(len(parts[0].mine))
        generator = torch.Generator(self._device).manual_seed(self._seed + zlib.crc32(name.encode()))
        bound = (3 / shape[-1]) ** 0.5  # variance 1 / inputs: activations keep their size
        full = torch.empty(shape, device=self._device).uniform_(-bound, bound, generator=generator)
        return full[tuple(slice(part.mine.start, part.mine.stop) for part in parts)]


@dataclass(frozen=True)
class Loader:
    """Gives a layer its tensors, cast and on the device."""

    source: Source
    names: Names
    group: Group
    dtype: torch.dtype
    device: torch.device
    between: Callable[[], None] = lambda: None  # called before each tensor

    def matrix(self, path: str, layer: int, rows: Sequence[Part], columns: Part) -> Tensor:
        """[rows, columns] of our module `path`, stacked of as many of the checkpoint's as there are `rows`."""
        return self._pull(path, layer, "weight", [(part, columns) for part in rows])

    def vector(self, path: str, layer: int, rows: Sequence[Part], suffix: str = "weight") -> Tensor:
        return self._pull(path, layer, suffix, [(part,) for part in rows])

    def _pull(self, path: str, layer: int, suffix: str, pieces: Sequence[tuple[Part, ...]]) -> Tensor:
        named = self.names[path]
        self.between()
        stems = named.stems if isinstance(named, Cat) else (named,)
        read = [
            self.source.read(f"{stem.format(i=layer)}.{suffix}", parts).to(self.device, self.dtype)
            for stem, parts in zip(stems, pieces, strict=True)
        ]
        return read[0].clone(memory_format=torch.contiguous_format) if len(read) == 1 else torch.cat(read)

"""Where weights come from: safetensors of which each rank reads only its slice, or random numbers.

Tensors are pulled: a layer asks for what it needs, by name, with the shape it must have. Whatever is missing or does
not fit is a ConfigError that names file and tensor.
"""

import json
import logging
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..common.errors import ConfigError
from .models.spec import Cat, Names
from .parallel import Group, Part

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DERIVED = "rotary_emb.inv_freq"  # old checkpoints hold it; it follows from config.json

OnBytes = Callable[[int, int], None]  # (bytes of the model done, of all)


class Source(Protocol):
    def read(self, name: str, parts: Sequence[Part]) -> Tensor:
        """This rank's part of tensor `name`, one `Part` per dimension, in any float type on any device."""
        ...


class Checkpoint:
    """The safetensors of a directory. Raises ConfigError when a file is missing, truncated or no safetensors."""

    def __init__(self, path: Path, on_bytes: OnBytes | None = None) -> None:
        self.path = path
        self._on_bytes = on_bytes
        self._files: dict[str, Any] = {}
        self._home = self._indexed() if (path / INDEX).is_file() else self._found()
        self._unread = set(self._home)
        self._total = sum(file.stat().st_size for file in map(self.path.joinpath, set(self._home.values())))
        self._done = 0

    def read(self, name: str, parts: Sequence[Part]) -> Tensor:
        if name not in self._home:
            raise ConfigError(f"{self.path}: the checkpoint has no tensor {name}")
        file = self._home[name]
        try:
            stored = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ConfigError(f"{self.path / file}: tensor {name} cannot be read: {error}") from None
        shape, expected = tuple(stored.get_shape()), tuple(part.total for part in parts)
        if shape != expected:
            raise ConfigError(f"{self.path / file}: {name} has shape {shape}, config.json asks for {expected}")
        if stored.get_dtype() not in STORED_DTYPES:
            raise ConfigError(f"{self.path / file}: {name} is of type {stored.get_dtype()}; floats are expected")
        self._unread.discard(name)
        tensor: Tensor = stored[tuple(slice(part.mine.start, part.mine.stop) for part in parts)]
        self._done += tensor.element_size() * math.prod(shape)
        if self._on_bytes:
            self._on_bytes(min(self._done, self._total), self._total)
        return tensor

    @property
    def unread(self) -> list[str]:
        """Tensors that nobody asked for."""
        return sorted(name for name in self._unread if not name.endswith(DERIVED))

    def _indexed(self) -> dict[str, str]:
        index = self.path / INDEX
        try:
            home = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            pairs = {str(name): str(file) for name, file in home.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: cannot be read: {error!r}") from None
        for name, file in pairs.items():
            if file != Path(file).name:
                raise ConfigError(f"{index}: {name} is said to be in {file}; a shard lies beside its index")
            if not (self.path / file).is_file():
                raise ConfigError(f"{self.path / file}: this shard is missing; by {INDEX} it holds {name}")
            self._open(file)
        return pairs

    def _found(self) -> dict[str, str]:
        files = [SINGLE] if (self.path / SINGLE).is_file() else sorted(f.name for f in self.path.glob("*.safetensors"))
        if not files:
            raise ConfigError(f"{self.path}: there is no *.safetensors here; --load-format dummy serves random weights")
        return {name: file for file in files for name in self._open(file).keys()}  # noqa: SIM118 (not a dict)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{self.path / file}: truncated, or not in safetensors format: {error}") from None
        return self._files[file]


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

    def matrix(self, path: str, layer: int, rows: Sequence[Part], columns: Part) -> Tensor:
        """[rows, columns] of our module `path`, stacked of as many of the checkpoint's as there are `rows`."""
        return self._pull(path, layer, "weight", [(part, columns) for part in rows])

    def vector(self, path: str, layer: int, rows: Sequence[Part], suffix: str = "weight") -> Tensor:
        return self._pull(path, layer, suffix, [(part,) for part in rows])

    def _pull(self, path: str, layer: int, suffix: str, pieces: Sequence[tuple[Part, ...]]) -> Tensor:
        named = self.names[path]
        stems = named.stems if isinstance(named, Cat) else (named,)
        read = [
            self.source.read(f"{stem.format(i=layer)}.{suffix}", parts).to(self.device, self.dtype)
            for stem, parts in zip(stems, pieces, strict=True)
        ]
        return read[0].clone(memory_format=torch.contiguous_format) if len(read) == 1 else torch.cat(read)

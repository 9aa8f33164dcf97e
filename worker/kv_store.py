"""KV blocks in all the places that hold them: the device, host memory, and a file. Plans copy from one to another."""

import contextlib
import fcntl
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ..common.config import CacheConfig
from ..common.errors import ConfigError
from ..common.messages import StepPlan
from .plan import Columns, Ints, PlanError

GIB = 2**30
GPU_SWAP_BYTES = 4 * GIB  # unless configured
MEASURED_BLOCKS = 8


def host_bytes(config: CacheConfig, device: torch.device, *, num_ranks: int) -> int:
    """Bytes of host memory for this worker's blocks. Raises ConfigError when there is not as much as is asked for."""
    available = psutil.virtual_memory().available // num_ranks
    if config.swap_space is None:
        return min(GPU_SWAP_BYTES, available // 4) if device.type == "cuda" else 0
    wanted = int(config.swap_space * GIB)
    if wanted > available:
        free = available / GIB
        raise ConfigError(f"--swap-space {config.swap_space:g} GiB for each worker: {free:.1f} GiB of memory are free")
    return wanted


class KvStore:
    """`device` [num_blocks + 1, ...] with the null block, then `host` and `file` [num, ...], numbered through. The
    tensors are shared with whoever made them."""

    def __init__(self, device: Tensor, host: Tensor, file: Tensor) -> None:
        self._tensors = (device, host, file)
        first = len(device)
        self._firsts = (0, first, first + len(host))
        self.num_blocks = first + len(host) + len(file)

    def copy(self, pairs: Ints) -> None:
        """Copy block pairs[i, 0] to pairs[i, 1], one after the other. A GPU is told to, in the order of its other work."""
        for source, target in pairs.tolist():
            if source >= self._firsts[1] and target >= self._firsts[1] and self._tensors[0].device.type == "cuda":
                torch.cuda.current_stream().synchronize()  # the host is about to read what the device was to write
            self._block(target).copy_(self._block(source), non_blocking=True)

    def check(self, plan: StepPlan, columns: Columns) -> None:
        """Raises PlanError for a block that is not there, or that nobody may read."""
        copies = columns.copies
        if len(copies) and not (copies.min() >= 1 and copies.max() < self.num_blocks):
            raise PlanError(
                f"step {plan.step}: copies of blocks {copies.tolist()}; there are 1 to {self.num_blocks - 1}"
            )

    def _block(self, block: int) -> Tensor:
        place = 2 if block >= self._firsts[2] else 1 if block >= self._firsts[1] else 0
        return self._tensors[place][block - self._firsts[place]]

    def restoring_takes(self) -> tuple[float, float]:
        """Seconds that copying a block to the device takes from the host and from the file, as measured now; 0 where
        there is none. The device's first blocks are overwritten."""
        return self._takes(1), self._takes(2)

    def _takes(self, place: int) -> float:
        count = min(len(self._tensors[place]), len(self._tensors[0]), MEASURED_BLOCKS)
        if not count:
            return 0.0
        device = self._tensors[0].device
        began = time.perf_counter()
        for i in range(count):
            self._tensors[0][i].copy_(self._tensors[place][i], non_blocking=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count


def host_blocks(count: int, block: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count, *block] in host memory; what the device copies from without help of a CPU. Raises ConfigError."""
    try:
        return torch.empty((count, *block), dtype=dtype, pin_memory=count > 0 and device.type == "cuda")
    except (torch.OutOfMemoryError, RuntimeError) as error:
        size = count * block.numel() * dtype.itemsize / GIB
        raise ConfigError(
            f"{size:.1f} GiB of host memory are not to be had: lower --swap-space ({error!s:.200})"
        ) from None


class KvFile:
    """Blocks of one rank in a file that outlives it, `blocks` [count, *block]. `id` names the file's content: a file of
    another size or kind is begun anew, with another id. One process has it open. Raises ConfigError."""

    def __init__(self, folder: Path, rank: int, count: int, block: torch.Size, dtype: torch.dtype) -> None:
        path, note = folder / f"rank{rank}.kv", folder / f"rank{rank}.json"
        shape = {"blocks": count, "block": list(block), "dtype": str(dtype)}
        size = count * math.prod(block) * dtype.itemsize
        with _explained(path, size):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            known = _known(note)
            if known.get("shape") != shape or path.stat().st_size != size:
                note.unlink(missing_ok=True)
                os.truncate(path, 0)
                os.posix_fallocate(self._file.fileno(), 0, size)  # a full disk is told of now, not by a signal
                known = {"id": secrets.token_hex(8), "shape": shape}
                note.write_text(json.dumps(known))
        self.id = str(known["id"])
        self.blocks = torch.from_file(str(path), shared=True, size=size // dtype.itemsize, dtype=dtype).view(
            count, *block
        )

    def close(self) -> None:
        """Have the disk hold what was copied here. The blocks must not be used any more."""
        os.fsync(self._file.fileno())
        self._file.close()


def _known(note: Path) -> dict[str, object]:
    try:
        known = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and isinstance(known.get("id"), str) else {}


@contextlib.contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise ConfigError(f"{path} is in use by another worker; choose another --kv-disk") from None
    except OSError as error:
        raise ConfigError(
            f"{path} ({size / GIB:.1f} GiB): {error.strerror}; lower --kv-disk-space or choose another --kv-disk"
        ) from None

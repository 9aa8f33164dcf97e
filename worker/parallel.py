"""The tensor-parallel group: which share of a model is ours, and the three exchanges between ranks.

A group of one does nothing and needs no torch.distributed. Others are a communicator of their own (gloo on CPUs, NCCL
on GPUs), not torch's global process group: no global state, the address is ours to choose, and ranks that have lost
each other can meet again. Closing a communicator wakes whoever waits for us in an exchange, however long that may take
otherwise: so a rank that leaves needs nobody to watch the ones that stay.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor

from ..common.errors import ConfigError, EngineError
from .meeting import OutOfPatience, Patience, Place, Watched, meet

MEETING_S = 600.0  # ranks load torch at different speeds; no weights are read before they have met
ADDRESSES_S = 10.0  # once all are there, for each to say where it listens
CONNECTING_S = 0.5  # then; gloo tries five times as long, and hears of nothing meanwhile
PAUSE_S = 0.2  # before a meeting that failed is given up: the next one follows at once, and may fail at once
EXCHANGE_S = 600.0  # a rank that died is noticed at once; this is for one that hangs

DEVICE_ERRORS = (torch.AcceleratorError, torch.OutOfMemoryError)  # RuntimeErrors too, but of no other rank's making

c10d: Any = torch.distributed  # whose types leave out what is used here


class PeerLost(EngineError):
    """Another rank is gone, or has left this group for the next. What the ranks held together is to be dropped; they
    may `join` anew."""


class Part(NamedTuple):
    """A dimension of a whole tensor and what this rank holds of it."""

    total: int
    mine: range


def whole(total: int) -> Part:
    return Part(total, range(total))


class Group:
    """This rank among `size`. Every rank must make the same exchanges in the same order.

    With several ranks an exchange needs `join` before it, and raises PeerLost when another rank does not take part.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")
        self._place: Place | None = None  # where the others were met
        self._communicator: Any = None

    def share(self, total: int) -> Part:
        """Contiguous shares that differ by at most one."""
        return Part(total, range(total * self.rank // self.size, total * (self.rank + 1) // self.size))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks; `x` itself is overwritten."""
        if self.size > 1:
            self._exchange("allreduce", [x])
        return x

    def gather_columns(self, x: Tensor, total: int) -> Tensor:
        """All ranks' shares [r, mine] of `total` columns, side by side: [r, total]."""
        if self.size == 1:
            return x
        widest = -(-total // self.size)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[1])).contiguous()
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        self._exchange("allgather", [pieces], [padded])
        widths = [len(Group(rank, self.size).share(total).mine) for rank in range(self.size)]
        return torch.cat([piece[:, :width] for piece, width in zip(pieces, widths, strict=True)], -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, into every rank's, which has the same shape and dtype."""
        if self.size > 1:
            self._exchange("broadcast", [x])
        return x

    def join(
        self,
        rendezvous: str,
        *,
        epoch: int = 0,
        patience_s: float = MEETING_S,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Meet the other ranks at file:///path (one host) or tcp://host:port (rank 0 listens there), in place of those
        met before.

        `epoch` keeps meetings at one address apart. `meanwhile` is called again and again while others are awaited; what
        it raises ends the wait. Raises ConfigError when they do not come in time, PeerLost when they leave at once.
        """
        self.close()
        if self.size == 1:
            return
        try:
            self._place = meet(rendezvous, epoch, self.rank, self.size, Patience(patience_s, meanwhile))
            self._communicator = _connect(self._place, self, Patience(ADDRESSES_S, meanwhile))
        except OutOfPatience as error:
            if self._place is None:
                raise ConfigError(str(error)) from None
            raise PeerLost(f"rank {self.rank} met the others and lost them again: {error}") from None
        except DEVICE_ERRORS:
            raise
        except (OSError, RuntimeError) as error:
            time.sleep(PAUSE_S)
            raise PeerLost(f"rank {self.rank} lost the others while they met: {error}") from error

    def close(self) -> None:
        """Leave, and end the communicator's threads. One that is alive when the interpreter ends may abort the
        process."""
        self._communicator = None
        if self._place is not None:
            self._place.leave()
            self._place = None

    def _exchange(self, kind: str, *tensors: object) -> None:
        try:
            getattr(self._communicator, kind)(*tensors).wait()
        except DEVICE_ERRORS:
            raise
        except RuntimeError as error:  # torch has no type of its own for this
            raise PeerLost(f"rank {self.rank} lost the others in an exchange: {error}") from error


def _connect(place: Place, group: Group, patience: Patience) -> Any:
    """Connected to all ranks. Raises RuntimeError, and OutOfPatience when one does not say where it listens."""
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=EXCHANGE_S)
        return c10d.ProcessGroupNCCL(place.torch_store(), group.rank, group.size, options)
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=place.address)]
    options._timeout = timedelta(seconds=CONNECTING_S)
    communicator = c10d.ProcessGroupGloo(Watched(place, patience), group.rank, group.size, options)
    communicator._set_default_timeout(timedelta(seconds=EXCHANGE_S))
    return communicator

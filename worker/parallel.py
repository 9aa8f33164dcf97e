"""The tensor-parallel group: which share of a model is ours, and the three exchanges between ranks.

A group of one does nothing and needs no torch.distributed. Others are a communicator of their own (gloo on CPUs, NCCL
on GPUs), not torch's global process group: no global state, the address is ours to choose, and ranks that have lost
each other can meet again. Closing a communicator wakes whoever waits for us in an exchange, however long that may take
otherwise: so a rank that leaves needs nobody to watch the ones that stay.
"""

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import torch
import torch.distributed
from torch import Tensor

from ..common.errors import ConfigError, EngineError

MEETING_S = 600.0  # ranks load torch at different speeds; no weights are read before they have met
CONNECTING_S = 30.0  # once all are there
EXCHANGE_S = 600.0  # a rank that died is noticed at once; this is for one that hangs
POLL_S = 0.02

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
        self._device = device or torch.device("cpu")
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
        store, address = _meet(rendezvous, epoch, self, _Patience(patience_s, meanwhile))
        try:
            self._communicator = _connect(store, address, self, self._device)
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank} met the others and lost them again: {error}") from error

    def close(self) -> None:
        """Leave, and end the communicator's threads. One that is alive when the interpreter ends may abort the
        process."""
        self._communicator = None

    def _exchange(self, kind: str, *tensors: object) -> None:
        try:
            getattr(self._communicator, kind)(*tensors).wait()
        except RuntimeError as error:  # torch has no type of its own for this
            raise PeerLost(f"rank {self.rank} lost the others in an exchange: {error}") from error


class _Patience:
    """How long the other ranks are waited for."""

    def __init__(self, patience_s: float, meanwhile: Callable[[], None]) -> None:
        self._patience_s = patience_s
        self._meanwhile = meanwhile
        self._deadline = time.monotonic() + patience_s

    def wait(self, why: str) -> None:
        """A moment. ConfigError, for that reason, when none is left."""
        if time.monotonic() > self._deadline:
            raise ConfigError(f"{why} within {self._patience_s:.0f} s")
        self._meanwhile()
        time.sleep(POLL_S)


def _meet(rendezvous: str, epoch: int, group: Group, patience: _Patience) -> tuple[Any, str]:
    """A store that all ranks have come to, and this host's address among them. Waits in Python, so that a signal can
    end it."""
    url = urlsplit(rendezvous)
    if url.scheme == "file" and url.path:
        store = c10d.PrefixStore(str(epoch), c10d.FileStore(url.path, group.size))
        _await_ranks(store, group, rendezvous, patience)
        return store, "127.0.0.1"
    if url.scheme != "tcp" or not url.hostname or not url.port:
        raise ConfigError(f"rendezvous {rendezvous!r}: expected file:///PATH or tcp://HOST:PORT")
    server = _tcp_store(url, group) if group.rank == 0 else None
    while True:
        try:
            with socket.create_connection((url.hostname, url.port), timeout=1.0) as probe:
                address = probe.getsockname()[0]
            store = c10d.PrefixStore(str(epoch), server or _tcp_store(url, group))
            _await_ranks(store, group, rendezvous, patience)
            return store, address
        except (OSError, RuntimeError) as error:  # not there yet, or still rank 0's store of an earlier meeting
            if isinstance(error, socket.gaierror):
                raise ConfigError(f"rendezvous {rendezvous}: {error.strerror}") from None
            patience.wait(f"rank {group.rank} did not reach {rendezvous} ({error})")


def _tcp_store(url: SplitResult, group: Group) -> Any:
    try:
        timeout = timedelta(seconds=CONNECTING_S)
        return c10d.TCPStore(url.hostname, url.port, group.size, group.rank == 0, timeout, wait_for_workers=False)
    except RuntimeError as error:
        if group.rank:
            raise
        raise ConfigError(f"rank 0 cannot listen at {url.netloc}: {error}") from None


def _await_ranks(store: Any, group: Group, rendezvous: str, patience: _Patience) -> None:
    store.set(f"here/{group.rank}", b"1")
    missing: Sequence[int] = range(group.size)
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        patience.wait(f"ranks {missing} did not come to {rendezvous}")


def _connect(store: Any, address: str, group: Group, device: torch.device) -> Any:
    """Connected to all ranks. Raises RuntimeError."""
    store = c10d.PrefixStore("tensor-parallel", store)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=EXCHANGE_S)
        return c10d.ProcessGroupNCCL(store, group.rank, group.size, options)
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=CONNECTING_S)
    communicator = c10d.ProcessGroupGloo(store, group.rank, group.size, options)
    communicator._set_default_timeout(timedelta(seconds=EXCHANGE_S))
    return communicator

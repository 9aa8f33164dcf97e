"""The tensor-parallel group: which share of a model is ours, and the three exchanges between ranks.

A group of one does nothing and needs no torch.distributed. Others are a communicator of their own (gloo on CPUs, NCCL
on GPUs), not torch's global process group: no global state, and the address is ours to choose.
"""

import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import torch
import torch.distributed
from torch import Tensor

from ..common.errors import ConfigError

MEETING_S = 600.0  # ranks load torch at different speeds; no weights are read before they have met
EXCHANGE_S = 600.0  # a rank that died is noticed at once; this is for one that hangs
POLL_S = 0.02

c10d: Any = torch.distributed  # whose types leave out what is used here


class Part(NamedTuple):
    """A dimension of a whole tensor and what this rank holds of it."""

    total: int
    mine: range


def whole(total: int) -> Part:
    return Part(total, range(total))


class Group:
    """This rank among `size`. Every rank must make the same exchanges in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, backend: Any = None) -> None:
        self.rank = rank
        self.size = size
        self._backend = backend

    def share(self, total: int) -> Part:
        """Contiguous shares that differ by at most one."""
        return Part(total, range(total * self.rank // self.size, total * (self.rank + 1) // self.size))

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks; `x` itself is overwritten."""
        if self.size > 1:
            self._backend.allreduce([x]).wait()
        return x

    def gather_columns(self, x: Tensor, total: int) -> Tensor:
        """All ranks' shares [r, mine] of `total` columns, side by side: [r, total]."""
        if self.size == 1:
            return x
        widest = -(-total // self.size)
        padded = torch.nn.functional.pad(x, (0, widest - x.shape[1])).contiguous()
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        self._backend.allgather([pieces], [padded]).wait()
        widths = [len(Group(rank, self.size).share(total).mine) for rank in range(self.size)]
        return torch.cat([piece[:, :width] for piece, width in zip(pieces, widths, strict=True)], -1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, into every rank's, which has the same shape and dtype."""
        if self.size > 1:
            self._backend.broadcast([x]).wait()
        return x

    def close(self) -> None:
        """End the communicator's threads. One that is alive when the interpreter ends may abort the process."""
        self._backend = None


def connect(rendezvous: str, rank: int, size: int, device: torch.device) -> Group:
    """Meet the other ranks at file:///path (one host) or tcp://host:port (rank 0 listens there).

    Raises ConfigError when they do not come.
    """
    if size == 1:
        return Group()
    url = urlsplit(rendezvous)
    store: Any
    if url.scheme == "file" and url.path:
        store, address = c10d.FileStore(url.path, size), "127.0.0.1"
    elif url.scheme == "tcp" and url.hostname and url.port:
        store, address = _tcp_store(url.hostname, url.port, rank, size)
    else:
        raise ConfigError(f"rendezvous {rendezvous!r}: expected file:///PATH or tcp://HOST:PORT")
    _await_ranks(store, rank, size, rendezvous)
    store = c10d.PrefixStore("tensor-parallel", store)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=EXCHANGE_S)
        return Group(rank, size, c10d.ProcessGroupNCCL(store, rank, size, options))
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timedelta(seconds=EXCHANGE_S)
    return Group(rank, size, c10d.ProcessGroupGloo(store, rank, size, options))


def _tcp_store(host: str, port: int, rank: int, size: int) -> tuple[Any, str]:
    """The store, and this host's own address on the way to it."""
    timeout = timedelta(seconds=MEETING_S)
    try:
        store = c10d.TCPStore(host, port, size, rank == 0, timeout, wait_for_workers=False)
        family = socket.getaddrinfo(host, port)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing: it only picks the interface
            return store, probe.getsockname()[0]
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"rank {rank} cannot meet the others at {host}:{port}: {error}") from None


def _await_ranks(store: Any, rank: int, size: int, rendezvous: str) -> None:
    """Polled from Python, so that a signal can end the wait."""
    store.set(f"here/{rank}", b"1")
    deadline = time.monotonic() + MEETING_S
    missing: Sequence[int] = range(size)
    while missing := [other for other in missing if not store.check([f"here/{other}"])]:
        if time.monotonic() > deadline:
            raise ConfigError(f"ranks {missing} did not come to {rendezvous} within {MEETING_S:.0f} s")
        time.sleep(POLL_S)

"""What a step that failed means: its group is over, or the step was too large besides, or this process is of no use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..common.errors import EngineError
from .parallel import PeerLost


class StepFailed(EngineError):
    """A step raised here. What the rows hold is not to be trusted; weights and device are."""


class OutOfMemory(StepFailed):
    """The step asked for more memory than there is: a smaller one may do."""


@contextmanager
def step() -> Iterator[None]:
    """Around a part of a step. Whatever it raises becomes `StepFailed`, but for `PeerLost`, and for an error after which
    the device computes nothing any more.

    The error it raises holds the frames of the step, hence its tensors: they are free once it has been handled.
    """
    try:
        yield
    except PeerLost:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise OutOfMemory(f"a step ran out of memory: {error!s:.300}") from error
        if _device_lost(error):
            raise
        raise StepFailed(f"a step failed: {type(error).__name__}: {error!s:.300}") from error


def out_of_memory(error: Exception) -> bool:
    """Of the host or of a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # These have no type of their own: the CPU's allocator, CUDA outside the caching allocator, and cuBLAS.
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _device_lost(error: Exception) -> bool:
    """A CUDA context is of no use after its first error; only another process gets a new one."""
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))

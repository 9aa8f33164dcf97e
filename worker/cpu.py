"""The backend that computes on a CPU: matrix products of oneDNN, and numba kernels on the same threads."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ..kernels import sampling as reference
from ..kernels.cpu import activation, linear, paged_attention, pool, rms_norm, rotary, sampling
from .backends import TORCH, Backend, Capabilities


def backends() -> tuple[Backend, ...]:
    """One; none where torch has no threads or products that could be used."""
    dtypes = frozenset(dtype for dtype in (torch.float32, torch.bfloat16) if linear.is_supported(dtype))
    if not (dtypes and pool.is_available()):
        return ()
    return (
        replace(
            TORCH,
            name="numba",
            supports=Capabilities(
                devices=frozenset({"cpu"}),
                dtypes=dtypes,
                head_dims=frozenset(range(32, 513, 32)),
                block_sizes=frozenset(range(16, 1025, 16)),
                windows=True,
            ),
            kv_layout="lanes",
            linear=linear.linear,
            plan_attention=paged_attention.plan_attention,
            paged_attention=paged_attention.paged_attention,
            rotate_and_write=rotary.rotate_and_write,
            add_rms_norm=rms_norm.add_rms_norm,
            silu_mul=activation.silu_mul,
            sample=partial(reference.sample, largest=sampling.largest),
            prepare=prepare,
        ),
    )


def prepare(dtype: torch.dtype, between: Callable[[], None]) -> None:
    for kernels in (rms_norm.KERNELS, rotary.KERNELS, activation.KERNELS, paged_attention.KERNELS, sampling.KERNELS):
        for kernel in kernels[dtype]:
            between()
            kernel.compile()

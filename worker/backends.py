"""Who computes: the kernels of one device family behind one set of signatures, chosen once by what a model asks for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..common.errors import ConfigError
from ..kernels import activation, linear, paged_attention, rms_norm, rotary, sampling
from ..kernels.rotary import HeadNorms
from .models.spec import Decoder


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend computes; None stands for any."""

    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    head_dims: frozenset[int] | None
    block_sizes: frozenset[int] | None
    windows: bool  # sliding ones


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a model on a device asks for."""

    device: str
    dtype: torch.dtype
    head_dims: frozenset[int]
    block_size: int
    windows: bool

    def unmet(self, by: Capabilities) -> list[str]:
        """What is asked for and not there, in words. Empty: `by` includes everything."""
        missing = []
        if self.device not in by.devices:
            missing.append(f"device {self.device}")
        if self.dtype not in by.dtypes:
            missing.append(f"dtype {str(self.dtype).removeprefix('torch.')}")
        if by.head_dims is not None and (beyond := self.head_dims - by.head_dims):
            missing.append(f"head dim {', '.join(map(str, sorted(beyond)))}")
        if by.block_sizes is not None and self.block_size not in by.block_sizes:
            missing.append(f"--block-size {self.block_size}")
        if self.windows and not by.windows:
            missing.append("sliding windows")
        return missing


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Functions with the signatures, and the contracts, of the references in `kernels/`. What `plan_attention` makes
    of a step is its own affair: nobody but its `paged_attention` looks into it."""

    name: str
    supports: Capabilities
    kv_layout: str  # KV that is kept on disk is of use only to who lays it out the same way
    row_multiple: int  # tokens, and rows that sample, are padded to a multiple of this
    linear: Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]
    plan_attention: Callable[..., Any]
    paged_attention: Callable[[Tensor, Tensor, int, Any, float], Tensor]
    rotate_and_write: Callable[[Tensor, int, tuple[Tensor, Tensor], HeadNorms | None, Tensor, int, Tensor], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, sampling.Draws, Tensor], tuple[Tensor, Tensor]]
    prepare: Callable[[torch.dtype, Callable[[], None]], None]  # what takes long once; calls back between its pieces


TORCH = Backend(
    name="torch",
    kv_layout="rows",
    supports=Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float32, torch.float16, torch.bfloat16}),
        head_dims=None,
        block_sizes=None,
        windows=True,
    ),
    # A CPU's float32 matrix product gives a row the same bits at every multiple of 4 rows and others below 4 or between
    # (measured: MKL, 1 to 4 threads): so what a request gets does not depend on who else is served.
    row_multiple=4,
    linear=linear.linear,
    plan_attention=paged_attention.plan_attention,
    paged_attention=paged_attention.paged_attention,
    rotate_and_write=rotary.rotate_and_write,
    add_rms_norm=rms_norm.add_rms_norm,
    silu_mul=activation.silu_mul,
    sample=sampling.sample,
    prepare=lambda _dtype, _between: None,
)


def available(device: torch.device) -> tuple[Backend, ...]:
    """In the order in which they are asked: the first that can serve a model does."""
    if device.type != "cpu":
        return (TORCH,)
    from .cpu import backends  # noqa: PLC0415 (its compiler takes a fifth of a second to load, of use on no other device)

    return (*backends(), TORCH)


def choose(
    model: Decoder,
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    backends: Sequence[Backend] | None = None,
) -> Backend:
    """Of `backends`, or of those that are available. Raises ConfigError, which tells what each backend lacks, when none includes what is required."""
    required = Requirements(
        device=device.type,
        dtype=dtype,
        head_dims=frozenset(layer.attn.head_dim for layer in model.layers),
        block_size=block_size,
        windows=any(model.windows),
    )
    backends = available(device) if backends is None else backends
    unmet = {backend.name: required.unmet(backend.supports) for backend in backends}
    for backend in backends:
        if not unmet[backend.name]:
            return backend
    lacking = "; ".join(f"{name} lacks {', '.join(missing)}" for name, missing in unmet.items())
    raise ConfigError(f"no backend computes this model here: {lacking}")

"""Root-mean-square norm (Zhang & Sennrich, arXiv:1910.07467), alone and fused with the residual add before it."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] -> [..., d] in x's dtype; the mean is taken in float32. `weight` [d]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add_rms_norm(delta: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of `delta + residual`, and that sum, which is the next residual."""
    residual = residual + delta
    return rms_norm(residual, weight, eps), residual

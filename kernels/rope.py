"""Rotary position embedding (Su et al., arXiv:2104.09864), the two halves of a head being the two coordinates."""

import torch
from torch import Tensor


def rope(x_tnh: Tensor, cos_th: Tensor, sin_th: Tensor) -> Tensor:
    """Rotate each head of x [t, n, h] by its token's angles, cos and sin [t, h / 2] float32; computed in float32."""
    first, second = x_tnh.float().chunk(2, -1)
    cos, sin = cos_th[:, None], sin_th[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_tnh.dtype)

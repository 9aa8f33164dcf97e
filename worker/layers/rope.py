"""Angles of the rotary embedding."""

import math

import torch
from torch import Tensor

from ..models import spec

Angles = tuple[Tensor, Tensor]  # cos and sin, [t, h / 2] float32


class RopeTable:
    """cos and sin of every position, computed once: a position's angles are the same bits in every step."""

    def __init__(self, rope: spec.Rope, max_positions: int, device: torch.device) -> None:
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies(rope)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def __call__(self, positions_t: Tensor) -> Angles:
        return self.cos[positions_t], self.sin[positions_t]


def frequencies(rope: spec.Rope) -> Tensor:
    """Radians per token of each pair of coordinates: [dim / 2] float32."""
    plain = 1.0 / rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    match rope.scaling:
        case None:
            return plain
        case spec.LinearScaling(factor=factor):
            return plain / factor
        case spec.Llama3Scaling() as scaling:
            turns = scaling.original_context * plain / (2 * math.pi)  # over the context of pretraining
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)  # 0: divided; 1: as it was
            return kept * plain + (1.0 - kept) * plain / scaling.factor

"""Rotary position embeddings: queries and keys are turned by angles that grow with their position (Su et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_table(positions: Tensor, channels: Sequence[int], theta: float) -> Tensor:
    """Cosines and sines of the angle of every pair of channels, (2, N, sum(channels) / 2) in float32.

    Each axis a of the positions (N, axes) turns channels[a] channels of a head: omega_i = theta^(-2 i / channels[a]),
    angle = position omega_i (Su et al. 2021, eq. 15). Computed in float64, as the largest angles are hundreds of turns.
    """
    angles: list[Tensor] = []
    for position, width in zip(positions.double().unbind(-1), channels, strict=True):
        omega = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width)
        angles.append(position[:, None] * omega)  # (N, width / 2)
    angle = torch.cat(angles, dim=-1)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring channels (a, b) to (a cos - b sin, a sin + b cos) in float32; (B, N, heads, d) of any dtype."""
    cos, sin = table[:, :, None]  # (N, 1, d / 2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, heads, d / 2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)

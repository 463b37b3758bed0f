"""Adaptive projected guidance (Sadat 2024): large scales without oversaturation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Projected:
    """`parallel` is the share kept of the update along the conditional output; `radius` caps its norm, 0 is no cap."""

    scale: float = 1.0
    parallel: float = 0.0
    radius: float = 0.0

    def combine(self, conditional: Tensor, baseline: Tensor) -> Tensor:
        """The guided output, no momentum: a step depends on nothing but its own two outputs."""
        return projected(conditional, baseline, self.scale, self.parallel, self.radius)


def projected(
    conditional: Tensor, baseline: Tensor, scale: float, parallel: float = 0.0, radius: float = 0.0
) -> Tensor:
    """conditional + (scale - 1)(d_orthogonal + parallel d_parallel), d = conditional - baseline (Sadat 2024).

    d is first shortened to `radius`; the parts are taken per image against the conditional output, in double precision.
    At parallel 1 and radius 0 this is classifier-free guidance.
    """
    axes = tuple(range(1, conditional.ndim))
    along, d = conditional.double(), (conditional - baseline).double()
    if radius > 0.0:
        length = (d * d).sum(dim=axes, keepdim=True).sqrt()  # (B, 1, 1, 1)
        d = d * (radius / length.clamp(min=radius))
    share = (d * along).sum(dim=axes, keepdim=True) / (along * along).sum(dim=axes, keepdim=True).clamp(min=1e-300)
    d = d + (parallel - 1.0) * share * along
    return conditional + (scale - 1.0) * d.to(conditional.dtype)

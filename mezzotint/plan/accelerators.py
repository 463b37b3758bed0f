"""Public figures of accelerators: dense rates, bandwidth and memory as their makers publish them.

Rates are without sparsity, in operations a second; "float32" is what torch uses by default: full float32, not TF32.
Prices are left to the user, since they differ by place and day.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

T, GB = 1e12, 1e9
# The share of a published rate that kernels of usual sizes reach in torch, an assumption: linear layers 0.60, attention
# by a fused kernel 0.45, convolutions 0.45, their backward passes somewhat less; and of the bandwidth 0.80.
SHARES = {
    "linear": 0.60, "attention": 0.45, "attention_backward": 0.40, "convolution": 0.45, "convolution_backward": 0.40,
    "bandwidth": 0.80,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One card."""

    memory: float  # bytes
    bandwidth: float  # bytes a second
    flops: Mapping[str, float]  # by dtype
    source: str


def _card(memory: float, bandwidth: float, single: float, half: float, source: str, bfloat: bool = True) -> Accelerator:
    flops = {"float32": single * T, "float16": half * T} | ({"bfloat16": half * T} if bfloat else {})
    return Accelerator(memory * GB, bandwidth * GB, flops, source)


ACCELERATORS: Mapping[str, Accelerator] = {
    "h100": _card(80, 3350, 67, 989.4, "NVIDIA H100 Tensor Core GPU datasheet (SXM5)"),
    "h200": _card(141, 4800, 67, 989.4, "NVIDIA H200 Tensor Core GPU datasheet (SXM)"),
    "a100-40": _card(40, 1555, 19.5, 312, "NVIDIA A100 Tensor Core GPU datasheet (40 GB)"),
    "a100-80": _card(80, 2039, 19.5, 312, "NVIDIA A100 Tensor Core GPU datasheet (80 GB SXM)"),
    "l40s": _card(48, 864, 91.6, 362.05, "NVIDIA L40S datasheet"),
    "l4": _card(24, 300, 30.3, 121, "NVIDIA L4 datasheet"),
    "t4": _card(16, 320, 8.1, 65, "NVIDIA T4 datasheet", bfloat=False),
    "rtx-3090": _card(24, 936, 35.6, 71, "NVIDIA GA102 whitepaper (half with float32 sums)"),
    "rtx-4090": _card(24, 1008, 82.6, 165.2, "NVIDIA Ada whitepaper (half with float32 sums)"),
    "rtx-5090": _card(32, 1792, 104.8, 209.5, "NVIDIA Blackwell RTX whitepaper (half with float32 sums)"),
    "mi300x": _card(192, 5300, 163.4, 1307.4, "AMD Instinct MI300X datasheet"),
}

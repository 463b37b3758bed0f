"""What kernels take for themselves while they run, beside what they return."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mezzotint.plan.operators import Call

if TYPE_CHECKING:
    from torch import Tensor


def on_cpu(call: Call, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> int:
    """Bytes that oneDNN's convolutions and the attention kernel take on a CPU (measured with torch 2.13).

    A convolution reorders its operands into blocks: first input and output in blocks are there, then the output twice,
    so that beside the output the larger of the two is alive, and the weights in blocks all the time. 1x1 kernels work
    in place. The way back has both in blocks at once. The backward pass of attention sums in a copy of the queries.
    """
    if call.name == "convolution" and len(inputs) > 1:
        return 0 if call.shape[-1] == 1 else max(_size(inputs[0]), _size(outputs[0])) + _size(inputs[1])
    if call.name == "convolution_backward" and len(inputs) > 2:
        gradient, pixels, weight = (_size(tensor) for tensor in inputs[:3])
        larger = max(gradient, pixels)
        if call.shape[-1] == 1:
            return larger
        return max(gradient + pixels, larger + weight) if len(outputs) > 1 else larger + weight
    if call.kind == "attention" and call.backward:
        return _size(inputs[1])
    return 0


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize

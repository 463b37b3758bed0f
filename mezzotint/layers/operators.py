"""What layers come down to: the operators that torch runs, by kind, and how many operations each of them is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

KINDS = ("convolution", "attention", "linear", "norm", "activation", "copying", "other")
_WORDS = (  # the first that an operator's name holds says its kind
    ("attention", ("scaled_dot_product", "_flash_attention", "softmax", "baddbmm")),
    ("convolution", ("conv",)),
    ("linear", ("addmm", "linear", "mm", "mv", "dot")),
    ("norm", ("norm", "var_mean", "rsqrt")),
    ("activation", ("silu", "gelu", "relu", "sigmoid", "tanh", "glu", "softplus", "mish")),
    ("copying", ("copy", "clone", "cat", "upsample", "pad", "index", "stack", "embedding", "pool", "gather", "roll")),
)  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of layer that an operator belongs to, by its name in torch.ops.aten."""
    return next((kind for kind, words in _WORDS if any(word in name for word in words)), "other")


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    gradient: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# Attention kernels for which torch's counter has no formula of its own; where a later version has one, that one stays.
_UNKNOWN: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
}
for _name, _formula in _UNKNOWN.items():
    if (_operator := getattr(torch.ops.aten, _name)) not in flop_registry:
        register_flop_formula(_operator)(_formula)

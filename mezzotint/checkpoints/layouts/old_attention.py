"""Folder files of the first years, in which pixel attention has older names: DDPM, LDM and Stable Diffusion's VAE."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
MARK = ".proj_attn.weight"  # no other layer was ever called so
PROJECTIONS = tuple(f".{name}.weight" for name in OLD.values())


def modernised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under today's names, in the same order; a file that has them already comes back as it is.

    Projections stored as convolutions of kernel 1, (C, C, 1, 1), become matrices (C, C), under either name.
    """
    attentions = {name.removesuffix(MARK) for name in tensors if name.endswith(MARK)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")  # "mid_block.attentions.0.query", "weight"
        attention, _, part = layer.rpartition(".")
        if attention in attentions and part in OLD:
            name = f"{attention}.{OLD[part]}.{leaf}"
        if name.endswith(PROJECTIONS) and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        found[name] = tensor
    return found

"""Adapters as files for other programs: the layouts of diffusers, of peft and of kohya."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mezzotint.adapters import header
from mezzotint.adapters.lowrank import BACKBONE, Adapter, LowRank
from mezzotint.adapters.places import PEFT
from mezzotint.errors import InputError


def to_diffusers(adapter: Adapter, backbone: str = "unet") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a pytorch_lora_weights.safetensors; `backbone` is its folder, unet or transformer.

    Alphas other than the rank go into the header, the only place this layout has for them.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for part, changes in adapter.parts.items():
        prefix = backbone if part == BACKBONE else part
        named = {published(part, low.module): low for low in changes}
        tensors |= _paired(named, f"{prefix}.")
        # CLIP's inner model is a level of its own in older transformers, in newer ones it is not: endings fit both
        ends = {name.removeprefix("text_model."): low for name, low in named.items()}
        settings |= {f"{prefix}.{key}": value for key, value in _config(ends, whole=part == BACKBONE).items()}
    plain = all(low.scale == 1.0 for changes in adapter.parts.values() for low in changes)
    said = {} if plain else {header.DIFFUSERS: json.dumps(settings, indent=2, sort_keys=True)}
    return tensors, {"format": "pt"} | _notes(adapter) | said


def to_peft(adapter: Adapter, part: str = BACKBONE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of an adapter_model.safetensors and the data of its adapter_config.json: one part of a model."""
    named = {low.module: low for low in adapter.parts[part]}
    return _paired(named, PEFT), {"peft_type": "LORA", "task_type": None, **_config(named)}


def to_kohya(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header in kohya's layout, which the common user interfaces read; alpha is a tensor of each module."""
    second = "text_encoder_2" in adapter.parts or "text_encoder_3" in adapter.parts
    prefixes = {
        BACKBONE: "lora_unet",
        "text_encoder": "lora_te1" if second else "lora_te",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
    }
    tensors: dict[str, Tensor] = {}
    for part, changes in adapter.parts.items():
        for low in changes:
            name = f"{prefixes[part]}_{published(part, low.module).replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = low.down.contiguous()
            tensors[f"{name}.lora_up.weight"] = low.up.contiguous()
            tensors[f"{name}.alpha"] = _scalar(low.scale * low.rank, low.up.dtype)
            if low.magnitude is not None:
                tensors[f"{name}.dora_scale"] = low.magnitude.reshape(-1, *[1] * (low.down.ndim - 1)).contiguous()
    return tensors, {"format": "pt"} | _notes(adapter)


def _paired(named: Mapping[str, LowRank], prefix: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for module, low in named.items():
        tensors[f"{prefix}{module}.lora_A.weight"] = low.down.contiguous()
        tensors[f"{prefix}{module}.lora_B.weight"] = low.up.contiguous()
        if low.magnitude is not None:  # peft keeps a convolution's on the axis of its outputs
            shape = (-1,) if low.down.ndim == 2 else (1, -1, *[1] * (low.down.ndim - 2))
            tensors[f"{prefix}{module}.lora_magnitude_vector"] = low.magnitude.reshape(shape).contiguous()
    return tensors


def _config(named: Mapping[str, LowRank], whole: bool = True) -> dict[str, Any]:
    """peft's LoraConfig: the commonest rank and alpha, and patterns for the modules that have others.

    The names are `whole`, or the ends of names.
    """
    changes = list(named.values())
    if len({low.magnitude is None for low in changes}) > 1:
        raise InputError(
            "the layouts of peft and diffusers hold DoRA for all modules or for none; write kohya's instead."
        )
    stabilised = all(low.stabilised for low in changes)
    alphas = {name: _alpha(low, stabilised) for name, low in named.items()}
    start = "^" if whole else ""
    rank, alpha = _commonest([low.rank for low in changes]), _commonest(list(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(named),
        "rank_pattern": {f"{start}{name}": low.rank for name, low in named.items() if low.rank != rank},
        "alpha_pattern": {f"{start}{name}": value for name, value in alphas.items() if value != alpha},
        "use_rslora": stabilised,
        "use_dora": changes[0].magnitude is not None,
        "lora_bias": False,
    }


def _alpha(low: LowRank, stabilised: bool) -> float:
    if low.alpha is None or stabilised == low.stabilised:
        return low.rank if low.alpha is None else low.alpha
    return low.scale * low.rank


def published(part: str, module: str) -> str:
    """CLIP's modules under the inner model's name, as every published file has them."""
    return f"text_model.{module}" if part != BACKBONE and module.startswith("encoder.layers.") else module


def _notes(adapter: Adapter) -> dict[str, str]:
    """What trainers noted in the header goes along, and the contract of our own."""
    kept = ("ss_", "modelspec.", header.CONTRACT)
    return {key: value for key, value in adapter.metadata.items() if key.startswith(kept)}


def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A number in the dtype of the file's other tensors, or exactly where that one rounds it."""
    scalar = torch.tensor(value, dtype=dtype)
    return scalar if scalar.item() == value else torch.tensor(value, dtype=torch.float32)


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]

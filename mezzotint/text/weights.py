"""Weights of prompt encoders: mapped from a folder, put in place without a copy, named by what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mezzotint.digests import tensors_digest
from mezzotint.errors import InputError
from mezzotint.files import sha256_json, write_json, write_with
from mezzotint.layers.fill import fill as in_place

Network = TypeVar("Network", bound=nn.Module)

STEM = "model"  # as transformers names the files of a network
EXTRA = "mezzotint[text]"
MISSING = f"reading prompts needs transformers, which is missing: pip install '{EXTRA}'"


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of model.safetensors, or of the shards that its index lists; nothing is copied."""
    from safetensors import SafetensorError, safe_open

    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        index = folder / f"{STEM}.safetensors.index.json"
        whole = folder / f"{STEM}.safetensors"
        sharded = index.is_file() and not whole.is_file()
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if sharded else [whole.name]
        tensors: dict[str, Tensor] = {}
        for name in files:
            if Path(name).name != name:
                raise InputError(f"{index} points outside its folder: {name!r}")
            with safe_open(str(folder / name), framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder} is not an intact text encoder: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} must hold a JSON object, not a {type(config).__name__}")
    return config, tensors


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors; tensors that share memory are the caller's to leave out."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_with(folder / f"{STEM}.safetensors", lambda path: save_file(content, path, {"format": "pt"}))
    write_json(folder / "config.json", dict(config))


def fill(
    build: Callable[[], Network], layers: object, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, at: object
) -> Network:
    """A network of so many layers with the tensors in place (`layers.fill`).

    Tables outside the state dict, which transformers computes from the settings, are computed again. InputError where
    tensors and configuration disagree.
    """
    if not isinstance(layers, int) or not 0 <= layers <= len(tensors):  # before anyone builds a thousand million
        raise InputError(f"{at} does not fit its configuration: {layers} layers cannot be in {len(tensors)} tensors")
    return in_place(build, tensors, dtype, at, complete=_recomputed)


def _recomputed(network: nn.Module) -> None:
    for module in network.modules():
        _recompute(module)


def _recompute(module: nn.Module) -> None:
    """The tables of a rotary embedding, in float32 whatever the weights are, as its constructor makes them."""
    frequencies = module._buffers.get("inv_freq")
    if frequencies is not None and frequencies.is_meta:
        fresh = type(module)(config=module.config)
        for name, buffer in fresh.named_buffers():
            module._buffers[name] = buffer


def digest(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], vocabulary: Mapping[str, int]) -> str:
    """SHA-256 over the settings that change the numbers, the tensors as held, and the vocabulary."""
    return sha256_json({"settings": settings, "tensors": tensors_digest(tensors), "vocabulary": vocabulary})

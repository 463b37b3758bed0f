"""An autoencoder on its own: what the vae method writes and what latents for other methods are made with."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mezzotint.checkpoints import fill, read_json, read_part, write_folder, write_tensors
from mezzotint.codec import Codec, LatentSpace
from mezzotint.contract import FILE as CONTRACT
from mezzotint.errors import InputError
from mezzotint.families import load
from mezzotint.families.native import AUTOENCODERS, STEM
from mezzotint.files import write_json

SPACE = "latent_space.json"  # {"scale": number or one per channel, "shift": ...}: backbone = (z - shift) * scale


def write_codec(codec: Codec, path: Path, facts: dict[str, Any] | None = None) -> Path:
    """Write config.json, weights and latent_space.json as a folder, whole or not at all."""
    network = codec.autoencoder
    config: Any = network.config
    name = next(name for name, part in AUTOENCODERS.items() if isinstance(config, part.config))

    def write(folder: Path) -> None:
        write_json(folder / "config.json", {"_class_name": name, **asdict(config)})
        write_tensors(folder / f"{STEM}.safetensors", network.state_dict())
        write_json(folder / SPACE, {"scale": codec.space.scale, "shift": codec.space.shift, **(facts or {})})
        # marks a folder that may be replaced by a newer one of its kind
        write_json(folder / "model_index.json", {"_class_name": "MezzotintCodec", "digest": codec.digest()})

    return write_folder(path, write)


def read_codec(path: Path) -> tuple[Codec, Path]:
    """The codec of an autoencoder folder or of a model folder, and the folder that its weights came from.

    Without latent_space.json the published scaling_factor and shift_factor of config.json hold.
    """
    path = Path(path)
    if (path / CONTRACT).is_file():
        return load(path).codec, path / "vae"
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is neither an autoencoder folder (config.json is missing) nor a model folder.")
    data = read_json(path / "config.json")
    name = data.get("_class_name")
    if name not in AUTOENCODERS:
        raise InputError(f"{path / 'config.json'}: _class_name is {name!r}; known: {', '.join(AUTOENCODERS)}")
    part = AUTOENCODERS[name]
    try:
        config = part.config.from_config(data)
    except (TypeError, ValueError, InputError) as error:
        raise InputError(f"{path / 'config.json'}: {error}") from error
    network = fill(lambda: part.network(config), read_part(path, STEM), torch.float32, path)
    return Codec(network, _space(path, data)), path


def _space(path: Path, config: dict[str, Any]) -> LatentSpace:
    if not (path / SPACE).is_file():
        return LatentSpace(config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0)
    stored = read_json(path / SPACE)
    numbers = []
    for key in ("scale", "shift"):
        value = stored.get(key)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise InputError(f"{path / SPACE}: {key} must be a number, or one per channel; found {value!r}")
        numbers.append(tuple(values) if isinstance(value, list) else value)
    return LatentSpace(*numbers)

"""Control networks: read from either layout, checked against the model, put in front of its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.backbones.controlnet import Controlled, ControlNetConfig
from mezzotint.checkpoints import open_tensors
from mezzotint.checkpoints.layouts.controlnet import controlnet, controlnet_config
from mezzotint.errors import InputError
from mezzotint.families.assemble import built
from mezzotint.families.materials import Material, Section, folder_part, section_part
from mezzotint.families.model import Model, working
from mezzotint.families.parts import CONTROLS, configured

FITS = ("cross_attention_dim", "block_out_channels", "joint_attention_dim", "num_attention_heads", "attention_head_dim")


def load_control(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A control network from its folder, or from an original single file; InputError says what was found instead."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such control network: {path}")
    material = folder_part(path) if path.is_dir() else single(path)
    part, config = configured(CONTROLS, material.config, material.at)
    return built(part, config, material, dtype)


def single(path: Path) -> Material:
    """A control network from one file, in the original names (with or without their prefix)."""
    tensors = open_tensors(path)
    prefix = "control_model." if any(name.startswith("control_model.") for name in tensors) else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not any(name.startswith("input_hint_block.") for name in own):
        raise InputError(f"{path} is no control network in the original layout: give a folder with config.json instead")
    section = Section(prefix, controlnet_config, lambda config: controlnet(ControlNetConfig.from_config(config)))
    return section_part(section, own, path)


def controlled(model: Model, networks: Sequence[tuple[str | Path, float]]) -> Model:
    """The model with control networks in front of its backbone; InputError where one was made for another backbone."""
    loaded: list[nn.Module] = []
    for path, _ in networks:
        network = load_control(path, model.dtype).to(model.device)
        for name in FITS:
            ours, theirs = getattr(model.backbone.config, name, None), getattr(network.config, name, None)
            if ours is not None and theirs is not None and ours != theirs:
                raise InputError(
                    f"{path} was made for another model: its {name} is {theirs}, this {model.family} model's is {ours}"
                )
        loaded.append(network)
    return replace(model, backbone=Controlled(model.backbone, loaded, [scale for _, scale in networks]))


def hints(model: Model, pictures: Sequence[Tensor]) -> list[Tensor]:
    """What each control network is shown, of pictures (B, 3, H, W) in [-1, 1]: pixels in [0, 1], or latents."""
    networks: Any = model.backbone.networks
    with working(model, "codec"):
        return [
            (picture + 1) / 2 if network.hint == "pixels" else model.codec.encode(picture)
            for network, picture in zip(networks, pictures, strict=True)
        ]

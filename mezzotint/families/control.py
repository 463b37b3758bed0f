"""Control networks: read from either layout, checked against the model, put in front of its backbone, and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.backbones.controlnet import Controlled, ControlNetConfig
from mezzotint.backbones.mmdit_controlnet import MMDiTControlNetConfig
from mezzotint.checkpoints import open_tensors, write_folder, write_sharded
from mezzotint.checkpoints.layouts.controlnet import controlnet, controlnet_config
from mezzotint.checkpoints.layouts.mmdit import mmdit_controlnet, mmdit_controlnet_config
from mezzotint.codec import LatentSpace
from mezzotint.contract import FILE, AdapterContract, check_adapter, read_adapter_contract, write_contract
from mezzotint.errors import InputError
from mezzotint.families.assemble import built
from mezzotint.families.materials import Material, Section, folder_part, section_part
from mezzotint.families.model import Model, working
from mezzotint.families.parts import CONTROLS, configured, kind_of
from mezzotint.files import write_json
from mezzotint.images import grey
from mezzotint.layers.config import write_config

HINTED = Section("", controlnet_config, lambda config: controlnet(ControlNetConfig.from_config(config)))
STEM = "diffusion_pytorch_model"
FOLLOWS = "_condition"  # in config.json; keys with a leading underscore are the writer's own to every reader
JOINT = Section("", mmdit_controlnet_config, lambda config: mmdit_controlnet(MMDiTControlNetConfig.from_config(config)))


def load_control(path: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A control network from its folder, or from an original single file; InputError says what was found instead."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"no such control network: {path}")
    material = folder_part(path) if path.is_dir() else single(path)
    part, config = configured(CONTROLS, material.config, material.at)
    return built(part, config, material, dtype)


def single(path: Path) -> Material:
    """A control network from one file in its original names, with or without their prefix."""
    tensors = open_tensors(path)
    prefix = "control_model." if any(name.startswith("control_model.") for name in tensors) else ""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if "input_hint_block.0.weight" in own:
        return section_part(HINTED, own, path)
    if any(name.startswith("controlnet_blocks.") for name in own):
        own.pop("control_type", None)  # says which kind of picture it was trained on; no layer reads it
        return section_part(JOINT, own, path)
    raise InputError(f"{path} is no control network in an original layout: give a folder with config.json instead")


def controlled(model: Model, networks: Sequence[tuple[str | Path | nn.Module, float]]) -> Model:
    """The model with control networks in front of its backbone, each a path, or a network in training itself.

    InputError where one was made for another backbone, or was trained under another process or latent space.
    """
    loaded: list[nn.Module] = []
    for network, _ in networks:
        if not isinstance(network, nn.Module):
            check(model, Path(network))
            network = load_control(network, model.dtype).to(model.device)
        loaded.append(network)
    return replace(model, backbone=Controlled(model.backbone, loaded, [scale for _, scale in networks]))


def check(model: Model, path: Path) -> None:
    """Refuse a control network whose own contract does not fit the model's; published ones come without."""
    contract = read_adapter_contract(path)
    if contract is not None:
        base_at = model.path / FILE if model.path and (model.path / FILE).is_file() else model.path
        check_adapter(model.contract, base_at or Path("the model"), contract, path / FILE)


def save_control(network: nn.Module, contract: AdapterContract, path: str | Path, condition: str = "") -> Path:
    """Write the folder of a control network, whole or not at all: config.json, weights, contract.json.

    `condition` says for people what it follows: mask, edges.
    """
    name, _ = kind_of(CONTROLS, network)
    config: Any = network.config

    def write(folder: Path) -> None:
        note = {FOLLOWS: condition} if condition else {}
        write_json(folder / "config.json", {**write_config(config, name), **note})
        write_sharded(folder, STEM, {key: tensor.detach() for key, tensor in network.state_dict().items()})
        write_contract(contract, folder)

    return write_folder(Path(path), write)


def hints(model: Model, pictures: Sequence[Tensor]) -> list[Tensor]:
    """What each control network is shown, of pictures (B, 3, H, W) in [-1, 1]: pixels in [0, 1], or latents."""
    networks: Any = model.backbone.networks
    with working(model, "codec"):
        return [shown(model, network, picture) for network, picture in zip(networks, pictures, strict=True)]


def shown(model: Model, network: Any, picture: Tensor) -> Tensor:
    """Latents are scaled for all, and shifted for those networks alone that were trained so.

    Pictures have three colours; a network, or a model whose latents are asked for, that knows one gets their grey.
    """
    if network.hint == "pixels":
        return ((grey(picture) if network.config.conditioning_channels == 1 else picture) + 1) / 2
    if network.config.extra_conditioning_channels:
        raise InputError("a control network that repaints needs a mask beside its picture, which cannot be given here")
    space = model.codec.space
    latents = model.codec.encode(grey(picture) if model.codec.pixel_channels == 1 else picture)
    return latents if network.config.hint_shift else LatentSpace(space.scale).to_backbone(space.to_autoencoder(latents))

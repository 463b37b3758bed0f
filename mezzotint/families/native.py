"""Models of Mezzotint's own training: which parts there are, how a folder of them is written and read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mezzotint.checkpoints import fill, read_json, read_part, write_folder, write_sharded
from mezzotint.codec import Codec, LatentSpace
from mezzotint.contract import (
    FILE,
    Contract,
    TextFacts,
    agree,
    check_backbone,
    check_codec,
    check_text,
    read_contract,
    write_contract,
)  # fmt: skip
from mezzotint.digests import tensors_digest
from mezzotint.errors import InputError
from mezzotint.families.assemble import space_of
from mezzotint.families.materials import read_folder
from mezzotint.families.model import Model, placed
from mezzotint.families.parts import AUTOENCODERS, BACKBONES, Part, configured, kind_of
from mezzotint.families.registry import FAMILIES
from mezzotint.families.scheduler import scheduler_config
from mezzotint.files import write_json
from mezzotint.layers.config import write_config
from mezzotint.layers.pages import Pages
from mezzotint.text import TextEncoder
from mezzotint.text.minilm import load_saved

INDEX, STEM, MARK = "model_index.json", "diffusion_pytorch_model", "Mezzotint"
SPACE = "latent_space.json"  # beside an autoencoder: its latent space, and the codecs whose latents it decodes


def save(model: Model, path: Path, dtype: torch.dtype | None = None) -> Model:
    """Write a model folder, whole or not at all, and return the model as that folder has it.

    `dtype` stores the backbone narrower (float16 halves the file); the codec keeps its own. The contract gets the
    digest of the weights as stored; a codec or text encoder that the contract does not speak of is refused.
    """
    path, model = Path(path), identified(model)
    backbone, codec = model.backbone, model.codec
    name, part = kind_of(BACKBONES, backbone)
    vae_name, vae = kind_of(AUTOENCODERS, codec.autoencoder)
    stored = {key: _stored(tensor, dtype) for key, tensor in backbone.state_dict().items()}
    contract, at = model.contract.model_copy(update={"weights": tensors_digest(stored)}), path / FILE
    contract = check_backbone(contract, at, part.facts(backbone.config), contract.weights, path / part.folder)
    contract = check_codec(contract, at, codec, path / vae.folder)
    contract = check_text(contract, at, TextFacts.of(model.text) if model.text else None, path / "text_encoder")

    def write(folder: Path) -> None:
        _write_part(folder / part.folder, name, backbone.config, stored)
        write_autoencoder(codec, folder / vae.folder)
        write_json(
            folder / "scheduler" / "scheduler_config.json",
            scheduler_config(contract.process, contract.sampling, learned=contract.variance == "learned"),
        )
        if model.text:
            model.text.save(folder)
        write_contract(contract, folder)
        parts = {part.folder: [MARK, name], vae.folder: [MARK, vae_name]}
        write_json(folder / INDEX, {"_class_name": MARK, **parts})

    return replace(model, contract=contract, path=write_folder(path, write))


def identified(model: Model) -> Model:
    """The model with the digests that its contract still lacks: published checkpoints come without them.

    A pass over the weights, about a second per gigabyte.
    """
    contract, pages = model.contract, Pages()
    if not contract.weights:
        weights = tensors_digest(model.backbone.state_dict(), pages.release)
        contract = contract.model_copy(update={"weights": weights})
    if model.text and contract.text and not all(facts.digest for facts in contract.text.encoders):
        contract = contract.model_copy(update={"text": TextFacts.of(model.text)})
    return replace(model, contract=contract)


def load(path: Path, device: str | torch.device, dtype: torch.dtype, force: bool, offload: bool = False) -> Model:
    """Read a model folder; every part is checked against contract.json, and `force` records what it lets pass.

    Weights are mapped from disk and put in place; in their stored dtype they are not copied. Digests are verified on
    the values as read, which costs about a second per gigabyte.
    """
    path = Path(path)
    contract, at = read_contract(path), path / FILE
    found = [(name, part) for name, part in BACKBONES.items() if (path / part.folder / "config.json").is_file()]
    if not found:
        raise InputError(f"{path} has no backbone: neither unet/config.json nor transformer/config.json is there")
    wanted = str(dtype).removeprefix("torch.")
    limits = {"dtype": wanted if wanted in contract.dtypes.backbone else " or ".join(contract.dtypes.backbone)}
    contract = contract.overridden(agree("", limits, at, {"dtype": wanted}, Path("the request"), force))

    folder = path / found[0][1].folder
    part, config = _read_config(BACKBONES, folder)
    tensors = read_part(folder, STEM)
    digest = tensors_digest(tensors, Pages().release)
    contract = check_backbone(contract, at, part.facts(config), digest, folder, force)
    backbone = fill(lambda: part.network(config), tensors, dtype, folder)

    codec = read_autoencoder(path / "vae", contract.latent.space())
    contract = check_codec(contract, at, codec, path / "vae", force)
    codec.autoencoder.to(dtype=dtype if wanted in contract.dtypes.codec else torch.float32)

    text = read_text(path, contract)
    contract = check_text(contract, at, TextFacts.of(text) if text else None, path / "text_encoder", force)
    if text is not None and contract.family in FAMILIES:
        for network in text.networks.values():
            network.to(dtype)
    return placed(Model(contract, backbone, codec, text, path), device, offload)


def read_text(path: Path, contract: Contract) -> TextEncoder | None:
    """The text encoder beside the weights: a published family's own, as that family reads it, or MiniLM.

    In float32, which is what its digest is made of.
    """
    family = FAMILIES.get(contract.family)
    if family is None or family.text is None:
        return load_saved(path) if (path / "text_encoder").is_dir() else None
    materials = read_folder(path)
    written = any(part.startswith("text_encoder") for part in materials.parts)  # whatever their folders are called
    return family.text(materials, torch.float32) if written else None


def read_autoencoder(folder: Path, space: LatentSpace | None = None) -> Codec:
    """The codec of an autoencoder's folder, in float32, with the latent space that is given, or that its files state.

    InputError where it claims another codec's latents, and its encoder is not the one that the claim was made for.
    """
    part, config = _read_config(AUTOENCODERS, folder)
    network = fill(lambda: part.network(config), read_part(folder, STEM), torch.float32, folder)
    stated = read_json(folder / SPACE) if (folder / SPACE).is_file() else {}
    if space is None:
        space = _stated_space(stated, folder / SPACE) if stated else space_of(network)
    decodes = stated.get("decodes", [])
    if not isinstance(decodes, list) or not all(isinstance(digest, str) for digest in decodes):
        raise InputError(f"{folder / SPACE}: decodes must be a list of digests; found {decodes!r}")
    codec = Codec(network, space, decodes)
    if decodes and stated.get("encoder") != codec.encoder_digest():
        raise InputError(
            f"{folder / SPACE} says that latents of {decodes[0][:12]}... are decoded here, but the encoder's weights in"
            f" {folder} are not those it was written for.\nRestore the folder from the run that made it."
        )
    return codec


def write_autoencoder(codec: Codec, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """config.json and weights, and in latent_space.json what neither says; `facts` are more of what is known of it."""
    name, _ = kind_of(AUTOENCODERS, codec.autoencoder)
    _write_part(folder, name, codec.autoencoder.config, codec.autoencoder.state_dict())
    stated: dict[str, Any] = {"scale": codec.space.scale, "shift": codec.space.shift, **(facts or {})}
    if codec.decodes:
        stated |= {"decodes": list(codec.decodes), "encoder": codec.encoder_digest()}
    if codec.decodes or facts is not None:
        write_json(folder / SPACE, stated)


def _stated_space(stated: Mapping[str, Any], at: Path) -> LatentSpace:
    numbers: list[Any] = []
    for key in ("scale", "shift"):
        value = stated.get(key)
        values = value if isinstance(value, list) else [value]
        if not values or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise InputError(f"{at}: {key} must be a number, or one per channel; found {value!r}")
        numbers.append(tuple(values) if isinstance(value, list) else value)
    return LatentSpace(*numbers)


def _read_config(parts: Mapping[str, Part], folder: Path) -> tuple[Part, Any]:
    at = folder / "config.json"
    return configured(parts, read_json(at), at)


def _write_part(folder: Path, name: str, config: Any, tensors: Mapping[str, Tensor]) -> None:
    write_json(folder / "config.json", write_config(config, name))
    write_sharded(folder, STEM, tensors)


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype) if dtype and tensor.is_floating_point() else tensor.detach()

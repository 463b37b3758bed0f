"""From the parts of a published checkpoint to a model with the contract that its files imply."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mezzotint.checkpoints import fill
from mezzotint.codec import Codec, LatentSpace
from mezzotint.codec.flux2_vae import Flux2VAE, latent_space
from mezzotint.codec.pixels import Pixels, PixelsConfig
from mezzotint.contract import Contract, DtypeFacts, LatentFacts, Licence, TextFacts, agree, check_backbone
from mezzotint.errors import InputError
from mezzotint.families.family import Asked, Family, unanswered
from mezzotint.families.materials import Material, Materials
from mezzotint.families.model import Model, placed
from mezzotint.families.parts import AUTOENCODERS, BACKBONES, Part, configured

HALVES = ("float32", "bfloat16", "float16")


def assemble(
    family: Family,
    materials: Materials,
    asked: Asked,
    device: str | torch.device,
    dtype: torch.dtype,
    force: bool,
    offload: bool = False,
) -> Model:
    """Build every part in place and write the contract; InputError where parts are missing or do not fit each other."""
    question = unanswered(family, materials, asked)
    if question:
        raise InputError(f"{materials.path}: {question.text}")
    facts = family.facts(materials, asked)
    material = materials.material(family.backbone, f"without it there is no {family.title}")
    part, config = configured(BACKBONES, material.config, material.at / "config.json")
    facts.setdefault("mask_cells", "corner")  # as the reference reads masks, whatever the published model
    facts.setdefault("dtypes", DtypeFacts(backbone=HALVES, codec=codec_dtypes(materials, family)))
    dtypes: DtypeFacts = facts["dtypes"]

    wanted = str(dtype).removeprefix("torch.")
    limits = {"dtype": wanted if wanted in dtypes.backbone else " or ".join(dtypes.backbone)}
    overrides = agree("", limits, materials.path, {"dtype": wanted}, materials.path, force)

    backbone = built(part, config, material, dtype)
    codec = codec_of(materials, family, dtype if wanted in dtypes.codec else torch.float32)
    text = family.text(materials, dtype) if family.text else None
    contract = Contract(
        family=family.name,
        latent=LatentFacts.of(codec),
        text=TextFacts.of(text, digests=False) if text else None,
        licence=Licence(weights=family.licence(materials)),
        **facts,
    ).overridden(overrides)
    contract = check_backbone(contract, materials.path, part.facts(config), "", material.at, force)
    return placed(Model(contract, backbone, codec, text, materials.path), device, offload)


def built(part: Part, config: Any, material: Material, dtype: torch.dtype) -> nn.Module:
    """The network with its weights in place."""
    return fill(lambda: part.network(config), material.tensors, dtype, material.at)


def codec_of(materials: Materials, family: Family, dtype: torch.dtype) -> Codec:
    """The autoencoder with the latent space that its settings (or its statistics) state; pixels where there is none."""
    if not family.codec:
        channels = int(materials.config(family.backbone, "in_channels", 3))
        return Codec(Pixels(PixelsConfig(in_channels=channels)))
    remedy = f"give the folder that has one (--parts), or put {family.codec}/ beside the file"
    material = materials.material(family.codec, remedy)
    part, config = configured(AUTOENCODERS, material.config, material.at / "config.json")
    network = built(part, config, material, dtype)
    return Codec(network, space_of(network))


def space_of(network: nn.Module) -> LatentSpace:
    """The latent space that an autoencoder's stored statistics or its settings state."""
    if isinstance(network, Flux2VAE):
        return latent_space(network)
    scale, shift = (getattr(network.config, f"{name}_factor", None) for name in ("scaling", "shift"))
    return LatentSpace(scale=1.0 if scale is None else scale, shift=shift or 0.0)  # pyright: ignore[reportArgumentType]


def codec_dtypes(materials: Materials, family: Family) -> tuple[str, ...]:
    """Number formats of the autoencoder: half precision overflows where the settings say `force_upcast`."""
    overflows = family.codec != "" and materials.config(family.codec, "force_upcast", False) is True
    return ("float32", "bfloat16") if overflows else HALVES

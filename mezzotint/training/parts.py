"""From a recipe's tables to the parts that a method works with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mezzotint.backbones.initialise import initialise
from mezzotint.codec import DECODING, Codec
from mezzotint.codec.pixels import Pixels, PixelsConfig
from mezzotint.contract import (
    FILE,
    ClassFacts,
    Contract,
    LatentFacts,
    Licence,
    SamplingFacts,
    TextFacts,
    agree,
    check_codec,
    check_finetune,
)
from mezzotint.errors import InputError
from mezzotint.families import Model, load
from mezzotint.families.model import placed, places
from mezzotint.families.native import AUTOENCODERS, identified
from mezzotint.governance.licences import UNSTATED
from mezzotint.process import Process, RectifiedFlow
from mezzotint.text import TextEncoder
from mezzotint.training.codecs import Found, find, read_codec
from mezzotint.training.tables import Base, Recipe

Network = TypeVar("Network", bound=nn.Module)
# recipe name -> module, network, configuration
BACKBONES = {
    "unet": ("mezzotint.backbones.unet", "UNet", "mezzotint.backbones.unet_config", "UNetConfig"),
    "text_unet": ("mezzotint.backbones.unet", "UNet", "mezzotint.backbones.unet_config", "ConditionalUNetConfig"),
    "dit": ("mezzotint.backbones.dit", "DiT", "mezzotint.backbones.dit", "DiTConfig"),
}
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
AUTOENCODER_NAMES = {  # recipe name -> published class name
    "kl_vae": "AutoencoderKL", "flux2_vae": "AutoencoderKLFlux2", "vq": "VQModel", "patch_pca": "PatchPCA",
}  # fmt: skip


def model(recipe: Recipe, device: torch.device) -> Model:
    """The model that a recipe trains: its base, checked against what the recipe says, or a new one.

    Parts rest on the CPU until they work on `device`; nothing trains yet (see `trainable`).
    """
    return based(recipe, recipe.base, device) if recipe.base else fresh(recipe, device)


def based(recipe: Recipe, plan: Base, device: torch.device) -> Model:
    """The base with the digests of its parts; InputError where the recipe contradicts its contract.

    Both values and both files are named. A distilled base needs the explicit word.
    """
    found = load(
        Path(plan.path), device, DTYPES[plan.dtype], prediction=plan.prediction, distilled=plan.distilled,
        parts=plan.parts, offload=True,
    )  # fmt: skip
    contract, at = found.contract, Path(plan.path) / FILE if (Path(plan.path) / FILE).is_file() else Path(plan.path)
    if contract.guidance.distilled and not plan.train_distilled:
        raise InputError(
            f"{plan.path} is a distilled model: training undoes its few steps bit by bit, and what is learned fits its"
            " base badly.\nTrain on the base model that it was distilled from, or say base.train_distilled = true."
        )
    if recipe.process is not None:
        scheduler = Path(plan.path) / "scheduler" / "scheduler_config.json"
        said_by = scheduler if at.name != FILE and scheduler.is_file() else at
        check_finetune(contract, said_by, Process.from_dict(recipe.process), recipe.at)
    said: dict[str, Any] = {}
    if recipe.classes and recipe.classes.names is not None:
        said["classes"] = recipe.classes.names
    elif recipe.classes and contract.classes is None:
        raise InputError(f"{recipe.at} has a [classes] table, but {at} has no classes: leave it out.")
    if recipe.inpaint and (recipe.inpaint.k is not None or contract.inpaint is None):
        said["inpaint"] = recipe.inpaint.k or 1
    ours = {"classes": list(contract.classes.names) if contract.classes else None, "inpaint": contract.inpaint}
    remedy = "Leave it out of the recipe: the base's holds."
    agree("", {key: ours[key] for key in said}, at, said, recipe.at, force=False, remedy=remedy)
    if recipe.text and recipe.text.encoder:
        raise InputError(
            f"{recipe.at}: text.encoder is for new models; {at} reads captions with its own: leave it out."
        )
    if found.codec.pixel_channels != recipe.data.channels:
        raise InputError(
            f"{recipe.at}: data.channels is {recipe.data.channels}, the codec of {at} reads"
            f" {found.codec.pixel_channels}."
        )
    if recipe.codec and recipe.codec.path:
        other, where = read_codec(Path(recipe.codec.path))
        check_codec(contract, at, other, where)
        found = replace(found, codec=other)  # the base's own, or one with a decoder that was trained further
    return identified(found)


def fresh(recipe: Recipe, device: torch.device) -> Model:
    """A new network and its contract, from the recipe's tables."""
    if recipe.process is None:
        raise InputError('the recipe needs a [process] table: prediction = "flow" and [process.schedule] kind = ...')
    process = Process.from_dict(recipe.process)
    codec, licence = Codec(Pixels(PixelsConfig(recipe.data.channels))), Licence(weights=UNSTATED)
    if recipe.codec and recipe.codec.path:
        given = find(Path(recipe.codec.path))
        codec, licence = given.codec, given.licence
        if codec.pixel_channels != recipe.data.channels:
            raise InputError(
                f"data.channels is {recipe.data.channels}, the codec {given.at} reads {codec.pixel_channels}."
            )
    text = encoder(recipe)
    names = tuple(recipe.classes.names or ()) if recipe.classes else ()
    if recipe.classes and not names:
        raise InputError(f"{recipe.at}: classes.names is missing, which a new model needs.")
    network = backbone(recipe, codec, text)
    contract = Contract(
        process=process,
        latent=LatentFacts.of(codec),
        size=recipe.data.size,
        text=TextFacts.of(text) if text else None,
        classes=ClassFacts(names=names, null=len(names)) if names else None,
        inpaint=(recipe.inpaint.k or 1) if recipe.inpaint else None,
        sampling=SamplingFacts(
            sampler="flow_euler" if isinstance(process.schedule, RectifiedFlow) else "ddim", steps=20
        ),
        licence=licence,
    )
    return placed(Model(contract, network.eval().requires_grad_(False), codec, text), device, offload=True)


def trainable(network: Network, device: torch.device) -> Network:
    """The network on the device with every parameter training: float32, and in memory of its own."""
    fresh: dict[int, Tensor] = {}  # one tensor may have several names
    for table, name, tensor in places([network]):
        if id(tensor) not in fresh:
            own = tensor.detach().to(device, torch.float32 if tensor.is_floating_point() else None, copy=True)
            fresh[id(tensor)] = nn.Parameter(own) if isinstance(tensor, nn.Parameter) else own
        table[name] = fresh[id(tensor)]
    return network.train()


def settled(network: Network, device: torch.device) -> Network:
    """The network on the device for the whole run, with nothing in it training."""
    return network.to(device).eval().requires_grad_(False)


def autoencoder(recipe: Recipe) -> tuple[nn.Module, Found | None]:
    """The autoencoder that the vae method trains, in train mode, and what it started from: None for a new one.

    With `trains = "decoder"` what only encodes, or does both, is frozen.
    """
    plan = recipe.vae
    if plan is None:
        raise InputError("the recipe needs a [vae] table")
    if plan.start:
        if plan.config:
            raise InputError(f"{recipe.at}: vae.config is for a new autoencoder, vae.start has its own: leave one out.")
        found = find(Path(plan.start))
        network, channels = found.codec.autoencoder, found.codec.pixel_channels
        if not any(True for _ in network.parameters()):
            raise InputError(f"{plan.start} has no autoencoder: it works on pixels. Give another vae.start.")
        if channels != recipe.data.channels:
            raise InputError(f"data.channels is {recipe.data.channels}, {found.at} reads {channels}.")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(plan.trains == "all" or name.startswith(DECODING))
        return network.train(), found
    if plan.trains == "decoder":
        raise InputError(f'{recipe.at}: vae.trains = "decoder" needs a vae.start: a new encoder knows nothing yet.')
    name = AUTOENCODER_NAMES.get(plan.name)
    if name is None:
        near = difflib.get_close_matches(plan.name, AUTOENCODER_NAMES, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown autoencoder '{plan.name}': did you mean '{near}'?")
    part = AUTOENCODERS[name]
    known = {f.name for f in fields(part.config)}
    implied = {key: recipe.data.channels for key in ("in_channels", "out_channels", "pixel_channels") if key in known}
    return part.network(_config(part.config, {**implied, **plan.config}, "vae.config")), None


def times(under: Process, share: Tensor) -> Tensor:
    """Times (B,) on the network's clock at shares 0..1 of it, the noisy end at 1; not bent by a static shift."""
    schedule = under.schedule
    if isinstance(schedule, RectifiedFlow):
        return share * schedule.clock
    return (share * schedule.timesteps).long().clamp(max=schedule.timesteps - 1)


def backbone(recipe: Recipe, codec: Codec, text: TextEncoder | None) -> nn.Module:
    """A fresh network: channels, classes and text width follow from the other parts."""
    plan = recipe.backbone
    if plan is None:
        raise InputError(f"{recipe.at} needs a [backbone] table with a name: {', '.join(BACKBONES)}")
    if plan.name not in BACKBONES:
        near = difflib.get_close_matches(plan.name, BACKBONES, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown backbone '{plan.name}': did you mean '{near}'? Valid: {', '.join(BACKBONES)}")
    module, network, config_module, config = BACKBONES[plan.name]
    kind: Any = getattr(import_module(config_module), config)
    known = {f.name for f in fields(kind)}
    extra = codec.channels + (recipe.inpaint.k or 1) ** 2 if recipe.inpaint else 0
    classes = len(recipe.classes.names or ()) if recipe.classes else None
    implied: dict[str, Any] = {
        "in_channels": codec.channels + extra,
        "out_channels": codec.channels,
        "num_class_embeds": None if classes is None else classes + 1,
        "num_embeds_ada_norm": classes,
    }
    if text is not None:
        implied["cross_attention_dim"] = text.width
    settings = dict(plan.config)
    for key, value in implied.items():
        if key not in known:
            continue
        if key in settings and settings[key] != value:
            raise InputError(
                f"backbone.config.{key} is {settings[key]!r}, but the recipe's codec, classes, inpaint and text make it"
                f" {value!r}. Leave it out, or change those."
            )
        if value is not None:
            settings[key] = value
    if "sample_size" in known:
        settings.setdefault("sample_size", recipe.data.size[1] // codec.factor)
    built: nn.Module = getattr(import_module(module), network)(_config(kind, settings, "backbone.config"))
    return initialise(built)


def _config(kind: Any, settings: dict[str, Any], where: str) -> Any:
    try:
        return kind.from_config(settings)
    except (TypeError, ValueError, InputError) as error:
        raise InputError(f"{where}: {error}") from error


def encoder(recipe: Recipe) -> TextEncoder | None:
    """The caption encoder of a new model, as its recipe names it: minilm or a folder."""
    if recipe.text is None:
        return None
    from mezzotint.text import minilm

    if recipe.text.encoder in (None, "minilm"):
        return minilm.load_package(recipe.text.length)
    return minilm.load_folder(Path(recipe.text.encoder), recipe.text.length)

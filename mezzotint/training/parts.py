"""From a recipe's tables to the parts that a method works with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.backbones.initialise import initialise
from mezzotint.codec import Codec
from mezzotint.codec.pixels import Pixels, PixelsConfig
from mezzotint.conditioning import Conditioning, stack
from mezzotint.contract import FILE, TextFacts, agree, check_codec, check_finetune, check_text
from mezzotint.errors import InputError
from mezzotint.families import Model, load
from mezzotint.families.native import AUTOENCODERS
from mezzotint.process import Process, RectifiedFlow, weighting
from mezzotint.text import TextEncoder
from mezzotint.training.codecs import read_codec
from mezzotint.training.recipe import Loss, Recipe

# recipe name -> module, network, configuration
BACKBONES = {
    "unet": ("mezzotint.backbones.unet", "UNet", "mezzotint.backbones.unet_config", "UNetConfig"),
    "text_unet": ("mezzotint.backbones.unet", "UNet", "mezzotint.backbones.unet_config", "ConditionalUNetConfig"),
    "dit": ("mezzotint.backbones.dit", "DiT", "mezzotint.backbones.dit", "DiTConfig"),
}
RECIPE = Path("the recipe")
AUTOENCODER_NAMES = {"kl_vae": "AutoencoderKL", "patch_pca": "PatchPCA"}  # recipe name -> published class name


def base(recipe: Recipe) -> Model | None:
    """The model that training goes on from; its contract holds, and a recipe that contradicts it is refused."""
    if recipe.backbone is None or recipe.backbone.start is None:
        return None
    if recipe.backbone.name or recipe.backbone.config:
        raise InputError("backbone.start takes its network from the model folder: leave out backbone.name and .config.")
    model = load(Path(recipe.backbone.start))
    if model.contract.guidance.distilled:
        raise InputError(f"{model.path} is distilled; the full method would undo that. Start from its base model.")
    classes = model.contract.classes
    ours = {"classes": list(classes.names) if classes else None, "inpaint": model.contract.inpaint}
    theirs: dict[str, Any] = {
        "classes": recipe.classes.names if recipe.classes else None,
        "inpaint": recipe.inpaint.k if recipe.inpaint else None,
    }
    agree("", ours, Path(recipe.backbone.start) / FILE, theirs, RECIPE, force=False)
    return model


def process(recipe: Recipe, start: Model | None) -> Process:
    """The process a recipe states, or that of the model it starts from; the two must agree."""
    if start is not None:
        if recipe.process is not None:
            stated = Process.from_dict(recipe.process)
            check_finetune(start.contract, Path(str(start.path)) / FILE, stated, RECIPE)
        return start.process
    if recipe.process is None:
        raise InputError('the recipe needs a [process] table: prediction = "flow" and [process.schedule] kind = ...')
    return Process.from_dict(recipe.process)


def codec(recipe: Recipe, start: Model | None) -> tuple[Codec, Path]:
    """The recipe's codec and where its weights lie; without a [codec] that of the start, or the pixels themselves."""
    if recipe.codec is not None:
        found, where = read_codec(Path(recipe.codec.path))
    elif start is not None:
        found, where = start.codec, Path(str(start.path)) / "vae"
    else:
        found, where = Codec(Pixels(PixelsConfig(recipe.data.channels))), Path("pixels")
    if start is not None:
        check_codec(start.contract, Path(str(start.path)) / FILE, found, where)
    if found.pixel_channels != recipe.data.channels:
        raise InputError(f"data.channels is {recipe.data.channels}, the codec {where} reads {found.pixel_channels}.")
    return found, where


def autoencoder(recipe: Recipe) -> nn.Module:
    """The autoencoder that the vae method trains: a fresh one, or that of a folder."""
    plan = recipe.vae
    if plan is None:
        raise InputError("the recipe needs a [vae] table")
    if plan.start:
        found, where = read_codec(Path(plan.start))
        if found.pixel_channels != recipe.data.channels:
            raise InputError(f"data.channels is {recipe.data.channels}, {where} reads {found.pixel_channels}.")
        return found.autoencoder.train().requires_grad_(True)
    name = AUTOENCODER_NAMES.get(plan.name)
    if name is None:
        near = difflib.get_close_matches(plan.name, AUTOENCODER_NAMES, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown autoencoder '{plan.name}': did you mean '{near}'?")
    part = AUTOENCODERS[name]
    known = {f.name for f in fields(part.config)}
    implied = {key: recipe.data.channels for key in ("in_channels", "out_channels", "pixel_channels") if key in known}
    return part.network(_config(part.config, {**implied, **plan.config}, "vae.config"))


def check_loss(plan: Loss, under: Process) -> None:
    """InputError for a density or weighting that does not exist, before anything is prepared for it."""
    t = weighting.draw_times(under, 1, torch.Generator(), plan.density, plan.mean, plan.deviation)  # type: ignore[arg-type]
    weighting.weights(under, under.levels(t), plan.weighting, plan.gamma)


def times(under: Process, share: Tensor) -> Tensor:
    """Times (B,) on the network's clock at shares 0..1 of it, the noisy end at 1; not bent by a static shift."""
    schedule = under.schedule
    if isinstance(schedule, RectifiedFlow):
        return share * schedule.clock
    return (share * schedule.timesteps).long().clamp(max=schedule.timesteps - 1)


def backbone(recipe: Recipe, codec: Codec, text: TextEncoder | None, start: Model | None) -> nn.Module:
    """The start's network, or a fresh one: channels, classes and text width then follow from the other parts."""
    if start is not None:
        return start.backbone.train().requires_grad_(True)
    plan = recipe.backbone
    if plan is None or plan.name is None:
        raise InputError(f"the recipe's [backbone] needs a name: {', '.join(BACKBONES)}")
    if plan.name not in BACKBONES:
        near = difflib.get_close_matches(plan.name, BACKBONES, n=1, cutoff=0.0)[0]
        raise InputError(f"unknown backbone '{plan.name}': did you mean '{near}'? Valid: {', '.join(BACKBONES)}")
    module, network, config_module, config = BACKBONES[plan.name]
    kind: Any = getattr(import_module(config_module), config)
    known = {f.name for f in fields(kind)}
    extra = codec.channels + recipe.inpaint.k**2 if recipe.inpaint else 0
    classes = len(recipe.classes.names) if recipe.classes else None
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


def text(recipe: Recipe, start: Model | None) -> TextEncoder | None:
    """The caption encoder that a recipe names, minilm or a folder; for a start it must be the start's."""
    found: TextEncoder | None = None
    where = RECIPE
    if recipe.text is not None and recipe.text.encoder != "none":
        from mezzotint.text import minilm

        if recipe.text.encoder == "minilm":
            found = minilm.load_package(recipe.text.length)
        else:
            where = Path(recipe.text.encoder)
            found = minilm.load_folder(where, recipe.text.length)
    if start is not None:
        check_text(start.contract, Path(str(start.path)) / FILE, TextFacts.of(found) if found else None, where)
    return found


class Captions:
    """Every distinct caption encoded once; row 0 is the empty prompt, which dropout puts in a caption's place."""

    def __init__(self, encoder: TextEncoder, captions: Sequence[str], batch: int = 64) -> None:
        distinct = ["", *sorted(set(captions) - {""})]
        place = {caption: i for i, caption in enumerate(distinct)}
        self.of = torch.tensor([place[caption] for caption in captions])  # (N,) image -> row
        encoded = [encoder.encode(distinct[i : i + batch]) for i in range(0, len(distinct), batch)]
        self.rows = stack(encoded)

    def take(self, rows: Tensor) -> Conditioning:
        """The conditioning of rows (B,)."""
        return self.rows.map(lambda tensor: tensor.to(rows.device)[rows])

    def extend(self, other: Captions) -> Tensor:
        """Append another set's rows; returns its image -> row in this one."""
        start = len(self.rows.tokens) if self.rows.tokens is not None else 0
        self.rows = stack([self.rows, other.rows])
        return other.of + start

"""LoRA and textual inversion files as the reference libraries write and read them, and how far our runs are apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import reference_flux2
import reference_sd
import reference_sd35
import reference_sdxl
import torch
from networks import relative
from parity_rows import Row
from safetensors.torch import save_file
from torch import Tensor, nn

import mezzotint as mz
from mezzotint.adapters import BACKBONE
from mezzotint.checkpoints.keymap import Entry
from mezzotint.families.adapt import adapted, original_names

Change = tuple[Tensor, Tensor, float]  # down, up, alpha
Changes = dict[str, dict[str, Change]]  # by part of the model, by module

SCHEDULERS = {
    "ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler", "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler", "lcm": "LCMScheduler",
}  # fmt: skip
PROMPT, NEGATIVE = "a photo of a cracked solar cell", "the dark area"
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
KERNELS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in", "proj_out")
JOINT = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj",
    "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "linear_in", "linear_out", "to_qkv_mlp_proj",
    "attn.to_out",
)  # fmt: skip
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
CONSISTENCY = (*LINEAR, *KERNELS)  # as in LCM-LoRA
KOHYA = {BACKBONE: "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "text_encoder_3": "lora_te3"}


# Checkpoints, opened by both.


def sd1(root: Path) -> Path:
    return reference_sd.write_plain(root)


def sd2(root: Path) -> Path:
    return reference_sd.write_second(root)


@cache
def sdxl(root: Path) -> Path:
    return reference_sdxl.write_base(root)


@cache
def sd35(root: Path) -> Path:
    return reference_sd35.write(root / "sd35", reference_sd35.MEDIUM)


@cache
def klein(root: Path) -> Path:
    return reference_flux2.write(root / "klein", reference_flux2.BASE)


def fresh(folder: Path) -> Any:
    """A pipeline of the reference with nothing in it but what the folder has."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def loaded(folder: Path) -> mz.Model:
    return mz.load(folder)


# Adapter files.


def invented(
    model: mz.Model, endings: Sequence[str], parts: Sequence[str] = (BACKBONE,), seed: int = 0, original: bool = False
) -> Changes:
    """Random matrices and an alpha for every module of these parts whose name ends so; ranks differ among them.

    `original` gives the backbone's modules as the original layout has them, several projections in one.
    """
    generator = torch.Generator().manual_seed(seed)
    networks: dict[str, nn.Module] = {BACKBONE: model.backbone, **(model.text.networks if model.text else {})}
    found: Changes = {}
    for part in parts:
        shapes = {name: module.weight.shape for name, module in networks[part].named_modules() if holds(module)}
        names = {name: (name,) for name in shapes}
        if original and part == BACKBONE:
            names = {row.theirs: row.ours for row in original_names(model) if row.ours and row.ours[0] in shapes}
        for index, (name, modules) in enumerate(names.items()):
            if modules[0].endswith((*endings,)):
                shape, rank = shapes[modules[0]], 3 + index % 2
                rows = sum(shapes[module][0] for module in modules)
                down = torch.randn(rank, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
                up = torch.randn(rows, rank, *[1] * (len(shape) - 2), generator=generator) / (2 * rank**0.5)
                # the reference's kohya loader cannot tell the alphas of one attention's projections apart, and of a
                # text encoder's it takes one for all
                alpha = 2.0 if part != BACKBONE else 1.5 if "attn" in name else 2.5 + index % 3
                found.setdefault(part, {})[name] = (down, up, alpha)
    assert found.keys() == {*parts}
    return found


def holds(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def divided(changes: Changes, rows: Sequence[Entry]) -> Changes:
    """The backbone's changes under the folder's names: a fused one is `down` for each and its share of `up`."""
    ours = {row.theirs: row.ours for row in rows}
    return {
        BACKBONE: {
            module: (down, share, alpha)
            for name, (down, up, alpha) in changes[BACKBONE].items()
            for module, share in zip(ours[name], up.chunk(len(ours[name])), strict=True)
        }
    }


def spelled(changes: Changes, style: str, rows: Sequence[Entry] = (), backbone: str = "unet") -> dict[str, Tensor]:
    """A file's tensors in a published spelling; `rows` renames the backbone's modules as the original layout does."""
    original = {row.ours[0]: row.theirs for row in rows if row.ours}
    halves = {
        "diffusers": ("lora_A", "lora_B"), "original": ("lora_A", "lora_B"), "processors": ("down", "up"),
        "older": ("lora.down", "lora.up"), "kohya": ("lora_down", "lora_up"), "lora_te": ("lora_down", "lora_up"),
    }[style]  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for part, modules in changes.items():
        for name, matrices in modules.items():
            called = original.get(name, name)
            stem = f"{backbone if part == BACKBONE else part}.{called}."
            if style in ("kohya", "lora_te"):
                prefix = style if part != BACKBONE and style == "lora_te" else KOHYA[part]
                stem = f"{prefix}_{called.replace('.', '_')}."
                tensors[f"{stem}alpha"] = torch.tensor(matrices[2])
            elif style == "original":
                stem = f"diffusion_model.{called}."
            elif style == "processors":
                stem = f"{processor(stem.removesuffix('.'))}_lora."
            tensors |= {f"{stem}{half}.weight": matrix for half, matrix in zip(halves, matrices, strict=False)}
    if style == "older":
        tensors = {
            key.replace(".lora.", ".lora_linear_layer.") if key.startswith("text") else key: tensor
            for key, tensor in tensors.items()
        }
    return tensors


def magnitudes(tensors: dict[str, Tensor], model: mz.Model, changes: Changes, seed: int = 0) -> dict[str, Tensor]:
    """A kohya file with a magnitude for every output of its modules besides (DoRA)."""
    generator = torch.Generator().manual_seed(seed)
    found = dict(tensors)
    for name in changes[BACKBONE]:
        norm = model.backbone.get_submodule(name).weight.detach().flatten(1).norm(dim=1)
        scale = 1 + 0.3 * torch.randn(norm.shape, generator=generator)
        found[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = (norm * scale)[:, None]
    return found


def processor(stem: str) -> str:
    """An attention's matrices as its processor held them, before peft."""
    for new, old in {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.items():
        stem = stem.replace(f"self_attn.{new}", f"self_attn.{old}")
    return stem.replace(".to_", ".processor.to_").removesuffix(".0") if ".attn" in stem else stem


def file(at: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    at.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()}, at, {"format": "pt", **(header or {})}
    )
    return at


# Runs.


def request(model: mz.Model, prompt: str = PROMPT, **more: Any) -> mz.Request:
    width, height = (64, 32) if model.family == "flux2" else (32, 32)
    shape = (1, model.codec.channels, height // model.codec.factor, width // model.codec.factor)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    said = {"steps": 6, "guidance": 4.0, "width": width, "height": height, "start_noise": noise, "seed": 3}
    if model.family != "flux2":
        said |= {"negative": NEGATIVE}
    return mz.Request(prompt=prompt, **(said | more))


@torch.no_grad()
def theirs(pipeline: Any, wish: mz.Request) -> Tensor:
    """What the reference draws for a request, adapters apart: latents in the units of the backbone."""
    import diffusers

    if wish.sampler:
        pipeline.scheduler = getattr(diffusers, SCHEDULERS[wish.sampler]).from_config(pipeline.scheduler.config)
    said: dict[str, Any] = {"negative_prompt": wish.negative} if wish.negative else {}
    found = pipeline(
        prompt=wish.prompt, num_inference_steps=wish.steps, guidance_scale=wish.guidance, latents=wish.start_noise,
        width=wish.width, height=wish.height, output_type="latent", generator=torch.Generator().manual_seed(wish.seed),
        **said,
    ).images  # fmt: skip
    return reference_flux2.to_backbone(pipeline, found) if "Flux2" in type(pipeline).__name__ else found


def apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    assert found.shape == expected.shape and expected.isfinite().all()
    return float((found - expected).norm() / expected.norm())


def by_file(folder: Path, at: Path, wish: mz.Request, tensors: Mapping[str, Tensor]) -> float:
    """How far a run with one adapter file is from the reference's; the file does something."""
    model, pipeline, made = loaded(folder), fresh(folder), file(at, tensors)
    pipeline.load_lora_weights(str(at.parent), weight_name=at.name)
    expected = theirs(pipeline, wish)
    assert apart(mz.generate(model, wish).latents, expected) > 1e-2
    return apart(mz.generate(model, replace(wish, lora=[(made, 1.0)])).latents, expected)


# Words.


def vectors(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def learned(at: Path, words: Mapping[str, Tensor]) -> Path:
    """learned_embeds.safetensors, or .bin, as diffusers' trainer writes it."""
    at.parent.mkdir(parents=True, exist_ok=True)
    if at.suffix == ".safetensors":
        return file(at, words)
    torch.save(dict(words), at)
    return at


def web_interface(at: Path, word: str, rows: Tensor) -> Path:
    """An embedding as the common web interface writes it."""
    content = {
        "string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": word, "step": 499,
        "sd_checkpoint": "cc6cb27103", "sd_checkpoint_name": "v1-5-pruned-emaonly",
    }  # fmt: skip
    torch.save(content, at)
    return at


def first_embedding(at: Path, rows: Tensor) -> Path:
    """An embedding as the paper's own code writes it: modules' tables of parameters, and tokens as tensors."""
    table = nn.ParameterDict({"*": nn.Parameter(rows)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}, at)
    return at


def trained(folder: Path, at: Path, dora: bool) -> Any:
    """The reference's pipeline with adapters of its own making, which it has also saved as a folder."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline, generator = fresh(folder), torch.Generator().manual_seed(0)
    of_its_own = {"rank_pattern": {"attn2.to_k": 2}, "alpha_pattern": {"attn2.to_k": 1}}
    unet = LoraConfig(
        r=3, lora_alpha=5, use_dora=dora, target_modules=["to_q", "to_k", "proj_in", "conv1"], **of_its_own
    )
    pipeline.unet.add_adapter(unet)
    pipeline.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=3, use_dora=dora, target_modules=["q_proj", "fc1"]))
    for network in (pipeline.unet, pipeline.text_encoder):
        shaken(network, generator)
    StableDiffusionPipeline.save_lora_weights(
        str(at),
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        **_collate_lora_metadata({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}),
    )
    return pipeline


def by_peft(network: nn.Module, at: Path, targets: Sequence[str], dora: bool) -> Any:
    """The network with an adapter that peft has made and saved as a folder."""
    import peft

    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=dora, use_rslora=True, target_modules=list(targets))
    found = peft.get_peft_model(network, config).eval()
    shaken(found, torch.Generator().manual_seed(1))
    found.save_pretrained(str(at))
    return found


def shaken(network: nn.Module, generator: torch.Generator) -> None:
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.3 * noise) if "magnitude" in name else noise / 3


# Agreement.


def parity(root: Path) -> list[Row]:
    """A row for each family that reads adapters; "layouts" are spellings of files, "backbone" the merged weights."""
    rows: list[Row] = []
    one, two = (BACKBONE, "text_encoder"), (BACKBONE, "text_encoder", "text_encoder_2")
    linear, whole = (*LINEAR, *TEXT), (*CONSISTENCY, *TEXT)
    model = loaded(sd1(root))
    first = {
        "diffusers": spelled(invented(model, whole, one), "diffusers"),
        "diffusers before peft": spelled(invented(model, linear, one), "older"),
        "processors": spelled(invented(model, (*LINEAR[:4], *TEXT[:4]), one), "processors"),
        "kohya": spelled(invented(model, whole, one), "lora_te"),
    }
    rows.append(lora(sd1(root), "Stable Diffusion 1.x, LoRA", first, request(model, sampler="ddim", steps=20)))
    told = {"sampler": "lcm", "steps": 4, "negative": ""}
    consistency = {"kohya": spelled(invented(model, CONSISTENCY), "kohya")}
    for guidance in (1.0, 1.5):
        wish = request(model, **told, guidance=guidance)
        rows.append(lora(sd1(root), f"Stable Diffusion 1.x, LCM-LoRA, guidance {guidance:g}", consistency, wish))
    model = loaded(sdxl(root))
    changes = invented(model, whole, two)
    large = {
        "diffusers": spelled(invented(model, linear, two), "diffusers"),
        "kohya": spelled(changes, "kohya"),
        "kohya, original blocks": spelled(changes, "kohya", original_names(model)),
    }
    rows.append(lora(sdxl(root), "Stable Diffusion XL, LoRA", large, request(model, sampler="euler", steps=20)))
    model = loaded(sd35(root))
    joint = {"diffusers": spelled(invented(model, (*JOINT, *TEXT), two), "diffusers", backbone="transformer")}
    rows.append(lora(sd35(root), "Stable Diffusion 3.5, LoRA", joint, request(model, steps=20)))
    model = loaded(klein(root))
    flux = {
        style: spelled(invented(model, (*JOINT, "embedder"), original=style != "diffusers"), style, (), "transformer")
        for style in ("diffusers", "original", "kohya")
    }
    rows.append(lora(klein(root), "FLUX.2 klein, LoRA", flux, request(model, steps=20)))
    return [*rows, words(root)]


def lora(folder: Path, title: str, files: Mapping[str, Mapping[str, Tensor]], wish: mz.Request) -> Row:
    at, runs, weights = folder.parent / "adapter.safetensors", {}, []
    for style, tensors in files.items():
        runs[f"{style}, {wish.sampler or 'flow_euler'} {wish.steps}"] = by_file(folder, at, wish, tensors)
        pipeline = fresh(folder)
        pipeline.load_lora_weights(str(at))
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        theirs = (pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet).state_dict()
        ours = adapted(loaded(folder), [(at, 1.0)], merged=True).backbone.state_dict()
        weights += [relative(tensor, theirs[name]) for name, tensor in ours.items()]
    return Row(title, tuple(files), max(weights), runs=runs)


def words(root: Path) -> Row:
    model, at = loaded(sd1(root)), root / "words"
    rows = vectors(3, 64)
    files: dict[str, tuple[Path, Any]] = {
        "safetensors": (learned(at / "learned_embeds.safetensors", {"<plate>": rows}), {"<plate>": rows}),
        "bin": (learned(at / "learned_embeds.bin", {"<plate>": rows[:1]}), {"<plate>": rows[:1]}),
        "web interface": (web_interface(at / "some.pt", "<plate>", rows), {"<plate>": rows}),
    }
    runs: dict[str, float] = {}
    for form, (file, told) in files.items():
        pipeline = fresh(sd1(root))
        pipeline.load_textual_inversion(told)
        wish = request(model, "a <plate> cell", negative="blurry <plate>", sampler="ddim", steps=20, embedding=[file])
        runs[f"{form}, ddim 20"] = apart(mz.generate(model, wish).latents, theirs(pipeline, wish))
    return Row("Stable Diffusion 1.x, textual inversion", tuple(files), None, runs=runs)

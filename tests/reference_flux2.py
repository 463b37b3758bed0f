"""Tiny FLUX.2 checkpoints as the reference libraries write them, and how they draw with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import randomise, relative
from parity_rows import Row
from PIL import Image
from safetensors.torch import load_file, save_file
from text_parts import tiny_mistral3, tiny_mistral3_tokenizer, tiny_qwen3, tiny_qwen3_tokenizer
from torch import Tensor

import mezzotint as mz
from mezzotint import images
from mezzotint.checkpoints.keymap import restored
from mezzotint.conditioning import Conditioning
from mezzotint.families import flux2
from mezzotint.families.model import Model

WIDTH, HEIGHT = 96, 64  # pixels of most runs: 6 x 4 image tokens
PROMPTS = ("a photo of a cracked solar cell", "dark scratches, " * 40)  # the second beyond 512 of our byte tokens
SCHEDULER = {  # as published
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.36.0.dev0", "base_image_seq_len": 256,
    "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 4096, "max_shift": 1.15,
    "num_train_timesteps": 1000, "shift": 3.0, "shift_terminal": None, "stochastic_sampling": False,
    "time_shift_type": "exponential", "use_beta_sigmas": False, "use_dynamic_shifting": True,
    "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip
DEV, BASE, DISTILLED = "FLUX.2 dev", "FLUX.2 klein base", "FLUX.2 klein distilled"


# Checkpoints.


def calm(network: Any, seed: int, scale: float) -> Any:
    """Weights of its own for every parameter, small enough that a whole run stays finite."""
    randomise(network, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    return network.eval()


def tiny_transformer(told: bool, seed: int) -> Any:
    """Two double and two single blocks; head width and angles are what original files imply."""
    from diffusers import Flux2Transformer2DModel

    return calm(
        Flux2Transformer2DModel(
            in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=96, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=told,
        ),
        seed, 0.9,
    )  # fmt: skip


def tiny_vae(width: int, groups: int, attention: bool) -> Any:
    """The published four levels, so that one token is 16 pixels; statistics that no channel shares."""
    from diffusers import AutoencoderKLFlux2

    vae = calm(
        AutoencoderKLFlux2(
            block_out_channels=(width,) * 4, layers_per_block=1, norm_num_groups=groups, latent_channels=32,
            mid_block_add_attention=attention,
        ),
        3, 0.7,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(9)
    vae.bn.running_mean.copy_(torch.randn(128, generator=generator))
    vae.bn.running_var.copy_(torch.rand(128, generator=generator) * 3 + 0.2)
    vae.bn.num_batches_tracked.fill_(7)
    return vae


def write(root: Path, kind: str) -> Path:
    """A model folder as published: dev with Mistral 3 and its processor, klein with Qwen3."""
    dev = kind == DEV
    tiny_transformer(dev, 1 if dev else 2).save_pretrained(root / "transformer")
    # original files imply 32 groups; dev's looks at a large picture, and is kept narrow
    (tiny_vae(8, 4, False) if dev else tiny_vae(32, 32, True)).save_pretrained(root / "vae")
    if dev:
        tiny_mistral3(root / "text_encoder", layers=31)
        tiny_mistral3_tokenizer(root / "tokenizer")
    else:
        tiny_qwen3(root / "text_encoder", layers=28)
        tiny_qwen3_tokenizer(root / "tokenizer")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index: dict[str, Any] = {
        "_class_name": "Flux2Pipeline" if dev else "Flux2KleinPipeline", "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration" if dev else "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "PixtralProcessor" if dev else "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"],
    }  # fmt: skip
    if not dev:
        index["is_distilled"] = kind == DISTILLED
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def original(folder: Path, target: Path, prefix: str = "", header: Mapping[str, str] | None = None) -> Path:
    """The transformer of a folder under Black Forest Labs' names."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    rows = flux2.sections({}, {})["transformer"].rows
    assert rows is not None
    tensors = restored(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), rows(config))
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({prefix + name: tensor.contiguous() for name, tensor in tensors.items()}, target, dict(header or {}))
    return target


def original_vae(folder: Path, target: Path) -> Path:
    """The autoencoder of a folder under Black Forest Labs' names."""
    rows = flux2.VAE_SECTION.rows
    assert rows is not None
    config = json.loads((folder / "vae" / "config.json").read_text())
    tensors = restored(load_file(folder / "vae" / "diffusion_pytorch_model.safetensors"), rows(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
    return target


# The reference.


@contextmanager
def quiet() -> Iterator[None]:
    """Both libraries say what they cut of a long prompt."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model reads")
        yield


@lru_cache(maxsize=4)
def opened(folder: Path, kind: str = "") -> Any:
    """A pipeline of the reference from its folder; dev's processor, which needs torchvision, is its tokenizer alone."""
    import diffusers
    from transformers import AutoTokenizer

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    kind = kind or json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, kind).from_pretrained(folder, tokenizer=None)
    pipeline.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scheduler(name: str) -> Any:
    """The reference's scheduler for one of our samplers, made to walk the levels that FLUX.2's own walks.

    Of its flow schedulers only FlowMatchEuler takes the pipeline's levels; the others choose levels that FLUX.2 was not
    made for, so theirs are put in their place.
    """
    import diffusers

    plain = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    if name in ("flow_euler", "euler"):
        return plain
    kind, settings = {
        "heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "dpmpp_2m": ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
        "unipc": ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    }[name]
    base = getattr(diffusers, kind)

    def set_timesteps(self: Any, steps: int = 0, device: Any = None, mu: Any = None, sigmas: Any = None) -> None:
        steps = steps or len(sigmas)
        plain.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
        base.set_timesteps(self, steps)
        levels = plain.sigmas.clone()
        if name == "heun":  # every level but the first and the last stands for two evaluations
            inner = levels[1:-1].repeat_interleave(2)
            self.sigmas = torch.cat([levels[:1], inner, levels[-1:]])
            self.timesteps = 1000 * torch.cat([levels[:1], inner])
            return
        if name == "unipc":  # as it does itself, since the logarithm of 1 - sigma must be finite
            levels[0] -= 1e-6
        self.sigmas, self.timesteps = levels, (1000 * levels[:-1]).long()

    return type(kind, (base,), {"set_timesteps": set_timesteps})(**settings)


@dataclass(frozen=True)
class Wish:
    """What both are asked for; one image a prompt, with the noise of `seed`."""

    steps: int
    sampler: str = "flow_euler"
    guidance: float | None = None
    size: tuple[int, int] | None = (WIDTH, HEIGHT)
    prompts: tuple[str, ...] = PROMPTS
    references: tuple[Image.Image, ...] = ()
    seed: int = 5

    def noise(self) -> Tensor:
        width, height = self.size or images.bounded(self.references[0], 1024**2, 16).size
        shape = (len(self.prompts), 128, height // 16, width // 16)
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def __str__(self) -> str:
        width, height = self.size or (0, 0)
        parts = [f"{self.sampler} {self.steps}", f"{width}x{height}" if self.size else "size of the reference"]
        parts += [f"guidance {self.guidance:g}"] if self.guidance is not None else []
        parts += [f"{len(self.references)} references"] if self.references else []
        return ", ".join(parts)


@lru_cache(maxsize=16)
def encoded(folder: Path, prompts: tuple[str, ...]) -> Tensor:
    """What the reference's pipeline makes of prompts; once, for it does so at every call."""
    with quiet(), torch.no_grad():
        return opened(folder).encode_prompt(list(prompts))[0]


@torch.no_grad()
def theirs(folder: Path, wish: Wish, output: str = "latent", kind: str = "", **said: Any) -> Any:
    """The reference's latents (B, 128, h, w) in the units of the backbone, or its pictures."""
    pipeline = opened(folder, kind)
    pipeline.scheduler = scheduler(wish.sampler)
    said["prompt_embeds"] = encoded(folder, wish.prompts)
    if wish.size:
        said["width"], said["height"] = wish.size
    if wish.guidance is not None:
        said["guidance_scale"] = wish.guidance
    if "Klein" in type(pipeline).__name__:
        said["negative_prompt_embeds"] = encoded(folder, ("",)).expand(len(wish.prompts), -1, -1)
    if wish.references:
        said.setdefault("image", list(wish.references))
    if "generator" not in said:
        said["latents"] = wish.noise()
    found = pipeline(num_inference_steps=wish.steps, output_type=output, **said).images
    if output != "latent":
        return found
    if found.ndim == 3:  # dev's are a sequence of tokens
        return found.transpose(1, 2).unflatten(-1, wish.noise().shape[-2:])
    return to_backbone(pipeline, found)


def to_backbone(pipeline: Any, found: Tensor) -> Tensor:
    """klein's pipelines give the autoencoder's units."""
    statistics, eps = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
    mean, deviation = (v.view(1, -1, 1, 1) for v in (statistics.running_mean, (statistics.running_var + eps).sqrt()))
    return (pipeline._patchify_latents(found) - mean) / deviation


def to_autoencoder(pipeline: Any, found: Tensor) -> Tensor:
    """The units of the autoencoder, as the reference's pipelines come to them before they decode."""
    statistics, eps = pipeline.vae.bn, pipeline.vae.config.batch_norm_eps
    mean, deviation = (v.view(1, -1, 1, 1) for v in (statistics.running_mean, (statistics.running_var + eps).sqrt()))
    return pipeline._unpatchify_latents(found * deviation + mean)


def remembering(model: Model) -> Model:
    """The same model, whose language model reads no prompts twice."""
    text = model.text
    assert text is not None
    read, known = text.encode, dict[tuple[str, ...], Conditioning]()

    def encode(prompts: Sequence[str], chunked: bool = False) -> Conditioning:
        if tuple(prompts) not in known:
            known[tuple(prompts)] = read(prompts, chunked)
        return known[tuple(prompts)]

    setattr(text, "encode", encode)  # noqa: B010 (a method of this one object)
    return model


def ours(model: Model, wish: Wish, **more: Any) -> list[mz.Result]:
    """Our results, all prompts as one batch; `more` goes into every request."""
    from mezzotint.generate import generate_batch

    width, height = wish.size or (None, None)
    requests = [
        mz.Request(
            prompt=prompt, width=width, height=height, sampler=wish.sampler, steps=wish.steps, guidance=wish.guidance,
            references=wish.references, start_noise=noise[None], **more,
        )
        for prompt, noise in zip(wish.prompts, wish.noise(), strict=True)
    ]  # fmt: skip
    with quiet():
        return generate_batch(model, requests)


def latents(results: Sequence[mz.Result]) -> Tensor:
    return torch.cat([result.latents for result in results])


def error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm."""
    assert found.shape == expected.shape and expected.isfinite().all()
    return float((found - expected).norm() / expected.norm())


def compared(folder: Path, model: Model, wish: Wish) -> float:
    """The error of a whole run."""
    return error(latents(ours(model, wish)), theirs(folder, wish))


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Smooth blobs with noise on them."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((smooth + generator.integers(-20, 21, smooth.shape)).clip(0, 255).astype(np.uint8))


def parts(folder: Path, model: Model) -> tuple[float, float, float]:
    """Errors of backbone, text encoder and codec alone."""
    pipeline, generator = opened(folder), torch.Generator().manual_seed(3)
    x, tokens = torch.randn(2, 128, 4, 6, generator=generator), torch.randn(2, 9, 96, generator=generator)
    t, scale = torch.tensor([251.3, 987.0]), torch.tensor([4.0, 1.5]) if model.contract.guidance.embedded else None
    assert model.text is not None
    with torch.no_grad(), quiet():
        raw = pipeline.transformer(
            hidden_states=pipeline._pack_latents(x), timestep=t / 1000, guidance=scale, encoder_hidden_states=tokens,
            txt_ids=pipeline._prepare_text_ids(tokens), img_ids=pipeline._prepare_latent_ids(x),
        ).sample.transpose(1, 2).unflatten(-1, (4, 6))  # fmt: skip
        backbone = relative(model.backbone(x, t, Conditioning(tokens=tokens, guidance=scale)), raw)
        said = model.text.encode(PROMPTS).tokens
        assert said is not None
        text = relative(said, encoded(folder, PROMPTS))
        pixels = images.to_tensor(picture(96, 64, 4), 96, 64)
        latents = to_backbone(pipeline, pipeline.vae.encode(pixels).latent_dist.mode())
        decoded = pipeline.vae.decode(to_autoencoder(pipeline, x)).sample
        codec = max(relative(model.codec.encode(pixels), latents), relative(model.codec.decode(x), decoded))
    return backbone, text, codec


ONE = PROMPTS[:1]
RUNS: dict[str, tuple[Wish, ...]] = {
    DEV: (
        Wish(4), Wish(4, "euler", guidance=1.0, prompts=ONE), Wish(28, size=(64, 112), guidance=2.5, prompts=ONE),
        Wish(50, prompts=ONE), Wish(4, "heun"), Wish(20, "dpmpp_2m", prompts=ONE), Wish(20, "unipc", prompts=ONE),
        Wish(4, references=(picture(101, 83, 1),)),
        Wish(1, references=(picture(1100, 1000, 3),), prompts=ONE),  # above what the network may see
    ),
    BASE: (
        Wish(20, prompts=ONE), Wish(4, size=(64, 112), guidance=7.5), Wish(4, "heun", prompts=ONE),
        Wish(8, "unipc", guidance=1.0), Wish(8, "dpmpp_2m", prompts=ONE),
        Wish(4, references=(picture(101, 83, 1), picture(70, 130, 2))),
    ),
    DISTILLED: (
        Wish(4), Wish(8, "unipc", prompts=ONE),
        Wish(4, size=None, references=(picture(83, 101, 1), picture(64, 97, 2))),
    ),
}  # fmt: skip


def parity(root: Path) -> list[Row]:
    """Every kind of FLUX.2 against the reference, from folders and from original files."""
    rows: list[Row] = []
    for kind, wishes in RUNS.items():
        folder = write(root / kind.replace(" ", "-"), kind)
        model = mz.load(folder)
        runs = {str(wish): compared(folder, model, wish) for wish in wishes}
        file = original(folder, root / f"{folder.name}.safetensors")
        single = mz.load(file, parts=folder, distilled=None if kind == DEV else kind == DISTILLED)
        same = error(latents(ours(single, wishes[0])), latents(ours(model, wishes[0])))
        backbone, text, codec = parts(folder, model)
        rows.append(Row(kind, ("folder", "single file"), backbone, text, codec, runs, same))
    return rows

"""Tiny Stable Diffusion 3 and 3.5 checkpoints as the reference libraries write them, and how they draw with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import randomise, relative
from parity_rows import Row
from PIL import Image
from safetensors.torch import load_file, save_file
from text_parts import CLIP_TOKENS, tiny_clip, tiny_clip_tokenizer, tiny_t5, tiny_t5_tokenizer
from torch import Tensor

import mezzotint as mz
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.mmdit import mmdit_controlnet
from mezzotint.conditioning import Conditioning
from mezzotint.families import sd35
from mezzotint.families.control import load_control

FACTOR, SIDE, CHANNELS = 4, 32, 16  # of the tiny autoencoder; pixels; of the latents
WIDTH, POOLED, TOKENS = 64, 64 + 48, 144  # of the network, of the pooled prompt, of T5
PROMPT, NEGATIVE = "the crack", "dark area"
LONG = " ".join(f"crack {i} on the cell," for i in range(30))  # beyond 77 tokens of CLIP and 256 letters of T5
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000,
    "shift": 3.0,
}  # fmt: skip
MOVING = {
    **SCHEDULER, "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 4096,
    "max_shift": 1.15, "use_dynamic_shifting": True,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 3 Medium": {"attention_head_dim": 64, "num_attention_heads": 1},
    "Stable Diffusion 3.5 Medium": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "Stable Diffusion 3.5 Large": {"qk_norm": "rms_norm"},
}
MEDIUM, LARGE = "Stable Diffusion 3.5 Medium", "Stable Diffusion 3.5 Large"
NETWORK: dict[str, Any] = {
    "sample_size": SIDE // FACTOR, "patch_size": 2, "in_channels": CHANNELS, "out_channels": CHANNELS, "num_layers": 3,
    "attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": TOKENS, "caption_projection_dim": WIDTH,
    "pooled_projection_dim": POOLED, "pos_embed_max_size": 12,
}  # fmt: skip
CONTROLS: dict[str, dict[str, Any]] = {
    "that reads text, zeros for the pooled prompt": {},  # InstantX's: its hints are not shifted
    "that reads text": {"force_zeros_for_pooled_projection": False},
    "without text": {  # Stability's, for 3.5 Large
        "joint_attention_dim": None, "caption_projection_dim": 2048, "pos_embed_max_size": None,
        "pos_embed_type": None, "use_pos_embed": False, "force_zeros_for_pooled_projection": False,
        "attention_head_dim": 64, "num_attention_heads": 1,
    },
}  # fmt: skip
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # our sampler -> the reference's, with what sets it
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),  # on a flow the same
    "heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", FLOW),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {**FLOW, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", FLOW),
}


# Checkpoints.


def calm(network: Any, seed: int, scale: float = 0.6) -> Any:
    """Weights of its own for every parameter, small enough that a whole run stays finite."""
    randomise(network, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    return network.eval()


def tiny_vae() -> Any:
    """An autoencoder that is certain of what it sees: the reference draws from its posterior, we take the mean."""
    from diffusers import AutoencoderKL

    options: dict[str, Any] = {
        "block_out_channels": (32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "latent_channels": CHANNELS,
        "sample_size": SIDE, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
        "use_post_quant_conv": False,
    }  # fmt: skip
    vae = calm(AutoencoderKL(**options), 3)
    with torch.no_grad():
        vae.encoder.conv_out.weight[CHANNELS:] = 0.0
        vae.encoder.conv_out.bias[CHANNELS:] = -30.0
    return vae


def write(
    root: Path, kind: str, with_t5: bool = True, scheduler: Mapping[str, Any] = SCHEDULER, words: int = CLIP_TOKENS
) -> Path:
    """A model folder; `words` other than the tiny tokenizers' leave the tokenizers out."""
    from diffusers import SD3Transformer2DModel

    calm(SD3Transformer2DModel(**{**NETWORK, **KINDS[kind]}), seed=len(kind)).save_pretrained(root / "transformer")
    tiny_vae().save_pretrained(root / "vae")
    first = tiny_clip(root / "text_encoder", 64, projection=64, heads=1, vocabulary=words, seed=1) / "model.safetensors"
    tensors = load_file(first)
    tensors["text_projection.weight"] = torch.eye(64)  # as published
    save_file(tensors, first, {"format": "pt"})
    tiny_clip(root / "text_encoder_2", 80, projection=48, heads=1, vocabulary=words, act="gelu", seed=2)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusion3Pipeline", "_diffusers_version": "0.29.0.dev0",
        "scheduler": ["diffusers", scheduler["_class_name"]], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "transformer": ["diffusers", "SD3Transformer2DModel"],
        "text_encoder_3": [None, None], "tokenizer_3": [None, None],
    }  # fmt: skip
    if words == CLIP_TOKENS:
        tiny_clip_tokenizer(root / "tokenizer")
        tiny_clip_tokenizer(root / "tokenizer_2", pad="!")
    if with_t5:
        config = tiny_t5(root / "text_encoder_3", TOKENS) / "config.json"
        far = {"relative_attention_max_distance": 128}  # which no shape tells: as in every published one
        config.write_text(json.dumps(json.loads(config.read_text()) | far))
        tiny_t5_tokenizer(root / "tokenizer_3")
        index |= {
            "text_encoder_3": ["transformers", "T5EncoderModel"], "tokenizer_3": ["transformers", "T5TokenizerFast"]
        }  # fmt: skip
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def write_control(folder: Path, kind: str) -> Path:
    from diffusers import SD3ControlNetModel

    options = {**NETWORK, "num_layers": 2, **CONTROLS[kind]}
    calm(SD3ControlNetModel(**options), seed=5 + len(kind)).save_pretrained(folder)
    return folder


def single_file(folder: Path, file: Path, texts: Sequence[str] = ()) -> Path:
    """The folder's model and autoencoder in Stability's layout, with the text encoders named.

    As the files that were released with text encoders: temperatures beside them, and no projection of CLIP-L.
    """
    parts = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"} | dict.fromkeys(texts, "model")
    sections = sd35.sections({}, {})
    content: dict[str, Tensor] = {}
    for part, stem in parts.items():
        section, tensors = sections[part], load_file(folder / part / f"{stem}.safetensors")
        config = json.loads((folder / part / "config.json").read_text())
        if part == "text_encoder":
            tensors.pop("text_projection.weight")
        own = restored(tensors, section.rows(config)) if section.rows else tensors
        content |= {section.prefix + name: tensor.contiguous() for name, tensor in own.items()}
    if texts:
        content |= {name: torch.tensor(4.6055) for name in sd35.TEMPERATURES}
    save_file(content, file)
    return file


def single_control(folder: Path, file: Path) -> Path:
    """Stability's control network in its own layout, with the number that says what it was trained on."""
    config: Any = load_control(folder).config
    tensors = restored(load_file(folder / "diffusion_pytorch_model.safetensors"), mmdit_controlnet(config))
    save_file({name: t.contiguous() for name, t in tensors.items()} | {"control_type": torch.tensor([1])}, file)
    return file


# Runs.


@dataclass(frozen=True)
class Run:
    """What both sides are asked to draw."""

    sampler: str = "flow_euler"
    steps: int = 4
    guidance: float = 4.5
    prompt: str = PROMPT
    negative: str = ""
    width: int = SIDE
    height: int = SIDE
    skip: tuple[int, ...] = ()
    skip_interval: tuple[float, float] = (0.01, 0.2)
    seed: int = 0

    @property
    def noise(self) -> Tensor:
        return drawn_noise(self, torch.Generator().manual_seed(self.seed))

    def __str__(self) -> str:
        parts = [f"{self.sampler} {self.steps}, guidance {self.guidance:g}"]
        parts += [f"{self.width}x{self.height}"] if (self.width, self.height) != (SIDE, SIDE) else []
        parts += ["long prompt"] if self.prompt == LONG else []
        parts += ["negative prompt"] if self.negative else []
        parts += ["skip-layer guidance"] if self.skip else []
        return ", ".join(parts)


def drawn_noise(run: Run, generator: torch.Generator) -> Tensor:
    return torch.randn(1, CHANNELS, run.height // FACTOR, run.width // FACTOR, generator=generator)


RUNS = (
    Run("flow_euler", 4, 1.0),
    Run("flow_euler", 20, 4.5, negative=NEGATIVE),
    Run("flow_euler", 28, 7.0, LONG, width=40, height=24),
    Run("euler", 20, 4.5),
    Run("heun", 4, 4.5, negative=NEGATIVE),
    Run("heun", 20, 7.0),
    Run("dpmpp_2m", 4, 7.0),
    Run("dpmpp_2m", 20, 4.5, LONG, LONG),
    Run("dpmpp_2m", 28, 1.0),
    Run("dpmpp_2m_sde", 20, 4.5),
    Run("unipc", 4, 4.5),
    Run("unipc", 20, 1.0, width=24, height=48),
    Run("unipc", 28, 7.0, negative=NEGATIVE),
    Run("flow_euler", 28, 4.5, skip=(1,)),
    Run("dpmpp_2m", 20, 7.0, skip=(0, 2), skip_interval=(0.1, 0.55)),
)
FEW = (RUNS[1], RUNS[2], RUNS[4], RUNS[7], RUNS[12])


@lru_cache(maxsize=4)
def opened(folder: Path, kind: str = "StableDiffusion3Pipeline") -> Any:
    """A pipeline of the reference from its folder, quiet."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    without = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    return hushed(getattr(diffusers, kind).from_pretrained(folder, **without))


def hushed(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.__dict__["published"] = pipeline.scheduler
    return pipeline


def other(pipeline: Any, kind: str, **parts: Any) -> Any:
    """Another of the reference's pipelines with the parts of this one."""
    import diffusers

    found = hushed(getattr(diffusers, kind)(**pipeline.components, **parts))
    found.__dict__["published"] = pipeline.__dict__["published"]
    return found


@lru_cache(maxsize=8)
def loaded(path: Path, parts: Path | None = None) -> Any:
    return mz.load(path, parts=parts)


def sampled_by(pipeline: Any, sampler: str) -> Any:
    """The pipeline with the reference's counterpart of a sampler, made from its own scheduler file."""
    import diffusers

    name, settings = SCHEDULERS[sampler]
    published = pipeline.__dict__["published"]
    shift = {"flow_shift": published.config.shift} if "flow_shift" in settings else {}
    pipeline.scheduler = getattr(diffusers, name).from_config(published.config, **{**settings, **shift})
    return pipeline


def theirs(pipeline: Any, runs: Sequence[Run], decoded: bool = False, **more: Any) -> Any:
    """What the reference draws: latents, or pictures."""
    run = runs[0]
    told = {"width": run.width, "height": run.height, "latents": torch.cat([each.noise for each in runs])} | more
    if run.skip:
        start, stop = run.skip_interval
        told |= {
            "skip_guidance_layers": list(run.skip), "skip_layer_guidance_scale": 2.8,
            "skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop,
        }  # fmt: skip
    with quiet(), fresh_noise(run):
        return sampled_by(pipeline, run.sampler)(
            [each.prompt for each in runs], negative_prompt=[each.negative for each in runs],
            num_inference_steps=run.steps, guidance_scale=run.guidance, output_type="pil" if decoded else "latent",
            **told,
        ).images  # fmt: skip


@contextmanager
def fresh_noise(run: Run) -> Iterator[None]:
    """Noise that a scheduler draws on the way, from the generator that ours draws from."""
    from diffusers.schedulers import scheduling_dpmsolver_multistep as module

    generator, before = torch.Generator().manual_seed(run.seed), module.randn_tensor
    module.randn_tensor = lambda shape, **_: torch.randn(shape[1:], generator=generator)[None]
    try:
        yield
    finally:
        module.randn_tensor = before


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this model reads")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def asked(run: Run, **more: Any) -> mz.Request:
    settings: dict[str, Any] = {
        "prompt": run.prompt, "negative": run.negative, "sampler": run.sampler, "steps": run.steps, "seed": run.seed,
        "guidance": run.guidance, "width": run.width, "height": run.height, "start_noise": run.noise,
        "skip_layers": run.skip, "skip_interval": run.skip_interval,
    }  # fmt: skip
    return mz.Request(**{**settings, **more})


def ours(model: Any, run: Run, **more: Any) -> mz.Result:
    with quiet():
        return mz.generate(model, asked(run, **more))


def apart(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((found - expected).norm() / expected.norm())


def picture(width: int = SIDE, height: int = SIDE, seed: int = 7) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def levels_apart(found: Image.Image, expected: Image.Image) -> int:
    """The largest difference of two pictures in levels of 255."""
    return int(np.abs(np.asarray(found).astype(int) - np.asarray(expected).astype(int)).max())


# Parts.


@torch.no_grad()
def backbone_error(model: Any, pipeline: Any) -> float:
    generator = torch.Generator().manual_seed(2)
    errors: list[float] = []
    for height, width in ((8, 8), (6, 12)):
        x, tokens, pooled = (
            torch.randn(3, *shape, generator=generator) for shape in ((CHANNELS, height, width), (9, TOKENS), (POOLED,))
        )
        t = torch.tensor([8.9, 500.25, 1000.0])
        expected = pipeline.transformer(x, tokens, pooled, t).sample
        errors.append(relative(model.backbone(x, t, Conditioning(tokens=tokens, pooled=pooled)), expected))
    return max(errors)


@torch.no_grad()
def text_error(model: Any, pipeline: Any, prompts: Sequence[str] = (PROMPT, "", NEGATIVE, LONG)) -> float:
    with quiet():
        tokens, _, pooled, _ = pipeline.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=False)
        found = model.text.encode(list(prompts))
    return max(relative(found.tokens, tokens), relative(found.pooled, pooled))


@torch.no_grad()
def codec_error(model: Any, pipeline: Any) -> float:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(2, 3, 24, 40, generator=generator) * 2 - 1
    latents = torch.randn(2, CHANNELS, 6, 10, generator=generator)
    vae = pipeline.vae
    mean = (vae.encode(pixels).latent_dist.mode() - 0.0609) * 1.5305
    seen = vae.decode(latents / 1.5305 + 0.0609).sample
    return max(relative(model.codec.encode(pixels), mean), relative(model.codec.decode(latents), seen))


# Image to image, inpainting, control.


def from_image(pipeline: Any, model: Any, run: Run, strength: float) -> float:
    """Its generator draws from the posterior first (of no width here), then the noise."""
    generator, shown = torch.Generator().manual_seed(run.seed), picture(run.width, run.height)
    drawn_noise(run, generator)
    noise = drawn_noise(run, generator)
    expected = theirs(
        other(pipeline, "StableDiffusion3Img2ImgPipeline"), [run], latents=None, image=shown, strength=strength,
        generator=torch.Generator().manual_seed(run.seed),
    )  # fmt: skip
    return apart(ours(model, run, image=shown, strength=strength, start_noise=noise).latents, expected)


def repainted(pipeline: Any, model: Any, run: Run, strength: float) -> float:
    """A mask whose edges cut through the latents' cells."""
    generator, shown = torch.Generator().manual_seed(run.seed), picture(run.width, run.height)
    drawn_noise(run, generator)
    noise = drawn_noise(run, generator)
    mask = Image.new("L", (run.width, run.height))
    mask.paste(255, (9, 6, 23, 21))
    expected = theirs(
        other(pipeline, "StableDiffusion3InpaintPipeline"), [run], latents=None, image=shown, mask_image=mask,
        strength=strength, generator=torch.Generator().manual_seed(run.seed),
    )  # fmt: skip
    return apart(ours(model, run, image=shown, mask=mask, strength=strength, start_noise=noise).latents, expected)


@torch.no_grad()
def control_error(model: Any, pipeline: Any, folder: Path, single: Path | None = None) -> float:
    """The residuals of a control network alone."""
    from diffusers import SD3ControlNetModel

    network: Any = SD3ControlNetModel.from_pretrained(folder)
    own: Any = load_control(single or folder)
    own.attach(model.backbone)
    config = own.config
    if not config.use_pos_embed:
        network.pos_embed = network._get_pos_embed_from_transformer(pipeline.transformer)
    generator = torch.Generator().manual_seed(4)
    x, hint, tokens, pooled = (
        torch.randn(2, *shape, generator=generator) for shape in (*[(CHANNELS, 6, 10)] * 2, (9, TOKENS), (POOLED,))
    )
    t = torch.tensor([8.9, 1000.0])
    expected = network(
        x, hint, timestep=t, encoder_hidden_states=tokens if config.reads_tokens else None,
        pooled_projections=pooled if config.reads_pooled else torch.zeros_like(pooled),
    ).controlnet_block_samples  # fmt: skip
    return max(map(relative, own(x, t, Conditioning(tokens=tokens, pooled=pooled), hint), expected))


def controlled(
    pipeline: Any, model: Any, run: Run, networks: Sequence[tuple[Path, float]], single: Path | None = None
) -> float:
    """One control network, or several of one kind; `single` is an original file of the first for our side."""
    from diffusers import SD3ControlNetModel

    nets = [SD3ControlNetModel.from_pretrained(path) for path, _ in networks]
    shown = [picture(run.width, run.height, 11 + i) for i in range(len(nets))]
    one = len(nets) == 1
    expected = theirs(
        other(pipeline, "StableDiffusion3ControlNetPipeline", controlnet=nets[0] if one else nets), [run],
        control_image=shown[0] if one else shown,
        controlnet_conditioning_scale=networks[0][1] if one else [scale for _, scale in networks],
    )  # fmt: skip
    paths = [single or networks[0][0], *(path for path, _ in networks[1:])]
    control = [(path, image, scale) for path, image, (_, scale) in zip(paths, shown, networks, strict=True)]
    return apart(ours(model, run, control=control).latents, expected)


# The report.


def measured(root: Path, kind: str, runs: Sequence[Run], name: str = "", **made: Any) -> Row:
    """A checkpoint in both layouts against the reference."""
    folder = write(root / (name or kind), kind, **made)
    texts = [f"text_encoder{end}" for end in ("", "_2", "_3") if (folder / f"text_encoder{end}").is_dir()]
    single = single_file(folder, root / f"{name or kind}.safetensors", texts)
    pipeline, model, one = opened(folder), loaded(folder), loaded(single, folder)
    return Row(
        model=name or kind,
        layouts=("folder", "single file"),
        backbone=backbone_error(model, pipeline),
        text=text_error(model, pipeline),
        codec=codec_error(model, pipeline),
        runs={str(run): apart(ours(model, run).latents, theirs(pipeline, [run])) for run in runs},
        original=apart(ours(one, runs[0]).latents, ours(model, runs[0]).latents),
    )


def parity(root: Path) -> list[Row]:
    """Every kind against the reference, on every sampler that it has for them."""
    rows = [measured(root, kind, RUNS if kind == MEDIUM else FEW) for kind in KINDS]
    rows.append(measured(root, LARGE, FEW[:2], f"{LARGE} without T5", with_t5=False))
    folder = root / MEDIUM
    pipeline, model = opened(folder), loaded(folder)
    pictures: dict[str, float] = {}
    for run, strength in ((FEW[0], 0.6), (Run("heun", 10, 7.0), 0.35), (Run("flow_euler", 28, 1.0), 1.0)):
        pictures[f"image to image, {run}, strength {strength:g}"] = from_image(pipeline, model, run, strength)
        pictures[f"inpainting, {run}, strength {strength:g}"] = repainted(pipeline, model, run, strength)
    rows = [replace(row, runs={**row.runs, **pictures}) if row.model == MEDIUM else row for row in rows]
    for kind in CONTROLS:
        network = write_control(root / f"control {kind}", kind)
        single = single_control(network, root / f"{kind}.safetensors") if kind == "without text" else None
        found = {str(run): controlled(pipeline, model, run, [(network, 0.8)]) for run in (FEW[0], FEW[2])}
        found["two networks, " + str(FEW[0])] = controlled(pipeline, model, FEW[0], [(network, 0.8), (network, -0.4)])
        rows.append(
            Row(
                model=f"Stable Diffusion 3.5 control network {kind}",
                layouts=("folder", "single file") if single else ("folder",),
                backbone=control_error(model, pipeline, network),
                runs=found,
                original=control_error(model, pipeline, network, single) if single else None,
            )
        )
    return rows

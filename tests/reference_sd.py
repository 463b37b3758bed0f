"""Tiny Stable Diffusion 1.x and 2.x checkpoints by the reference libraries, and how far our runs are from theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import relative
from parity_rows import Row
from PIL import Image
from reference_sdxl import SCHEDULERS, calm, distance, opened, rebuilt
from safetensors.torch import load_file, save_file
from text_parts import tiny_clip
from torch import Tensor

import mezzotint as mz
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.controlnet import controlnet
from mezzotint.conditioning import Conditioning
from mezzotint.families import sd1, sd2
from mezzotint.families.family import Family
from mezzotint.families.materials import read_folder
from mezzotint.text.vocabulary import clip_vocabulary

FACTOR, SIDE = 4, 32  # of the tiny autoencoder; pixels
WORDS = 49408  # CLIP's own vocabulary, which single files are read with
PROMPT, NEGATIVE = "a photo of a cracked solar cell", "blurry, dark"
LONG = " ".join(f"scratch {i} on a {word} cell," for i in range(12) for word in ("blue", "dark"))  # beyond 77 tokens
PNDM = {  # as Stable Diffusion 1.5 was published
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
DDIM = {**PNDM, "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
CONSISTENCY = {
    "_class_name": "LCMScheduler", "_diffusers_version": "0.22.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995, "num_train_timesteps": 1000, "original_inference_steps": 50,
    "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "sample_max_value": 1.0, "set_alpha_to_one": True,
    "steps_offset": 0, "thresholding": False, "timestep_scaling": 10.0, "timestep_spacing": "leading",
    "trained_betas": None,
}  # fmt: skip


# Checkpoints.


def tiny_unet(kind: int, channels: int = 4, told: int | None = None) -> Any:
    from diffusers import UNet2DConditionModel

    heads: Any = 8 if kind == 1 else [1, 1]
    return calm(
        UNet2DConditionModel(
            sample_size=SIDE // FACTOR, in_channels=channels, block_out_channels=(32, 64) if kind == 1 else (64, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=heads,
            cross_attention_dim=64, use_linear_projection=kind == 2, time_cond_proj_dim=told,
        ),
        seed=kind + channels,
    )  # fmt: skip


def tiny_vae() -> Any:
    from diffusers import AutoencoderKL

    return calm(
        AutoencoderKL(
            block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4,
            sample_size=SIDE,
        ),
        seed=3,
    )  # fmt: skip


@cache
def common(root: Path, kind: int) -> Path:
    """The parts that all checkpoints of Stable Diffusion `kind`.x share, written once."""
    tiny_vae().save_pretrained(root / "vae")
    layers, act = (2, "quick_gelu") if kind == 1 else (23, "gelu")
    tiny_clip(root / "text_encoder", 64, layers=layers, act=act, heads=1, vocabulary=WORDS)
    clip_vocabulary().save_pretrained(root / "tokenizer")
    if kind == 2:  # as published: two files that disagree, of which the one that says "!" is right
        (root / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    return root


def write(root: Path, kind: int, scheduler: Mapping[str, Any], pipeline: str, unet: Any) -> Path:
    """A model folder of Stable Diffusion `kind`.x, once."""
    if root.exists():
        return root
    shutil.copytree(common(root.parent / f"common_{kind}", kind), root)
    unet.save_pretrained(root / "unet")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": pipeline, "_diffusers_version": "0.42.1", "feature_extractor": [None, None],
        "safety_checker": [None, None], "requires_safety_checker": False,
        "scheduler": ["diffusers", scheduler["_class_name"]], "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def write_plain(root: Path) -> Path:
    return write(root / "plain", 1, PNDM, "StableDiffusionPipeline", tiny_unet(1))


def write_inpainting(root: Path) -> Path:
    return write(root / "inpainting", 1, PNDM, "StableDiffusionInpaintPipeline", tiny_unet(1, channels=9))


def write_consistency(root: Path) -> Path:
    return write(root / "consistency", 1, CONSISTENCY, "LatentConsistencyModelPipeline", tiny_unet(1, told=32))


def write_velocity(root: Path) -> Path:
    return write(root / "velocity", 2, DDIM, "StableDiffusionPipeline", tiny_unet(2))


def write_second(root: Path) -> Path:
    """Stable Diffusion 2.x-base: epsilon, and PNDM's file."""
    second = {**PNDM, "_diffusers_version": "0.8.0", "prediction_type": "epsilon"}
    return write(root / "second", 2, second, "StableDiffusionPipeline", tiny_unet(2))


def write_control(root: Path, seed: int) -> Path:
    from diffusers import ControlNetModel

    folder = root / f"control_{seed}"
    if not folder.exists():
        network = ControlNetModel(
            block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
            attention_head_dim=8, cross_attention_dim=64, conditioning_embedding_out_channels=(8, 16, 32),
        )  # fmt: skip
        calm(network, seed).save_pretrained(folder)
    return folder


# Original single files.


def content(folder: Path, family: Family) -> dict[str, Tensor]:
    """The weights of a folder under their original names."""
    assert family.original is not None
    found: dict[str, Tensor] = {}
    materials = read_folder(folder)
    for part, section in family.original.sections({}, {}).items():
        material = materials.parts[part]
        tensors = restored(material.tensors, section.rows(material.config)) if section.rows else material.tensors
        found |= {section.prefix + name: tensor.contiguous() for name, tensor in tensors.items()}
    return found


def tables() -> dict[str, Tensor]:
    """What original files carry of their schedule."""
    names = (
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    )  # fmt: skip
    return {name: torch.rand(1000) for name in names}


def averages(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The running mean of a U-Net's weights as original files name it, of other values; and its two counters."""
    stem = "model.diffusion_model."
    found = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): tensor + 1.0
        for name, tensor in tensors.items()
        if name.startswith(stem)
    }
    return found | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}


def first_file(folder: Path) -> dict[str, Tensor]:
    """Stable Diffusion 1.x as published: with tables, averages and the positions of its text encoder."""
    found = content(folder, sd1.FAMILY)
    found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return found | tables() | averages(found)


def second_file(folder: Path) -> dict[str, Tensor]:
    """Stable Diffusion 2.x as published: the text encoder whole, the layer that is never read included."""
    found, stem = content(folder, sd2.FAMILY), "cond_stage_model.model."
    last, behind = f"{stem}transformer.resblocks.22.", f"{stem}transformer.resblocks.23."
    more = {behind + name.removeprefix(last): 9.0 + found[name] for name in found if name.startswith(last)}
    more |= {stem + "text_projection": torch.rand(64, 64), stem + "logit_scale": torch.tensor(4.6)}
    return found | more | tables() | averages(found) | {"model_ema.decay": torch.tensor(0.9999)}


def control_file(folder: Path, prefix: str = "control_model.") -> dict[str, Tensor]:
    """A ControlNet as published: under its prefix, or bare."""
    from mezzotint.backbones.controlnet import ControlNetConfig

    config = ControlNetConfig.from_config(json.loads((folder / "config.json").read_text()))
    tensors = restored(load_file(folder / "diffusion_pytorch_model.safetensors"), controlnet(config))
    return {prefix + name: tensor.contiguous() for name, tensor in tensors.items()}


def saved(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """As .safetensors, or as the .ckpt that Lightning wrote."""
    if file.suffix == ".safetensors":
        save_file(dict(tensors), file, dict(metadata or {}))
    else:
        torch.save({"state_dict": dict(tensors), "global_step": 470000}, file)
    return file


# Runs.


@cache
def both(folder: Path, kind: str = "StableDiffusionPipeline") -> tuple[Any, mz.Model]:
    """The reference's pipeline and our model, each opened from the folder once."""
    return opened(folder, kind), mz.load(folder)


def noise(seed: int = 11, count: int = 1) -> Tensor:
    return torch.randn(count, 4, SIDE // FACTOR, SIDE // FACTOR, generator=torch.Generator().manual_seed(seed))


def picture(seed: int = 5, side: int = SIDE) -> Image.Image:
    """Something with smooth and sharp places."""
    y, x = np.mgrid[0:side, 0:side]
    waves = [np.sin(x / (5 + k) + seed) * np.cos(y / (3 + k)) for k in range(3)]
    pixels = np.stack([128 + 90 * wave + 30 * ((x // 8 + y // 8) % 2) for wave in waves], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def mask(*boxes: tuple[int, int, int, int]) -> Image.Image:
    """White in boxes of (left, top, right, bottom)."""
    pixels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    for left, top, right, bottom in boxes:
        pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


ALIGNED, OFF = mask((4, 8, 20, 24)), mask((6, 9, 19, 23), (30, 28, 31, 29))  # the second misses the latents' grid


def request(prompt: str = PROMPT, **more: Any) -> mz.Request:
    said: dict[str, Any] = {"steps": 4, "guidance": 7.5, "width": SIDE, "height": SIDE, "seed": 3}
    return mz.Request(prompt=prompt, **(said | more))


def said(requests: Sequence[mz.Request]) -> dict[str, Any]:
    """The same wish in the reference's words; noise comes from the same seeds, drawn in the same order."""
    one, every = requests[0], [request for request in requests for _ in range(request.count)]
    found: dict[str, Any] = {
        "prompt": [request.prompt for request in every],
        "num_inference_steps": one.steps,
        "guidance_scale": one.guidance,
        "generator": [torch.Generator().manual_seed(r.seed + i) for r in requests for i in range(r.count)],
        "output_type": "latent",
    }
    if any(request.negative for request in requests):
        found["negative_prompt"] = [request.negative for request in every]
    if one.start_noise is not None:
        found["latents"] = torch.cat([r.start_noise for r in requests if r.start_noise is not None])
    if one.guidance_rescale:
        found["guidance_rescale"] = one.guidance_rescale
    if one.eta is not None:
        found["eta"] = one.eta
    if one.image is not None:
        found |= {"image": [request.image for request in every], "strength": one.strength}
    if one.mask is not None:
        found |= {"mask_image": [request.mask for request in every]}
    if one.control:
        shown, scales = [picture for _, picture, _ in one.control], [scale for _, _, scale in one.control]
        several = len(shown) > 1
        found["controlnet_conditioning_scale"] = scales if several else scales[0]
        found["image" if one.image is None else "control_image"] = shown if several else shown * len(every)
    if one.image is None or one.mask is not None:
        found |= {"width": one.width, "height": one.height}
    return found


@contextmanager
def certain() -> Iterator[None]:
    """The reference draws latents from the posterior of its autoencoder; here it takes the mean, as we do."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    drawn = Posterior.sample
    Posterior.sample = lambda self, generator=None: self.mode()
    try:
        yield
    finally:
        Posterior.sample = drawn


def theirs(pipeline: Any, *requests: mz.Request, **more: Any) -> Any:
    """What the reference draws; its sampler is made from its own scheduler file, or is that file's."""
    import diffusers

    own = pipeline.scheduler
    if requests[0].sampler:
        name, settings = SCHEDULERS[requests[0].sampler]
        pipeline.scheduler = getattr(diffusers, name).from_config(own.config, **settings)
    try:
        with certain():
            return pipeline(**(said(requests) | more)).images
    finally:
        pipeline.scheduler = own


def apart(model: mz.Model, pipeline: Any, *requests: mz.Request) -> float:
    """Relative distance of the final latents of a whole run."""
    ours = torch.cat([result.latents for result in mz.generate_batch(model, list(requests))])
    expected = theirs(pipeline, *requests)
    assert ours.isfinite().all() and ours.shape == expected.shape
    return distance(ours, expected)


# Parts.


def backbone_error(model: mz.Model, pipeline: Any, guidance: float | None = None) -> float:
    """Of one evaluation with everything the network reads."""
    generator = torch.Generator().manual_seed(1)
    config = pipeline.unet.config
    x = torch.randn(2, config.in_channels, SIDE // FACTOR, SIDE // FACTOR, generator=generator)
    tokens, t = torch.randn(2, 77, config.cross_attention_dim, generator=generator), torch.tensor([13.0, 801.0])
    scale, embedded = None, None
    if guidance is not None:
        scale = torch.full((2,), guidance)
        embedded = pipeline.get_guidance_scale_embedding(scale - 1, config.time_cond_proj_dim)
    with torch.no_grad():
        expected = pipeline.unet(x, t, tokens, timestep_cond=embedded).sample
        return relative(model.backbone(x, t, Conditioning(tokens=tokens, guidance=scale)), expected)


def text_error(model: mz.Model, pipeline: Any) -> float:
    """Over short, empty and cut prompts."""
    prompts = [PROMPT, "", LONG]
    assert model.text is not None
    found = model.text.encode(prompts).tokens
    assert found is not None
    with torch.no_grad():
        return relative(found, pipeline.encode_prompt(prompts, "cpu", 1, False)[0])


def codec_error(model: mz.Model, pipeline: Any) -> float:
    """Of encoding and decoding, in the backbone's units."""
    vae, generator = pipeline.vae, torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, SIDE, SIDE, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
        return max(relative(model.codec.encode(pixels), latents), relative(model.codec.decode(latents), decoded))


# Rows.


def parity(root: Path) -> list[Row]:
    """A row for each kind of model of both families."""
    return [measure(root) for measure in ROWS.values()]


def plain(root: Path) -> Row:
    """Every sampler, what a request can say, pictures to start from and to repaint with a model not made for it."""
    folder = write_plain(root)
    pipeline, model = both(folder)
    start = {"start_noise": noise(), "negative": NEGATIVE}
    wishes = {f"{name} 4, guidance 7.5": request(sampler=name, **start) for name in SCHEDULERS}
    wishes |= {
        "dpmpp_2m_karras 20, guidance 3": request(sampler="dpmpp_2m_karras", steps=20, guidance=3.0, **start),
        "unipc 7, no guidance": request(sampler="unipc", steps=7, guidance=1.0, start_noise=noise()),
        "ddim 3, eta 0.5": request(sampler="ddim", steps=3, eta=0.5, **start),
        "euler 4, cut prompts": request(LONG, sampler="euler", steps=4, negative=f"{NEGATIVE} {LONG}"),
        "euler 4, no prompt": request("", sampler="euler", steps=4, **start),
        "dpmpp_2m 4, guidance 9 rescaled by 0.7": request(
            sampler="dpmpp_2m", steps=4, guidance=9.0, guidance_rescale=0.7
        ),
    }
    runs = {name: apart(model, pipeline, wish) for name, wish in wishes.items()}
    batch = [
        request(sampler="dpmpp_2m_sde", negative=NEGATIVE), request("", sampler="dpmpp_2m_sde"),
        request(LONG, sampler="dpmpp_2m_sde", seed=8, count=2),
    ]  # fmt: skip
    runs["dpmpp_2m_sde 4, three prompts and four images at once"] = apart(model, pipeline, *batch)

    from_picture = rebuilt(pipeline, "StableDiffusionImg2ImgPipeline")
    for strength, names in (
        (0.3, ("ddim", "euler")),
        (0.75, ("euler_ancestral", "heun", "dpmpp_2m_karras", "unipc")),
        (1.0, ("euler", "lcm")),
    ):
        for name in names:
            wish = request(sampler=name, steps=7, guidance=4.0, image=picture(), strength=strength)
            runs[f"{name} 7 from a picture, strength {strength}"] = apart(model, from_picture, wish)
    repainting = rebuilt(pipeline, "StableDiffusionInpaintPipeline")
    for name in ("ddim", "euler_ancestral", "dpmpp_2m_karras", "unipc"):
        wish = request(sampler=name, steps=4, image=picture(), mask=OFF, strength=1.0)
        runs[f"{name} 4 repainting without channels for it"] = apart(model, repainting, wish)
    wish = request(sampler="heun", image=picture(), mask=ALIGNED, strength=0.6)
    runs["heun 4 repainting at strength 0.6"] = apart(model, repainting, wish)

    single = mz.load(saved(first_file(folder), root / "v1-5.safetensors"))
    return row("Stable Diffusion 1.x", model, pipeline, runs, between(model, single))


def row(
    title: str,
    model: mz.Model,
    pipeline: Any,
    runs: Mapping[str, float],
    original: float | None = None,
    guidance: float | None = None,
) -> Row:
    """The runs together with the parts; `original` where a single file was opened too."""
    layouts = ("folder",) if original is None else ("folder", "single file")
    parts = backbone_error(model, pipeline, guidance), text_error(model, pipeline), codec_error(model, pipeline)
    return Row(title, layouts, *parts, runs=runs, original=original)


def between(model: mz.Model, other: mz.Model, **more: Any) -> float:
    """Distance of two models' latents, over samplers that obey different parts of a scheduler file."""
    wishes = [request(sampler=name, steps=3, **more) for name in ("ddim", "euler", "dpmpp_2m")]
    return max(distance(mz.generate(other, wish).latents, mz.generate(model, wish).latents) for wish in wishes)


def inpainting(root: Path) -> Row:
    """Nine channels: masks on the grid of the latents and off it."""
    folder = write_inpainting(root)
    pipeline, model = both(folder, "StableDiffusionInpaintPipeline")
    runs: dict[str, float] = {}
    ways = [("ddim", ALIGNED, 1.0), ("ddim", OFF, 1.0), ("dpmpp_2m", OFF, 0.6), ("heun", OFF, 1.0), ("unipc", OFF, 0.6)]
    for name, cells, strength in ways:
        wish = request(sampler=name, negative=NEGATIVE, image=picture(), mask=cells, strength=strength)
        where = "on" if cells is ALIGNED else "off"
        runs[f"{name} 4, mask {where} the grid, strength {strength}"] = apart(model, pipeline, wish)
    wishes = [
        request(sampler="euler", image=picture(seed), mask=cells, strength=1.0, seed=seed)
        for seed, cells in ((1, ALIGNED), (2, OFF))
    ]
    runs["euler 4, two pictures with masks of their own"] = apart(model, pipeline, *wishes)
    single = mz.load(saved(content(folder, sd1.FAMILY), root / "inpainting.safetensors"))
    original = between(model, single, image=picture(), mask=OFF)
    return row("Stable Diffusion 1.x inpainting", model, pipeline, runs, original)


def control(root: Path) -> Row:
    """One network and two at once; from its folder, from an original file with its prefix and bare."""
    from diffusers import ControlNetModel

    folder, places = write_plain(root), [write_control(root, seed) for seed in (1, 2)]
    nets = [ControlNetModel.from_pretrained(place) for place in places]
    pipeline, model = both(folder)
    first, second = picture(7), picture(8, side=40)
    one = rebuilt(pipeline, "StableDiffusionControlNetPipeline", controlnet=nets[0])
    two = rebuilt(pipeline, "StableDiffusionControlNetPipeline", controlnet=nets)
    again = rebuilt(pipeline, "StableDiffusionControlNetImg2ImgPipeline", controlnet=nets[0])
    runs: dict[str, float] = {}
    for name, scale in (("ddim", 1.0), ("unipc", 0.6), ("heun", 1.5)):
        wish = request(sampler=name, negative=NEGATIVE, control=[(places[0], first, scale)])
        runs[f"{name} 4, scale {scale}"] = apart(model, one, wish)
    pair = [(places[0], first, 0.7), (places[1], second, 1.2)]
    runs["dpmpp_2m 4, two networks"] = apart(model, two, request(sampler="dpmpp_2m", control=pair))
    batch = [
        request(text, sampler="ddim", steps=3, control=pair[:1], seed=seed) for seed, text in ((1, PROMPT), (2, ""))
    ]
    runs["ddim 3, two prompts"] = apart(model, one, *batch)
    wish = request(sampler="euler", image=picture(), strength=0.6, control=pair[:1])
    runs["euler 4 from a picture"] = apart(model, again, wish)

    named = control_file(places[0]), control_file(places[0], prefix="")
    files = [saved(tensors, root / file) for tensors, file in zip(named, ("c.safetensors", "c.pth"), strict=True)]
    wishes = [request(sampler="ddim", steps=3, control=[(place, first, 0.7)]) for place in (places[0], *files)]
    latents = [mz.generate(model, wish).latents for wish in wishes]
    return Row(
        model="ControlNet for Stable Diffusion 1.x", layouts=("folder", "single file"),
        backbone=control_error(places[0], nets[0]), runs=runs,
        original=max(distance(found, latents[0]) for found in latents[1:]),
    )  # fmt: skip


def control_error(folder: Path, expected: Any) -> float:
    """Of what the network adds to every block."""
    from mezzotint.families.control import load_control

    generator = torch.Generator().manual_seed(1)
    x, tokens = noise(count=2), torch.randn(2, 77, 64, generator=generator)
    t, hint = torch.tensor([13.0, 801.0]), torch.rand(2, 3, SIDE, SIDE, generator=generator)
    with torch.no_grad():
        down, middle = expected(x, t, tokens, hint, return_dict=False)
        found = load_control(folder)(x, t, Conditioning(tokens=tokens), hint)
    return max(relative(ours, other) for ours, other in zip(found, (*down, middle), strict=True))


def consistency(root: Path) -> Row:
    folder = write_consistency(root)
    pipeline, model = both(folder, "LatentConsistencyModelPipeline")
    scales = ((1, 8.5), (2, 2.0), (4, 1.0), (4, 8.5), (8, 8.5))
    wishes = {f"lcm {steps}, told {scale}": request(steps=steps, guidance=scale) for steps, scale in scales}
    runs = {name: apart(model, pipeline, wish) for name, wish in wishes.items()}
    batch = [request(steps=2, guidance=4.0), request(LONG, steps=2, guidance=4.0, seed=9)]
    runs["lcm 2, two prompts"] = apart(model, pipeline, *batch)
    from_picture = rebuilt(pipeline, "LatentConsistencyModelImg2ImgPipeline")
    for steps, strength in ((2, 0.3), (4, 0.75)):
        wish = request(steps=steps, guidance=8.5, image=picture(), strength=strength)
        runs[f"lcm {steps} from a picture, strength {strength}"] = apart(model, from_picture, wish)
    return row("Latent consistency model", model, pipeline, runs, guidance=8.5)


def velocity(root: Path) -> Row:
    """2.1: the reference starts from a DDIM file."""
    folder = write_velocity(root)
    pipeline, model = both(folder)
    names = ("ddpm", "euler", "heun", "dpmpp_2m_karras", "unipc")
    runs = {f"{name} 4": apart(model, pipeline, request(sampler=name, negative=NEGATIVE)) for name in names}
    runs["the file's own, ddim 20"] = apart(model, pipeline, request(steps=20))
    runs["ddim 3, cut prompts"] = apart(model, pipeline, request(LONG, sampler="ddim", steps=3))
    from_picture = rebuilt(pipeline, "StableDiffusionImg2ImgPipeline")
    wish = request(sampler="dpmpp_2m", image=picture(), strength=0.75)
    runs["dpmpp_2m 4 from a picture, strength 0.75"] = apart(model, from_picture, wish)
    single = mz.load(saved(second_file(folder), root / "v2-1.safetensors"), prediction="velocity")
    return row("Stable Diffusion 2.1", model, pipeline, runs, between(model, single))


def second(root: Path) -> Row:
    """2.x-base."""
    folder = write_second(root)
    pipeline, model = both(folder)
    names = ("ddim", "euler", "dpmpp_2m", "unipc")
    runs = {f"{name} 4": apart(model, pipeline, request(sampler=name, negative=NEGATIVE)) for name in names}
    single = mz.load(saved(second_file(folder), root / "v2-base.safetensors"), prediction="epsilon")
    return row("Stable Diffusion 2.x-base", model, pipeline, runs, between(model, single))


ROWS = {
    "plain": plain, "inpainting": inpainting, "control": control, "consistency": consistency, "velocity": velocity,
    "second": second,
}  # fmt: skip

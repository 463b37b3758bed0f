"""Tiny Stable Diffusion XL checkpoints written by the reference libraries, and how far our runs are from theirs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import randomise, relative
from parity_rows import Row
from PIL import Image
from safetensors.torch import save_file
from text_parts import tiny_clip, tiny_clip_tokenizer
from torch import Tensor

import mezzotint as mz
from mezzotint import images
from mezzotint.checkpoints.keymap import restored
from mezzotint.conditioning import Conditioning
from mezzotint.families import sdxl
from mezzotint.families.family import Family
from mezzotint.families.materials import read_folder

FACTOR = 4  # of the tiny autoencoder
WIDTH, HEIGHT = 40, 24  # pixels
SHAPE = (4, HEIGHT // FACTOR, WIDTH // FACTOR)
POOLED = 1280  # as published: the width of the vector tells a single file's kind
PROMPT, NEGATIVE = "a crack on the cell", "the dark area"
LONG = " ".join(f"crack {i} on the cell," for i in range(40))  # beyond 77 tokens

EULER = {  # as Stable Diffusion XL base was published
    "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "interpolation_type": "linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}  # fmt: skip
VELOCITY = EULER | {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
}  # fmt: skip
CONSISTENCY = {  # as LCM-SDXL was published
    "_class_name": "LCMScheduler", "_diffusers_version": "0.23.0.dev0", "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "clip_sample": False, "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995, "interpolation_type": "linear", "num_train_timesteps": 1000,
    "original_inference_steps": 50, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0, "set_alpha_to_one": True, "skip_prk_steps": True, "steps_offset": 1,
    "thresholding": False, "timestep_scaling": 10.0, "timestep_spacing": "leading", "trained_betas": None,
    "use_karras_sigmas": False,
}  # fmt: skip
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # our sampler -> the reference's, with what sets it
    "euler": ("EulerDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "lcm": ("LCMScheduler", {}),
}  # fmt: skip


# Checkpoints.


def calm(network: Any, seed: int) -> Any:
    """A value of its own for every parameter, small enough that a whole run stays finite."""
    randomise(network, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(0.6 if parameter.ndim > 1 else 1.0)
    return network.eval()


def tiny_unet(channels: int = 4, told: int | None = None, text: int = 64 + 128, sizes: int = 6, seed: int = 0) -> Any:
    from diffusers import UNet2DConditionModel

    return calm(
        UNet2DConditionModel(
            sample_size=16, in_channels=channels, **shared(text, sizes), time_cond_proj_dim=told,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ),
        seed,
    )  # fmt: skip


def tiny_control(seed: int) -> Any:
    from diffusers import ControlNetModel

    network = ControlNetModel(**shared(64 + 128, 6), conditioning_embedding_out_channels=(8, 16, 32))
    return calm(network, seed)


def shared(text: int, sizes: int) -> dict[str, Any]:
    """What a U-Net and its control networks have in common; heads are 64 wide as in every published one."""
    return {
        "block_out_channels": (64, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "layers_per_block": 1, "transformer_layers_per_block": (1, 2), "attention_head_dim": (1, 1),
        "cross_attention_dim": text, "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": POOLED + 256 * sizes,
    }  # fmt: skip


def tiny_vae() -> Any:
    """An autoencoder that is certain of what it sees: the reference draws from its posterior, we take the mean."""
    from diffusers import AutoencoderKL

    config: dict[str, Any] = {
        "block_out_channels": (32, 32, 32), "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3, "layers_per_block": 1, "latent_channels": 4,
        "sample_size": WIDTH, "scaling_factor": 0.13025, "force_upcast": True,
    }  # fmt: skip
    vae = calm(AutoencoderKL(**config), 3)
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0.0
        vae.quant_conv.bias[4:] = -30.0
    return vae


@cache
def common(root: Path) -> Path:
    """The parts that all checkpoints here share, written once."""
    tiny_clip(root / "text_encoder", 64, heads=1)
    tiny_clip(root / "text_encoder_2", 128, projection=POOLED, heads=2, act="gelu", seed=1)
    tiny_clip_tokenizer(root / "tokenizer")
    tiny_clip_tokenizer(root / "tokenizer_2", pad="!")
    tiny_vae().save_pretrained(root / "vae")
    return root


def write(root: Path, name: str, unet: Any, pipeline: str, scheduler: Mapping[str, Any] = EULER, **index: Any) -> Path:
    """A model folder; a refiner's index says that there is no first text encoder."""
    folder = root / name
    if folder.exists():
        return folder
    unet.save_pretrained(folder / "unet")
    refines = "requires_aesthetics_score" in index
    parts = {
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    if refines:
        parts |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    for part, (library, _) in parts.items():
        if library:
            shutil.copytree(common(root / "common") / part, folder / part)
    parts |= {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", scheduler["_class_name"]]}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    words = {"_class_name": pipeline, "_diffusers_version": "0.42.1"}
    (folder / "model_index.json").write_text(json.dumps(words | parts | index))
    return folder


def write_base(root: Path, name: str = "base", **index: Any) -> Path:
    return write(
        root, name, tiny_unet(), "StableDiffusionXLPipeline", **{"force_zeros_for_empty_prompt": True, **index}
    )


def write_inpainting(root: Path) -> Path:
    unet = tiny_unet(channels=9, seed=1)
    return write(root, "inpainting", unet, "StableDiffusionXLInpaintPipeline", force_zeros_for_empty_prompt=True)


def write_refiner(root: Path) -> Path:
    unet = tiny_unet(text=128, sizes=5, seed=2)
    return write(
        root, "refiner", unet, "StableDiffusionXLImg2ImgPipeline",
        force_zeros_for_empty_prompt=False, requires_aesthetics_score=True,
    )  # fmt: skip


def write_consistency(root: Path) -> Path:
    unet = tiny_unet(told=32, seed=3)
    return write(root, "consistency", unet, "StableDiffusionXLPipeline", CONSISTENCY, force_zeros_for_empty_prompt=True)


def write_velocity(root: Path) -> Path:
    unet = tiny_unet(seed=4)
    return write(root, "velocity", unet, "StableDiffusionXLPipeline", VELOCITY, force_zeros_for_empty_prompt=True)


def write_control(root: Path, seed: int) -> Path:
    folder = root / f"control_{seed}"
    tiny_control(seed).save_pretrained(folder)
    return folder


def single_file(folder: Path, file: Path, family: Family, marks: Sequence[str] = ()) -> Path:
    """The same weights as one original file, with what real ones carry beside their weights."""
    materials = read_folder(folder)
    assert family.original is not None
    content: dict[str, Tensor] = {}
    for part, section in family.original.sections({}, {}).items():
        material = materials.parts[part]
        tensors = restored(material.tensors, section.rows(material.config)) if section.rows else material.tensors
        content |= {section.prefix + name: tensor for name, tensor in tensors.items()}
        if section.prefix + "token_embedding.weight" in content:
            content[section.prefix + "logit_scale"] = torch.tensor(4.6)
    if family is sdxl.FAMILY:
        positions = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
        content[positions] = torch.arange(77)[None]
    content |= {mark: torch.zeros(0) for mark in marks}
    save_file({name: tensor.contiguous() for name, tensor in content.items()}, file)
    return file


def beside(root: Path) -> Path:
    """Tokenizers alone, for single files: the tiny text encoders know few words."""
    folder = root / "tokenizers"
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(common(root / "common") / name, folder / name, dirs_exist_ok=True)
    return folder


# Runs.


def opened(folder: Path, kind: str = "StableDiffusionXLPipeline", **parts: Any) -> Any:
    """A pipeline of the reference from its folder, quiet."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipeline = getattr(diffusers, kind).from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def rebuilt(pipeline: Any, kind: str, **parts: Any) -> Any:
    """Another pipeline of the reference around the same networks."""
    import diffusers

    found = getattr(diffusers, kind).from_pipe(pipeline, **parts)
    found.set_progress_bar_config(disable=True)
    return found


def noise(seed: int = 11, count: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def second_draw(seed: int) -> Tensor:
    """What the reference noises a picture with: its first draw goes to the autoencoder's posterior."""
    generator = torch.Generator().manual_seed(seed)
    torch.randn(1, *SHAPE, generator=generator)
    return torch.randn(1, *SHAPE, generator=generator)


def request(prompt: str = PROMPT, **more: Any) -> mz.Request:
    told: dict[str, Any] = {"steps": 20, "guidance": 5.0, "width": WIDTH, "height": HEIGHT}
    return mz.Request(prompt=prompt, **(told | more))


def picture(seed: int = 5) -> Image.Image:
    """Something with smooth and sharp places."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [np.sin(x / (5 + k) + seed) * np.cos(y / (3 + k)) for k in range(3)]
    pixels = np.stack([128 + 90 * wave + 30 * ((x // 16 + y // 16) % 2) for wave in waves], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def mask(left: int, top: int, right: int, bottom: int) -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    pixels[top:bottom, left:right] = 255
    return Image.fromarray(pixels)


def told(requests: Sequence[mz.Request]) -> dict[str, Any]:
    """The same wish in the reference's words."""
    one, every = requests[0], [request for request in requests for _ in range(request.count)]
    found: dict[str, Any] = {
        "prompt": [request.prompt for request in every],
        "negative_prompt": [request.negative for request in every] if any(r.negative for r in requests) else None,
        "num_inference_steps": one.steps,
        "guidance_scale": one.guidance,
        "generator": [torch.Generator().manual_seed(r.seed + i) for r in requests for i in range(r.count)],
        "output_type": "latent",
    }
    if one.original_size:
        found["original_size"] = one.original_size[::-1]
    if one.crop != (0, 0):
        found["crops_coords_top_left"] = one.crop[::-1]
    if one.guidance_rescale:
        found["guidance_rescale"] = one.guidance_rescale
    if one.eta is not None:
        found["eta"] = one.eta
    if one.image is not None:
        found |= {"image": one.image, "strength": one.strength}
        if one.crop != (0, 0):
            found["negative_crops_coords_top_left"] = found["crops_coords_top_left"]
        if (one.aesthetic, one.negative_aesthetic) != (6.0, 2.5):  # the reference's own, where it asks for them
            found |= {"aesthetic_score": one.aesthetic, "negative_aesthetic_score": one.negative_aesthetic}
    if one.mask is not None:
        found["mask_image"] = one.mask
    if one.image is None or one.mask is not None:
        found |= {"width": one.width, "height": one.height}
    if one.start_noise is not None and (one.image is None or (one.mask is not None and one.strength == 1.0)):
        found["latents"] = torch.cat([r.start_noise for r in requests if r.start_noise is not None])
    if one.control:
        pictures, scales = [shown for _, shown, _ in one.control], [scale for _, _, scale in one.control]
        several = len(pictures) > 1
        found |= {
            "image": pictures if several else pictures * len(every),
            "controlnet_conditioning_scale": scales if several else scales[0],
        }
    return found


def theirs(pipeline: Any, *requests: mz.Request, sampler: str = "euler", **more: Any) -> Any:
    """What the reference draws, its sampler made from its own scheduler file."""
    import diffusers

    own = pipeline.scheduler
    name, settings = SCHEDULERS[requests[0].sampler or sampler]
    pipeline.scheduler = getattr(diffusers, name).from_config(own.config, **settings)
    try:
        return pipeline(**(told(requests) | more)).images
    finally:
        pipeline.scheduler = own


def apart(model: mz.Model, pipeline: Any, *requests: mz.Request, **more: Any) -> float:
    """Relative distance of the final latents of a whole run."""
    ours = torch.cat([result.latents for result in mz.generate_batch(model, list(requests))])
    expected = theirs(pipeline, *requests, **more)
    assert ours.isfinite().all() and ours.shape == expected.shape
    return distance(ours, expected)


def distance(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


# Parts.


def backbone_error(model: mz.Model, pipeline: Any, sizes: int, told: float | None = None) -> float:
    """Of one evaluation with everything the network reads."""
    generator = torch.Generator().manual_seed(1)
    config = pipeline.unet.config
    x = torch.randn(2, config.in_channels, *SHAPE[1:], generator=generator)
    tokens = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    pooled = torch.randn(2, POOLED, generator=generator)
    ids, t = torch.rand(2, sizes, generator=generator) * 1024, torch.tensor([13.0, 801.0])
    guidance, scale = None, None
    if told is not None:
        scale = torch.full((2,), told)
        guidance = pipeline.get_guidance_scale_embedding(scale - 1, config.time_cond_proj_dim)
    with torch.no_grad():
        expected = pipeline.unet(
            x, t, tokens, timestep_cond=guidance, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}
        ).sample
        ours = model.backbone(x, t, Conditioning(tokens=tokens, pooled=pooled, time_ids=ids, guidance=scale))
    return relative(ours, expected)


def text_error(model: mz.Model, pipeline: Any) -> float:
    """Of states and pooled vector, over short, empty and cut prompts."""
    prompts = [PROMPT, "", LONG]
    assert model.text is not None
    found = model.text.encode(prompts)
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert found.tokens is not None and found.pooled is not None
    return max(relative(found.tokens, tokens), relative(found.pooled, pooled))


def codec_error(model: mz.Model, pipeline: Any) -> float:
    """Of encoding and decoding, in the backbone's units."""
    vae, generator = pipeline.vae, torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=generator) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
        return max(relative(model.codec.encode(pixels), latents), relative(model.codec.decode(latents), decoded))


# Rows.


def parity(root: Path) -> list[Row]:
    """A row for each kind of model of the family."""
    return [row(root) for row in ROWS.values()]


def base(root: Path) -> Row:
    """Every sampler, and everything a request can say."""
    folder = write_base(root)
    pipeline, model = opened(folder), mz.load(folder)
    start = {"start_noise": noise(), "seed": 3}
    wishes = {f"{name} 3, guidance 5": request(sampler=name, steps=3, **start) for name in SCHEDULERS}
    wishes |= {
        "euler 20, guidance 7.5": request(guidance=7.5, **start),
        "dpmpp_2m_karras 9, guidance 3": request(sampler="dpmpp_2m_karras", steps=9, guidance=3.0, **start),
        "unipc 6, no guidance": request(sampler="unipc", steps=6, guidance=1.0, **start),
        "ddim 4, eta 0.5": request(sampler="ddim", steps=4, eta=0.5, **start),
        "euler 4, negative prompt": request(steps=4, negative=NEGATIVE, **start),
        "ddim 3, cut prompts": request(LONG, sampler="ddim", steps=3, negative=f"{NEGATIVE} {LONG}", **start),
        "euler 3, no prompt": request("", steps=3, **start),
        "euler 4, guidance 9 rescaled by 0.7": request(steps=4, guidance=9.0, guidance_rescale=0.7, **start),
        "euler 4, told another size": request(steps=4, original_size=(200, 120), crop=(24, 8), **start),
    }
    runs = {name: apart(model, pipeline, wish) for name, wish in wishes.items()}
    runs |= batches(model, pipeline)

    encoding = write_base(root, "encoding", force_zeros_for_empty_prompt=False)
    wish = request(steps=4, **start)
    runs["euler 4, empty prompt encoded"] = apart(mz.load(encoding), opened(encoding), wish)

    single = mz.load(single_file(folder, root / "base.safetensors", sdxl.FAMILY), parts=beside(root))
    return Row(
        model="Stable Diffusion XL", layouts=("folder", "single file"), backbone=backbone_error(model, pipeline, 6),
        text=text_error(model, pipeline), codec=codec_error(model, pipeline), runs=runs,
        original=same(single, model, request(sampler="ddim", steps=4, negative=NEGATIVE, **start)),
    )  # fmt: skip


def batches(model: mz.Model, pipeline: Any) -> dict[str, float]:
    """Several prompts, seeds and images of one prompt drawn together."""
    prompts = {PROMPT: (NEGATIVE, 3, 2), "the cell": ("dark", 40, 1), "": ("a crack", 0, 1)}
    found: dict[str, float] = {}
    for sampler, steps in (("euler_ancestral", 3), ("dpmpp_2m", 3)):
        wishes = [
            request(prompt, negative=against, seed=seed, count=count, sampler=sampler, steps=steps,
                    start_noise=noise(seed, count))
            for prompt, (against, seed, count) in prompts.items()
        ]  # fmt: skip
        found[f"{sampler} {steps}, three prompts at once"] = apart(model, pipeline, *wishes)
    return found


def from_pictures(root: Path) -> Row:
    """The base given a picture: to change it, and to repaint a part of it."""
    folder = write_base(root)
    model, plain = mz.load(folder), opened(folder)
    pipeline = rebuilt(plain, "StableDiffusionXLImg2ImgPipeline")
    runs: dict[str, float] = {}
    start = {"image": picture(), "seed": 8, "negative": NEGATIVE, "start_noise": second_draw(8)}
    for sampler, steps, strength in (
        ("euler", 10, 0.45), ("ddim", 10, 0.39), ("heun", 6, 0.34), ("dpmpp_2m", 8, 0.5), ("dpmpp_2m_karras", 8, 0.5),
        ("unipc", 8, 0.5), ("euler", 4, 1.0),
    ):  # fmt: skip
        wish = request(sampler=sampler, steps=steps, strength=strength, **start)
        runs[f"{sampler} {steps}, strength {strength:g}"] = apart(model, pipeline, wish)
    repainting = rebuilt(plain, "StableDiffusionXLInpaintPipeline")
    start["mask"] = mask(9, 6, 34, 19)
    for sampler, steps, strength in (
        ("euler", 4, 1.0), ("ddim", 8, 0.5), ("dpmpp_2m", 6, 0.75), ("unipc_karras", 4, 1.0),
    ):  # fmt: skip
        wish = request(sampler=sampler, steps=steps, strength=strength, **start)
        runs[f"{sampler} {steps}, repainting, strength {strength:g}"] = apart(model, repainting, wish)
    return Row(
        model="Stable Diffusion XL, from pictures", layouts=("folder",), backbone=backbone_error(model, plain, 6),
        codec=codec_error(model, plain), runs=runs,
    )  # fmt: skip


def inpainting(root: Path) -> Row:
    """Nine channels; the mask's edges fall inside latents."""
    folder = write_inpainting(root)
    pipeline, model = opened(folder, "StableDiffusionXLInpaintPipeline"), mz.load(folder)
    start = {"image": picture(), "mask": mask(9, 6, 34, 19), "seed": 8, "start_noise": second_draw(8)}
    runs: dict[str, float] = {}
    for sampler, steps, strength in (
        ("euler", 6, 1.0), ("ddim", 5, 0.99), ("heun", 5, 0.6), ("dpmpp_2m_karras", 5, 1.0), ("unipc", 8, 0.5),
    ):  # fmt: skip
        wish = request(sampler=sampler, steps=steps, strength=strength, guidance=8.0, **start)
        runs[f"{sampler} {steps}, strength {strength:g}"] = apart(model, pipeline, wish)
    single = mz.load(single_file(folder, root / "inpainting.safetensors", sdxl.FAMILY), parts=beside(root))
    return Row(
        model="Stable Diffusion XL inpainting", layouts=("folder", "single file"),
        backbone=backbone_error(model, pipeline, 6), text=text_error(model, pipeline),
        codec=codec_error(model, pipeline), runs=runs,
        original=same(single, model, request(steps=5, **start)),
    )  # fmt: skip


def refiner(root: Path) -> Row:
    """After the base in practice: its picture, strength 0.3."""
    folder = write_refiner(root)
    pipeline, model = opened(folder, "StableDiffusionXLImg2ImgPipeline"), mz.load(folder)
    start = {"image": picture(), "seed": 8, "start_noise": second_draw(8)}
    wishes = {
        "euler 20, strength 0.3": request(strength=0.3, **start),
        "ddim 10, negative prompt": request(sampler="ddim", steps=10, strength=0.5, negative=NEGATIVE, **start),
        "dpmpp_2m 10, cut prompt": request(LONG, sampler="dpmpp_2m", steps=10, strength=0.6, **start),
        "unipc 10, other scores": request(
            sampler="unipc", steps=10, strength=0.4, aesthetic=7.5, negative_aesthetic=1.0, **start
        ),
        "heun 6, told another size": request(
            sampler="heun", steps=6, strength=0.5, original_size=(200, 120), crop=(24, 8), **start
        ),
        "dpmpp_2m_karras 8, no guidance": request(
            sampler="dpmpp_2m_karras", steps=8, strength=0.5, guidance=1.0, **start
        ),
    }
    runs = {name: apart(model, pipeline, wish) for name, wish in wishes.items()}
    single = mz.load(single_file(folder, root / "refiner.safetensors", sdxl.REFINER), parts=beside(root))
    return Row(
        model="Stable Diffusion XL refiner", layouts=("folder", "single file"),
        backbone=backbone_error(model, pipeline, 5), text=text_error(model, pipeline),
        codec=codec_error(model, pipeline), runs=runs,
        original=same(single, model, request(steps=10, strength=0.3, negative=NEGATIVE, **start)),
    )  # fmt: skip


def controlled(root: Path) -> Row:
    """One control network and two."""
    folder, nets = write_base(root), [write_control(root, seed) for seed in (5, 6)]
    import diffusers

    model, plain = mz.load(folder), opened(folder)
    networks = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    one = rebuilt(plain, "StableDiffusionXLControlNetPipeline", controlnet=networks[0])
    two = rebuilt(plain, "StableDiffusionXLControlNetPipeline", controlnet=networks)
    shown = [(nets[0], picture(1), 0.7), (nets[1], picture(2), 1.2)]
    start: dict[str, Any] = {"start_noise": noise(), "steps": 4, "negative": NEGATIVE}
    runs = {
        "euler 4, one": apart(model, one, request(control=shown[:1], **start)),
        "ddim 4, one": apart(model, one, request(sampler="ddim", control=shown[:1], **start)),
        "dpmpp_2m_karras 4, two": apart(model, two, request(sampler="dpmpp_2m_karras", control=shown, **start)),
        "unipc 4, two": apart(model, two, request(sampler="unipc", control=shown, **start)),
    }
    changing = rebuilt(plain, "StableDiffusionXLControlNetImg2ImgPipeline", controlnet=networks[0])
    wish = request(steps=6, strength=0.5, image=picture(), control=shown[:1], seed=8, start_noise=second_draw(8))
    pictures = {"image": [picture()], "control_image": [picture(1)]}
    runs["euler 6, one, strength 0.5"] = apart(model, changing, wish, **pictures)
    return Row(
        model="Stable Diffusion XL with ControlNet", layouts=("folder",), backbone=backbone_error(model, plain, 6),
        runs=runs,
    )  # fmt: skip


def consistency(root: Path) -> Row:
    """A latent consistency model: told the guidance scale, no second branch."""
    folder = write_consistency(root)
    pipeline, model = opened(folder), mz.load(folder)
    start = {"start_noise": noise(), "seed": 3}
    runs = {
        f"lcm {steps}, told {scale:g}": apart(
            model, pipeline, request(sampler="lcm", steps=steps, guidance=scale, **start)
        )
        for steps, scale in ((1, 8.0), (2, 1.0), (4, 8.0), (8, 4.5))
    }
    wishes = [
        request(prompt, sampler="lcm", steps=4, guidance=7.0, seed=seed, start_noise=noise(seed))
        for prompt, seed in ((PROMPT, 1), (LONG, 2))
    ]
    runs["lcm 4, two prompts at once"] = apart(model, pipeline, *wishes)
    changing = rebuilt(pipeline, "StableDiffusionXLImg2ImgPipeline")
    wish = request(sampler="lcm", steps=6, guidance=7.0, seed=8, image=picture(), strength=0.6)
    with torch.no_grad():  # latents as the picture: no draw goes to the posterior, and steps draw as ours do
        latents = model.codec.encode(images.to_tensor(picture(), WIDTH, HEIGHT))
    found, expected = mz.generate(model, wish).latents, theirs(changing, wish, image=latents)
    runs["lcm 6, strength 0.6"] = distance(found, expected)
    return Row(
        model="LCM-SDXL", layouts=("folder",), backbone=backbone_error(model, pipeline, 6, told=4.5),
        text=text_error(model, pipeline), codec=codec_error(model, pipeline), runs=runs,
    )  # fmt: skip


def velocity(root: Path) -> Row:
    """Fine-tunes that predict the velocity from pure noise on, as a scheduler file or two marks in a file say."""
    folder = write_velocity(root)
    pipeline, model = opened(folder), mz.load(folder)
    start = {"start_noise": noise(), "seed": 3, "guidance_rescale": 0.7}
    walks = {"euler": 8, "ddim": 10, "dpmpp_2m": 4, "dpmpp_2m_karras": 4, "dpmpp_2m_sde": 3, "unipc": 4, "lcm": 3}
    wishes = {sampler: request(sampler=sampler, steps=steps, **start) for sampler, steps in walks.items()}
    runs = {
        f"{sampler} {wish.steps}, guidance 5 rescaled by 0.7": apart(model, pipeline, wish)
        for sampler, wish in wishes.items()
    }
    file = single_file(folder, root / "velocity.safetensors", sdxl.FAMILY, marks=("v_pred", "ztsnr"))
    single = mz.load(file, parts=beside(root))
    return Row(
        model="Stable Diffusion XL, velocity", layouts=("folder", "single file"),
        backbone=backbone_error(model, pipeline, 6), text=text_error(model, pipeline),
        codec=codec_error(model, pipeline), runs=runs,
        original=same(single, model, request(sampler="ddim", steps=6, **start)),
    )  # fmt: skip


def same(one: mz.Model, other: mz.Model, wish: mz.Request) -> float:
    """Relative distance between two models' latents."""
    return distance(mz.generate(one, wish).latents, mz.generate(other, wish).latents)


ROWS: dict[str, Callable[[Path], Row]] = {
    "base": base,
    "from pictures": from_pictures,
    "inpainting": inpainting,
    "refiner": refiner,
    "controlled": controlled,
    "consistency": consistency,
    "velocity": velocity,
}

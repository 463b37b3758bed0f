"""Latent diffusion and DiT: tiny random checkpoints as the reference library writes them, and what it draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from networks import randomise, relative
from original_networks import Weights, diffusion_transformer
from parity_rows import Row
from reference_pixels import (
    BOTH,
    Drawn,
    calmed,
    distance,
    draw,
    next_noise,
    one_noise,
    opened,
    run,
    scheduler,
    stated,
    walked,
)
from safetensors.torch import save_file
from text_parts import tiny_bert_tokenizer
from torch import Tensor

import mezzotint as mz
from mezzotint.backbones.dit import DiTConfig
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.dit import EMBEDDERS, dit
from mezzotint.checkpoints.layouts.text import bert_entries
from mezzotint.checkpoints.layouts.unet import unet
from mezzotint.checkpoints.layouts.vae import vae
from mezzotint.codec.kl_vae import KLVAEConfig
from mezzotint.codec.vq import VQConfig
from mezzotint.conditioning import Conditioning
from mezzotint.families import Model

BATCH, SIDE, WIDTH, CLASSES, SCALE = 2, 8, 32, 6, 0.7  # SIDE in latents, WIDTH of what cross-attention reads
UNET, STAGE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
PROMPTS = ["a crack on the cell", "crack " * 90]  # the second is longer than the context
NAMES = {0: "tench, Tinca tinca", 3: "crane", 7: "crane", 281: "tabby, tabby cat"}
PLAIN: dict[str, Any] = {
    "sample_size": SIDE, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
CROSS: dict[str, Any] = {
    "sample_size": SIDE, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
}  # fmt: skip
STAGES: dict[str, Any] = {"block_out_channels": (32, 32, 32), "layers_per_block": 1}
STAGES |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
DEEPER: dict[str, Any] = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
DEEPER |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
TABLE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
TABLE |= {"clip_sample": False, "steps_offset": 1}
CROSSED: dict[str, Any] = {**TABLE, "beta_start": 0.00085, "beta_end": 0.012}
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 8, "num_layers": 2,
    "sample_size": SIDE, "num_embeds_ada_norm": 1000,  # the reference's pipeline takes 1000 for "no class"
}  # fmt: skip
AUTHORS: dict[str, Any] = {"freq_shift": 0, "norm_eps": 1e-6}  # where the original DiT differs from the reference's


def quantised() -> Any:
    from diffusers import VQModel

    return random(VQModel(**STAGES, num_vq_embeddings=24, scaling_factor=1.0))


def gaussian(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return random(AutoencoderKL(**{**STAGES, "latent_channels": 4, "scaling_factor": SCALE, **options}))


def random(network: Any) -> Any:
    randomise(network)
    return network.eval()


def calm(network: Any) -> Any:
    calmed(network)
    return network.eval()


# Without condition


def unconditional(folder: Path, kind: str) -> Path:
    """An LDMPipeline over codes (f4) or over Gaussian latents; its autoencoder's folder is called vqvae."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel

    stage = quantised() if kind == "vq" else gaussian()
    channels = stage.config.latent_channels
    network = calm(UNet2DModel(**PLAIN, in_channels=channels, out_channels=channels))
    LDMPipeline(vqvae=stage, unet=network, scheduler=DDIMScheduler(**TABLE)).save_pretrained(folder)
    return folder


def settings(source: Path, part: str) -> dict[str, Any]:
    return json.loads((source / part / "config.json").read_text())


def tensors(source: Path, part: str, prefix: str, rows: Any) -> dict[str, Tensor]:
    """A part of a folder under its original names."""
    from mezzotint.checkpoints import open_tensors

    return {prefix + name: tensor.contiguous() for name, tensor in restored(open_tensors(source / part), rows).items()}


def first_stage(source: Path) -> dict[str, Tensor]:
    config = settings(source, "vqvae")
    kind = VQConfig if config["_class_name"] == "VQModel" else KLVAEConfig
    return tensors(source, "vqvae", STAGE, vae(kind.from_config(config)))


def beside(source: Path, folder: Path, **config: Any) -> None:
    stated(folder, {"sample_size": SIDE, **config}, source / "scheduler" / "scheduler_config.json")


def written(folder: Path, content: Mapping[str, Tensor]) -> Path:
    """A single file with the tables, averages and counters that original files carry."""
    table = {"betas": torch.linspace(0.1, 0.2, 4), "alphas_cumprod": torch.ones(4), "model_ema.decay": torch.ones(())}
    loss = {f"{STAGE}loss.logvar": torch.zeros(())}
    save_file({**content, **table, **loss}, folder / "model.safetensors")
    return folder / "model.safetensors"


def original_unconditional(source: Path, folder: Path) -> Path:
    beside(source, folder, attention_head_dim=16)
    config = settings(source, "unet")
    content = tensors(source, "unet", UNET, unet(UNetConfig.from_config(config))) | first_stage(source)
    if settings(source, "vqvae")["_class_name"] == "AutoencoderKL":
        content["scale_factor"] = torch.tensor(SCALE)  # as files carry it that measured it themselves
    return written(folder, content)


# By text


def by_text(folder: Path) -> Path:
    """An LDMTextToImagePipeline, its text encoder's folder called bert; f8."""
    from diffusers import DDIMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import BertTokenizer

    bert = LDMBertConfig(
        vocab_size=48, max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=64, encoder_attention_heads=1,
        head_dim=64, d_model=WIDTH,
    )  # fmt: skip
    encoder = random(LDMBertModel(bert))
    with torch.no_grad():
        for parameter in (encoder.model.embed_tokens.weight, encoder.model.embed_positions.weight):
            parameter.mul_(parameter.shape[1] ** 0.5)  # tokens must differ by more than rounding
    LDMTextToImagePipeline(
        vqvae=gaussian(**DEEPER), bert=encoder, unet=calm(UNet2DConditionModel(**CROSS)),
        tokenizer=BertTokenizer.from_pretrained(tiny_bert_tokenizer(folder.parent / "words")),
        scheduler=DDIMScheduler(**CROSSED),
    ).save_pretrained(folder)  # fmt: skip
    return folder


def original_by_text(source: Path, folder: Path) -> Path:
    """The tokenizer in a folder beside it; heads as in the published file."""
    beside(source, folder, _class_name="UNet2DConditionModel")
    shutil.copytree(source / "tokenizer", folder / "tokenizer")
    content = tensors(source, "unet", UNET, unet(ConditionalUNetConfig.from_config(settings(source, "unet"))))
    content |= first_stage(source) | tensors(source, "bert", TEXT, bert_entries({"encoder_layers": 2}))
    return written(folder, {**content, "scale_factor": torch.tensor(SCALE)})


# By class


def by_class(folder: Path, source: Path) -> tuple[Path, Any, Tensor]:
    """An original file of the ImageNet kind, which no pipeline of the reference draws with: file, network, table."""
    from diffusers import UNet2DConditionModel

    network = calm(UNet2DConditionModel(**{**CROSS, "in_channels": 3, "out_channels": 3}))
    table = torch.randn(CLASSES + 1, WIDTH, generator=torch.Generator().manual_seed(4))
    beside(source, folder)
    rows = unet(ConditionalUNetConfig.from_config(dict(network.config)))
    content = {UNET + name: tensor for name, tensor in restored(network.state_dict(), rows).items()}
    content |= first_stage(source) | {f"{TEXT}embedding.weight": table}
    return written(folder, content), network, table


def classes_run(network: Any, table: Tensor, label: int, scale: float, walk: Any, steps: int) -> Tensor:
    """Classifier-free guidance over the reference's network, its last row being "no class"; inside `one_noise`."""

    def guided(x: Tensor, t: Tensor) -> Tensor:
        row, nothing = (network(x, t, table[i].expand(len(x), 1, -1)).sample for i in (label, len(table) - 1))
        return nothing + scale * (row - nothing)

    return walked(guided, walk, next_noise(3, SIDE), steps)


# DiT


def transformer(folder: Path) -> Path:
    """A DiTPipeline with names of classes; all blocks share their embedders, as in the released weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = random(DiTTransformer2DModel(**TRANSFORMER))
    state = network.state_dict()
    for name in EMBEDDERS.values():
        for key in [key for key in state if f".emb.{name}." in key]:
            state[key].copy_(state["transformer_blocks.0" + key[len("transformer_blocks.0") :]])
            state[key].mul_(6.0 if "table" in name and key.startswith("transformer_blocks.0") else 1.0)
    with torch.no_grad():
        network.proj_out_2.weight.mul_(0.2)
    stage: AutoencoderKL = gaussian()
    walk: Any = DDIMScheduler(clip_sample=False)
    DiTPipeline(network, stage, walk).save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(i): NAMES.get(i, f"class {i}") for i in range(1000)}  # as published; not saved by itself
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def renamed_class(source: Path, folder: Path) -> Path:
    """The same folder as it was published at first: the network is a Transformer2DModel of norm `ada_norm_zero`."""
    shutil.copytree(source, folder)
    at = folder / "transformer" / "config.json"
    once = {"_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero", "num_vector_embeds": None}
    at.write_text(json.dumps({**json.loads(at.read_text()), **once, "only_cross_attention": False}))
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "Transformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def original_transformer(source: Path, folder: Path, **config: Any) -> Path:
    """The authors' file; its autoencoder is in a folder beside it."""
    stated(folder, {"num_attention_heads": 2, **config}, None)
    shutil.copytree(source / "vae", folder / "vae")
    content = tensors(source, "transformer", "", dit(DiTConfig.from_config(settings(source, "transformer"))))
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


def authors_network(path: Path) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The original DiT from its formulas."""
    weights = Weights(torch.load(path, weights_only=True))
    return lambda x, t, label: diffusion_transformer(weights, x, t, label, heads=2)


def learned_run(network: Any, folder: Path, label: int, scale: float, steps: int) -> Tensor:
    """DDPM under the variance that the network gives, as its authors draw; inside `one_noise`.

    The reference's pipeline throws that variance away and takes the posterior's.
    """
    from diffusers import DDPMScheduler

    said = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    walk = DDPMScheduler.from_config(said, variance_type="learned_range")

    def guided(x: Tensor, t: Tensor) -> Tensor:
        row, nothing = (network(x, timestep=t, class_labels=torch.full((len(x),), i)).sample for i in (label, 1000))
        return torch.cat((nothing[:, :4] + scale * (row - nothing)[:, :4], row[:, 4:]), dim=1)

    return walked(guided, walk, next_noise(4, SIDE), steps)


# The comparison


def latent_noise(channels: int) -> Tensor:
    return torch.randn(BATCH, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def network_error(
    model: Model, theirs: Callable[[Tensor, Tensor], Tensor], conditioning: Conditioning | None = None
) -> float:
    x, t = latent_noise(model.codec.channels), torch.tensor([17, 803])
    with torch.no_grad():
        return relative(model.backbone(x, t.float(), conditioning or Conditioning()), theirs(x, t))


def codec_error(model: Model, stage: Any) -> float:
    """Pixels to backbone units (the mean) and back."""
    z, side = latent_noise(model.codec.channels), SIDE * model.codec.factor
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        encoded = stage.encode(pixels)
        mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mean
        scale = stage.config.scaling_factor
        there = relative(model.codec.encode(pixels), mean * scale)
        return max(there, relative(model.codec.decode(z), stage.decode(z / scale).sample))


def runs(
    folder: Path, kind: str, model: Model, cases: list[tuple[str, int, dict[str, Any], dict[str, Any]]]
) -> dict[str, float]:
    """(sampler, steps, what the pipeline is told, what the request says) -> error of the latents."""
    pipeline, found = opened(kind, folder), dict[str, float]()
    for sampler, steps, told, said in cases:
        pipeline.scheduler = scheduler(sampler, folder)
        with one_noise() as anew:
            if sampler.startswith(("euler", "heun")):  # the pipelines ask for the first scale before they set the steps
                network, noise = pipeline.unet, next_noise(model.codec.channels, SIDE)
                theirs = walked(lambda x, t, n=network: n(x, t).sample, pipeline.scheduler, noise, steps)
            else:
                theirs = run(pipeline, num_inference_steps=steps, **told).latents
            anew()
            ours = several(model, sampler, steps, said).latents
        words = [f"{sampler} {steps}", *(f"{key} {value}" for key, value in said.items() if key in ("eta", "guidance"))]
        found[", ".join(words)] = distance(ours, theirs)
    return found


def several(model: Model, sampler: str, steps: int, said: dict[str, Any]) -> Drawn:
    """One request, or one for each prompt or label."""
    for name in ("prompt", "label"):
        if isinstance(said.get(name), list):
            requests = [mz.Request(**{**said, name: value, "sampler": sampler, "steps": steps}) for value in said[name]]
            results = mz.generate_batch(model, requests)
            return Drawn(torch.cat([r.latents for r in results]), [image for r in results for image in r.images])
    return draw(model, sampler, steps, **said)


def apart(first: Model, second: Model, sampler: str, steps: int, said: dict[str, Any]) -> float:
    """Two models' latents from one noise."""
    with one_noise() as anew:
        one = several(first, sampler, steps, said).latents
        anew()
        return distance(several(second, sampler, steps, said).latents, one)


def parity(root: Path) -> list[Row]:
    """How far ours is from the reference, on tiny random models."""
    return [
        unconditional_row(root, "vq"),
        unconditional_row(root, "kl"),
        text_row(root),
        class_row(root),
        dit_row(root),
    ]


def unconditional_row(root: Path, kind: str) -> Row:
    folder = unconditional(root / f"ldm-{kind}", kind)
    model, alone = mz.load(folder), mz.load(original_unconditional(folder, root / f"ldm-{kind}-file"))
    pipeline = opened("LDMPipeline", folder)
    told = {"batch_size": BATCH}
    cases: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
        ("ddim", 10, told, {}), ("ddim", 7, {**told, "eta": 0.6}, {"eta": 0.6}), ("dpmpp_2m", 8, told, {}),
    ]  # fmt: skip
    if kind == "vq":  # every sampler once
        cases += [
            (name, 5, told, {})
            for name in ("ddpm", "euler", "euler_ancestral", "heun", "dpmpp_2m_karras", "dpmpp_2m_sde", "unipc",
                         "unipc_karras")
        ]  # fmt: skip
    return Row(
        f"latent diffusion ({kind.upper()})", BOTH,
        network_error(model, lambda x, t: pipeline.unet(x, t).sample),
        codec=codec_error(model, pipeline.vqvae),
        runs=runs(folder, "LDMPipeline", model, cases),
        original=apart(model, alone, "ddim", 5, {}),
    )  # fmt: skip


def text_row(root: Path) -> Row:
    folder = by_text(root / "ldm-text")
    model, alone = mz.load(folder), mz.load(original_by_text(folder, root / "ldm-text-file"))
    pipeline = opened("LDMTextToImagePipeline", folder)
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert model.text
    with torch.no_grad():
        tokens = pipeline.bert(ids.input_ids)[0]
    ours = model.text.encode(PROMPTS)
    assert ours.tokens is not None
    cases: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
        (sampler, steps, {"prompt": PROMPTS, "guidance_scale": scale}, {"prompt": PROMPTS, "guidance": scale})
        for sampler, steps, scale in (
            ("ddim", 8, 5.0), ("ddim", 6, 1.0), ("ddpm", 6, 5.0), ("dpmpp_2m", 8, 5.0), ("dpmpp_2m_karras", 6, 2.0),
            ("unipc", 6, 5.0),
        )
    ]  # fmt: skip
    return Row(
        "latent diffusion by text", BOTH,
        network_error(model, lambda x, t: pipeline.unet(x, t, tokens).sample, Conditioning(tokens=tokens)),
        text=relative(ours.tokens, tokens),
        codec=codec_error(model, pipeline.vqvae),
        runs=runs(folder, "LDMTextToImagePipeline", model, cases),
        original=apart(model, alone, "ddim", 5, {"prompt": PROMPTS, "guidance": 5.0, "negative": "a dark cell"}),
    )  # fmt: skip


def class_row(root: Path) -> Row:
    source = root / "ldm-vq"
    path, network, table = by_class(root / "ldm-class", source)
    model, found = mz.load(path), dict[str, float]()
    for sampler, steps, scale in (("ddim", 8, 3.0), ("dpmpp_2m", 6, 3.0), ("ddpm", 6, 1.0), ("unipc", 6, 1.5)):
        with one_noise() as anew:
            theirs = classes_run(network, table, 2, scale, scheduler(sampler, source), steps)
            anew()
            ours = draw(model, sampler, steps, label=2, guidance=scale).latents
        found[f"{sampler} {steps}, guidance {scale}"] = distance(ours, theirs)
    label = torch.tensor([2, CLASSES])
    error = network_error(model, lambda x, t: network(x, t, table[label][:, None]).sample, Conditioning(label=label))
    return Row("latent diffusion by class", BOTH[1:], error, runs=found)


def dit_row(root: Path) -> Row:
    folder = transformer(root / "dit")
    model, alone = mz.load(folder), mz.load(original_transformer(folder, root / "dit-file"))
    pipeline, labels = opened("DiTPipeline", folder), [281, 3]
    theirs, label = pipeline.transformer, torch.tensor(labels)
    cases: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
        (sampler, steps, {"class_labels": labels, "guidance_scale": scale}, {"label": labels, "guidance": scale})
        for sampler, steps, scale in (
            ("ddim", 10, 4.0), ("ddim", 6, 1.0), ("dpmpp_2m", 8, 4.0), ("dpmpp_2m_karras", 8, 4.0), ("unipc", 8, 4.0),
            ("dpmpp_2m_sde", 6, 1.5),
        )
    ]  # fmt: skip
    found = runs(folder, "DiTPipeline", model, cases)
    with one_noise() as anew:
        expected = learned_run(theirs, folder, 3, 4.0, 6)
        anew()
        found["ddpm 6, guidance 4.0, learned variance"] = distance(
            draw(model, "ddpm", 6, label=3, guidance=4.0).latents, expected
        )
    return Row(
        "DiT", BOTH,
        network_error(model, lambda x, t: theirs(x, timestep=t, class_labels=label).sample, Conditioning(label=label)),
        codec=codec_error(model, pipeline.vae),
        runs=found,
        original=apart(model, alone, "ddim", 5, {"label": labels, "guidance": 4.0}),
    )  # fmt: skip

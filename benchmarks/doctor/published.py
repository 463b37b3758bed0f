"""Tiny checkpoints with random weights as diffusers and transformers publish them: what the nursery trains.

Everything that a model's contract holds stands in their own files, in config.json and scheduler_config.json.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from data import CAPTIONS, SIDE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mezzotint import files

FACTOR, LATENTS, WIDTH = 4, 4, 64  # of the autoencoder, of its latents, of CLIP
START, END = "<|startoftext|>", "<|endoftext|>"
WEIGHTS = "diffusion_pytorch_model.safetensors"
OFFSET = 0.6  # deviations by which SD 3.5's latents lie off zero
VAE: dict[str, Any] = {
    "block_out_channels": [16, 32, 64], "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3, "layers_per_block": 1, "latent_channels": LATENTS,
    "norm_num_groups": 16,
}  # fmt: skip
PNDM = {  # as Stable Diffusion 1.5 was published
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
DDIM = {**PNDM, "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "prediction_type": "v_prediction"}
FLOW = {  # of Stable Diffusion 3.5
    "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.29.0.dev0", "num_train_timesteps": 1000,
    "shift": 3.0,
}  # fmt: skip
HO = {  # of google/ddpm-cifar10-32
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
    "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
    "variance_type": "fixed_large",
}  # fmt: skip


# Text.


def byte_letters() -> list[str]:
    """Bytes as printable characters, in the order of CLIP's vocabulary."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [*map(chr, keep), *(chr(256 + i) for i in range(256 - len(keep)))]


def words() -> list[str]:
    return sorted({word for caption in CAPTIONS for word in caption.split()})


def merges() -> list[tuple[str, str]]:
    """Byte pairs learned until every word of the captions is one token."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words()]
    found: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in spelled):
        pair = Counter(pair for word in spelled for pair in pairwise(word)).most_common(1)[0][0]
        found.append(pair)
        for word in spelled:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == pair:
                    word[at : at + 2] = ["".join(pair)]
                at += 1
    return found


def clip_tokens() -> list[str]:
    letters = byte_letters()
    return [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges()), START, END]


def clip_tokenizer(folder: Path, pad: str = END) -> None:
    """A CLIP tokenizer of the real kind (bytes, then merges, then the two ends) that knows the captions' words."""
    from transformers import CLIPTokenizer

    files.write_json(folder / "vocab.json", {token: i for i, token in enumerate(clip_tokens())})
    files.write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges())]) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad}
    files.write_json(folder / "tokenizer_config.json", settings)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
    files.write_json(folder / "special_tokens_map.json", {"bos_token": START, "eos_token": END, "pad_token": pad})


def varied(network: nn.Module) -> nn.Module:
    """Random weights under which words and places lead to clearly different states, drawn from the global seed."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                table = "embed" in name or name.startswith("shared")  # one row is one token
                parameter.normal_(0, 1 if table else parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(1 if "norm" in name and name.endswith("weight") else 0, 0.2)
    return network.eval()


def clip(folder: Path, width: int = WIDTH, act: str = "quick_gelu", projection: str | None = None) -> None:
    """A CLIP text encoder of three layers; `projection` is random, or identity as SD 3 stores it."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    count = len(clip_tokens())
    config = CLIPTextConfig(
        vocab_size=count, hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=77, hidden_act=act, bos_token_id=count - 2,
        eos_token_id=count - 1, pad_token_id=1,
    )  # fmt: skip
    varied((CLIPTextModelWithProjection if projection else CLIPTextModel)(config)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    named = {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in tensors.items()}
    if projection == "identity":
        named["text_projection.weight"] = torch.eye(width)
    save_file(named, folder / "model.safetensors", {"format": "pt"})  # as every published file names them


def t5(folder: Path, width: int) -> None:
    """A T5 v1.1 encoder of two layers, and beside it a tokenizer of words and letters."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [(letter, -6.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,0123456789"]
    whole = [(f"▁{word}", -2.0) for word in words()]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters, *whole]
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=32, d_ff=2 * width, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    varied(T5EncoderModel(config)).save_pretrained(folder)
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=256).save_pretrained(beside)


# Autoencoders.


def vae(trained: Path, folder: Path, pixels: Tensor) -> None:
    """An autoencoder from its run, in diffusers' files; its latents are evened out as `pixels` (N, 3, H, W) show."""
    from diffusers import AutoencoderKL

    network = AutoencoderKL(**VAE, sample_size=SIDE)
    network.load_state_dict(load_file(next(trained.glob("*.safetensors"))))
    mean, deviation = latents(network, pixels)
    size = float(deviation.square().mean().sqrt())
    moved(network, size / deviation, -mean * size / deviation)
    network.register_to_config(scaling_factor=round(1 / size, 5))
    network.save_pretrained(folder)


def shifted(folder: Path, out: Path) -> None:
    """The same autoencoder with latents that lie off zero, and a shift_factor that says so."""
    from diffusers import AutoencoderKL

    network = AutoencoderKL.from_pretrained(folder)
    shift = round(OFFSET / network.config.scaling_factor, 5)
    moved(network, torch.ones(LATENTS), torch.full((LATENTS,), shift))
    network.register_to_config(shift_factor=shift)
    network.save_pretrained(out)


@torch.no_grad()
def latents(network: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) of every latent channel."""
    z = torch.cat([network.encode(piece).latent_dist.mean for piece in pixels.split(32)]).transpose(0, 1).flatten(1)
    return z.mean(1), z.std(1)


@torch.no_grad()
def moved(network: Any, scale: Tensor, shift: Tensor) -> None:
    """Make latents z to scale z + shift (C,) in encoder and decoder: every picture is decoded as before."""
    first, last = network.quant_conv, network.post_quant_conv
    first.weight[:LATENTS] *= scale.view(-1, 1, 1, 1)
    first.bias[:LATENTS] = scale * first.bias[:LATENTS] + shift
    first.bias[LATENTS:] += 2 * scale.log()  # the posterior's log variance
    last.weight /= scale.view(1, -1, 1, 1)
    last.bias -= last.weight[:, :, 0, 0] @ shift


# Whole folders.


def index(folder: Path, pipeline: str, scheduler: dict[str, Any], **parts: list[str | None]) -> None:
    files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    of_all = {"scheduler": ["diffusers", scheduler["_class_name"]], **parts}
    files.write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.42.1", **of_all})


def ddpm(folder: Path) -> None:
    from diffusers import UNet2DModel

    UNet2DModel(
        sample_size=SIDE // 2, in_channels=1, out_channels=1, block_out_channels=(32, 64, 96, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=32,
        norm_num_groups=16,
    ).save_pretrained(folder / "unet")  # fmt: skip
    index(folder, "DDPMPipeline", HO, unet=["diffusers", "UNet2DModel"])


def unet(folder: Path, version: int) -> None:
    """Of Stable Diffusion 1 or 2; as published, projections are convolutions in the first and linear in the second."""
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel(
        sample_size=SIDE // FACTOR, in_channels=LATENTS, out_channels=LATENTS, layers_per_block=1,
        block_out_channels=(48, 96), attention_head_dim=(1, 2), cross_attention_dim=WIDTH, norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=version == 2,
    ).save_pretrained(folder)  # fmt: skip


def stable_diffusion(folder: Path, version: int, autoencoder: Path) -> None:
    """Stable Diffusion 1 or 2."""
    shutil.copytree(autoencoder, folder / "vae")
    unet(folder / "unet", version)
    clip(folder / "text_encoder", act="gelu" if version == 2 else "quick_gelu")
    clip_tokenizer(folder / "tokenizer")
    if version == 2:  # as published: two files that disagree, of which the one that says "!" is right
        (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    index(
        folder, "StableDiffusionPipeline", PNDM if version == 1 else DDIM, unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"], text_encoder=["transformers", "CLIPTextModel"],
        tokenizer=["transformers", "CLIPTokenizer"], safety_checker=[None, None], feature_extractor=[None, None],
    )  # fmt: skip


def stable_diffusion_3(folder: Path, autoencoder: Path) -> None:
    """Stable Diffusion 3.5 Large's kind: two CLIPs, T5, and norms on queries and keys."""
    from diffusers import SD3Transformer2DModel

    second, joint = 96, WIDTH + 96
    shifted(autoencoder, folder / "vae")
    SD3Transformer2DModel(
        sample_size=SIDE // FACTOR, patch_size=2, in_channels=LATENTS, out_channels=LATENTS, num_layers=4,
        attention_head_dim=32, num_attention_heads=3, joint_attention_dim=joint, caption_projection_dim=96,
        pooled_projection_dim=joint, pos_embed_max_size=16, qk_norm="rms_norm",
    ).save_pretrained(folder / "transformer")  # fmt: skip
    clip(folder / "text_encoder", projection="identity")
    clip(folder / "text_encoder_2", width=second, act="gelu", projection="random")
    t5(folder / "text_encoder_3", joint)
    clip_tokenizer(folder / "tokenizer")
    clip_tokenizer(folder / "tokenizer_2", pad="!")
    index(
        folder, "StableDiffusion3Pipeline", FLOW, transformer=["diffusers", "SD3Transformer2DModel"],
        vae=["diffusers", "AutoencoderKL"], text_encoder=["transformers", "CLIPTextModelWithProjection"],
        tokenizer=["transformers", "CLIPTokenizer"], text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
        tokenizer_2=["transformers", "CLIPTokenizer"], text_encoder_3=["transformers", "T5EncoderModel"],
        tokenizer_3=["transformers", "T5TokenizerFast"],
    )  # fmt: skip


def finished(base: Path, trained: Path, out: Path) -> None:
    """A copy of the published folder `base` with the weights of the backbone that a run left in `trained`."""
    part = "transformer" if (base / "transformer").is_dir() else "unet"
    before, after = (load_file(folder / part / WEIGHTS) for folder in (base, trained))
    if {name: t.shape for name, t in before.items()} != {name: t.shape for name, t in after.items()}:
        raise ValueError(f"the weights in {trained} do not fit {base}")
    shutil.copytree(base, out, dirs_exist_ok=True)
    save_file(after, out / part / WEIGHTS, {"format": "pt"})

"""What the model tests share: small parts of every kind with weights that hide nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from networks import randomise
from torch import nn

from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.codec import Codec, LatentSpace
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.codec.pixels import Pixels, PixelsConfig
from mezzotint.contract import (
    ClassFacts,
    Contract,
    GuidanceFacts,
    LatentFacts,
    Licence,
    SamplingFacts,
    TextFacts,
)  # fmt: skip
from mezzotint.families import Model
from mezzotint.process import Prediction, Process, schedules
from mezzotint.text import TextEncoder

EPSILON = Process(schedules.scaled_linear(), Prediction.EPSILON)
FLOW = Process(schedules.rectified_flow(), Prediction.FLOW)
CLASSES = ("healthy", "crack", "inactive")
WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "crack", "on", "the", "cell", "dark", "area", "scratch", "steel", "of",
]  # fmt: skip


def plain_unet(in_channels: int, out_channels: int, classes: int | None = None) -> UNet:
    """A three-level U-Net with attention, of the class that UNet2DModel files hold."""
    config = UNetConfig(
        sample_size=16,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=classes,
    )
    network = fixed(UNet(config))
    if classes:
        network.class_embedding.weight.mul_(16)  # a class must make a difference that no tolerance swallows
    return network


def text_unet(in_channels: int, out_channels: int, width: int) -> UNet:
    """A two-level U-Net with cross-attention, of the class that UNet2DConditionModel files hold."""
    config = ConditionalUNetConfig(
        sample_size=16,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=width,
    )
    return fixed(UNet(config))


def fixed(network: Any, seed: int = 0, scale: float = 0.5) -> Any:
    """Weights of its own for every parameter, calm enough that 20 steps of it stay in range; ready to evaluate."""
    randomise(network, seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(scale if parameter.ndim > 1 else 1.0)
    return network.eval().requires_grad_(False)


def kl_codec(pixel_channels: int = 3) -> Codec:
    """An f4 variational autoencoder with 4 channels and Stable Diffusion 3's kind of scale and shift."""
    config = KLVAEConfig(
        in_channels=pixel_channels,
        out_channels=pixel_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        scaling_factor=0.7,
        shift_factor=0.05,
    )
    return Codec(fixed(KLVAE(config), seed=1), LatentSpace(scale=0.7, shift=0.05))


def pixel_codec(channels: int = 3) -> Codec:
    return Codec(Pixels(PixelsConfig(channels)))


def model(backbone: nn.Module, codec: Codec, text: TextEncoder | None = None, **facts: Any) -> Model:
    """A model with a contract that fits its parts; `facts` replace what the contract says."""
    contract = Contract(
        process=facts.pop("process", EPSILON),
        latent=LatentFacts.of(codec),
        size=facts.pop("size", (16 * codec.factor, 16 * codec.factor)),
        text=TextFacts.of(text) if text else None,
        guidance=facts.pop("guidance", GuidanceFacts(dropout=0.1, scale=1.0)),
        sampling=facts.pop("sampling", SamplingFacts(sampler="ddim", steps=5)),
        licence=Licence(weights="Apache-2.0", data="CC0-1.0"),
        **facts,
    )
    return Model(contract, backbone, codec, text)


def class_model(**facts: Any) -> Model:
    """Three classes and "no class" on pixels."""
    classes = ClassFacts(names=CLASSES, null=len(CLASSES))
    return model(plain_unet(3, 3, len(CLASSES) + 1), pixel_codec(), classes=classes, **facts)


def changed(contract: Contract, **facts: Any) -> Contract:
    return contract.model_copy(update=facts)


def with_contract(subject: Model, **facts: Any) -> Model:
    return replace(subject, contract=changed(subject.contract, **facts))


def bert_folder(path: Path, seed: int = 0) -> Path:
    """A tiny BERT written by transformers, with a tokenizer that knows a dozen words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    bert = BertModel(config)
    randomise(bert, seed)
    bert.save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path

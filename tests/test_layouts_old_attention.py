"""Files with the first names of pixel attention, which the reference still reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise, relative
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.checkpoints import fill
from mezzotint.checkpoints.layouts.old_attention import modernised
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.codec.vq import VQ, VQConfig
from mezzotint.conditioning import Conditioning

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "attention_head_dim": None,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "norm_num_groups": 4,
}
NETWORKS: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
    "ddpm": ("UNet2DModel", UNetConfig, UNet, UNET),
    "kl": ("AutoencoderKL", KLVAEConfig, KLVAE, AUTOENCODER),
    "vq": ("VQModel", VQConfig, VQ, AUTOENCODER),
}


def aged(name: str) -> str:
    for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
        name = name.replace(f".{new}.", f".{old}.")
    return name


def answer(network: Any, reference: bool) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=draw)
    with torch.no_grad():
        if isinstance(network, UNet):
            return network(x, torch.tensor([3.0, 900.0]), Conditioning())
        if isinstance(network, diffusers.UNet2DModel):
            return network(x, torch.tensor([3.0, 900.0])).sample
        z = torch.randn(2, network.config.latent_channels, 8, 8, generator=draw)
        return network.decode(z).sample if reference else network.decode(z)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("convolutions", [False, True], ids=["matrices", "convolutions"])
def test_reads_what_the_reference_reads(name: str, convolutions: bool, tmp_path: Path) -> None:
    """The reference renames on loading; projections stored as convolutions it can only read as matrices."""
    kind, config, network, options = NETWORKS[name]
    theirs = getattr(diffusers, kind)(**options)
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    old = {aged(key): value for key, value in load_file(tmp_path / WEIGHTS).items()}
    assert any("proj_attn" in key for key in old) and not any("to_q" in key for key in old)
    save_file(old, tmp_path / WEIGHTS, {"format": "pt"})
    expected = answer(getattr(diffusers, kind).from_pretrained(tmp_path).eval(), True)
    if convolutions:
        marks = tuple(f".{mark}.weight" for mark in ("query", "key", "value", "proj_attn"))
        old = {key: value[..., None, None] if key.endswith(marks) else value for key, value in old.items()}
    settings = config.from_config(dict(theirs.config))
    ours = fill(lambda: network(settings), modernised(old), torch.float32, tmp_path)
    assert relative(answer(ours, False), expected) < 1e-5


def test_files_of_today_stay_as_they_are() -> None:
    network = UNet(
        ConditionalUNetConfig(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=8,
        )
    )
    tensors = network.state_dict()
    found = modernised(tensors)
    assert list(found) == list(tensors)
    assert all(found[key] is value for key, value in tensors.items())


def test_only_attention_is_renamed() -> None:
    """A layer called "key" that is no part of an attention of the old kind keeps its name."""
    tensors = {"bert.query.weight": torch.zeros(2, 2), "mid.key.weight": torch.ones(2, 2, 1, 1)}
    found = modernised(tensors)
    assert found.keys() == tensors.keys() and found["mid.key.weight"].shape == (2, 2, 1, 1)

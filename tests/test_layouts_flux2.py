"""Black Forest Labs' names of FLUX.2 against the reference library's conversion of them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from layouts import assert_same, count, on_meta, shapes_of, there_and_back
from networks import randomise
from torch import nn

from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import Flux2Config, flux2_dev, klein_4b, klein_9b
from mezzotint.checkpoints.layouts.flux2 import flux2, flux2_config, flux2_vae, flux2_vae_config
from mezzotint.codec.flux2_vae import Flux2VAE, Flux2VAEConfig
from mezzotint.errors import InputError

TINY = Flux2Config(
    in_channels=12,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=8,
    num_attention_heads=3,
    joint_attention_dim=20,
    timestep_guidance_channels=16,
    axes_dims_rope=(2, 2, 2, 2),
)
TINY_VAE = Flux2VAEConfig(block_out_channels=(32, 32, 64, 64), latent_channels=2, layers_per_block=1)


def random_state(network: nn.Module) -> dict[str, torch.Tensor]:
    randomise(network)
    return network.state_dict()


@pytest.mark.parametrize(
    "config",
    [TINY, replace(TINY, guidance_embeds=False, mlp_ratio=2.5), replace(TINY, num_layers=0, out_channels=8)],
    ids=["dev", "klein", "single blocks alone"],
)
def test_transformer_converts_as_the_reference_does(config: Flux2Config) -> None:
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    ours = random_state(Flux2(config))
    original = there_and_back(ours, flux2(config))
    assert_same(convert.convert_flux2_transformer_checkpoint_to_diffusers(dict(original)), ours)
    assert Flux2Config.from_config(flux2_config(shapes_of(original))) == config


@pytest.mark.parametrize(
    ("config", "count_of_tensors"),
    [(flux2_dev(), 331 - 4 * 8), (klein_4b(), 169 - 4 * 5), (klein_9b(), 233 - 4 * 8)],
    ids=["dev", "klein 4B", "klein 9B"],
)
def test_published_transformer_is_known_by_its_shapes(config: Flux2Config, count_of_tensors: int) -> None:
    """The folder's tensors less the four that each double block stores fused."""
    ours = on_meta(lambda: Flux2(config))
    original = there_and_back(ours, flux2(config))
    assert (len(original), count(original)) == (count_of_tensors, count(ours))
    assert Flux2Config.from_config(flux2_config(shapes_of(original))) == config


def folder_name(name: str, levels: int) -> str:
    """The folder's name of an original autoencoder's tensor, rule by rule as the reference's script has them."""
    name = re.sub(r"^(?:encoder|decoder)\.((?:post_)?quant_conv)", r"\1", name)
    name = re.sub(r"\.down\.(\d+)\.block\.(\d+)", r".down_blocks.\1.resnets.\2", name)
    name = re.sub(r"\.down\.(\d+)\.downsample", r".down_blocks.\1.downsamplers.0", name)
    name = re.sub(r"\.up\.(\d+)\.", lambda found: f".up_blocks.{levels - 1 - int(found[1])}.", name)
    name = re.sub(r"(\.up_blocks\.\d+)\.block\.", r"\1.resnets.", name).replace("upsample.", "upsamplers.0.")
    name = re.sub(r"\.mid\.block_(\d)", lambda found: f".mid_block.resnets.{int(found[1]) - 1}", name)
    if ".mid.attn_1." in name:
        name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.").replace("proj_out", "to_out.0")
        return re.sub(r"\.(q|k|v)\.", r".to_\1.", name).replace(".norm.", ".group_norm.")
    return name.replace("nin_shortcut", "conv_shortcut").replace(".norm_out", ".conv_norm_out")


@pytest.mark.parametrize(
    "config",
    [
        TINY_VAE,
        replace(TINY_VAE, decoder_block_out_channels=(32, 32, 32, 64)),
        replace(
            TINY_VAE,
            use_quant_conv=False,
            use_post_quant_conv=False,
            mid_block_add_attention=False,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
    ],
    ids=["published shape", "small decoder", "two levels, no 1x1 convolutions, no attention"],
)
def test_autoencoder_converts_as_the_reference_does(config: Flux2VAEConfig) -> None:
    ours = random_state(Flux2VAE(config))
    original = there_and_back(ours, flux2_vae(config))
    levels = len(config.block_out_channels)
    expected = {
        folder_name(name, levels): t.flatten(1) if ".attn_1." in name and t.ndim == 4 else t
        for name, t in original.items()
    }
    assert_same(ours, expected)
    assert Flux2VAEConfig.from_config(flux2_vae_config(shapes_of(original))) == config


def test_published_autoencoder_is_known_by_its_names() -> None:
    config = Flux2VAEConfig()
    original = there_and_back(on_meta(lambda: Flux2VAE(config)), flux2_vae(config))
    assert (len(original), count(original)) == (251, 84_046_115 + 257)
    assert Flux2VAEConfig.from_config(flux2_vae_config(shapes_of(original))) == config
    # a sample of what the original file holds
    shapes = shapes_of(original)
    assert shapes["encoder.quant_conv.weight"] == (64, 64, 1, 1)
    assert shapes["decoder.post_quant_conv.bias"] == (32,)
    assert shapes["decoder.mid.attn_1.proj_out.weight"] == (512, 512, 1, 1)
    assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (128, 256, 1, 1)
    assert shapes["bn.running_var"] == (128,)


def test_what_is_no_flux2_is_refused() -> None:
    original = there_and_back(on_meta(lambda: Flux2(TINY)), flux2(TINY))
    shapes = shapes_of(original)
    with pytest.raises(InputError, match=r"txt_in\.weight"):
        flux2_config({name: shape for name, shape in shapes.items() if name != "txt_in.weight"})
    with pytest.raises(InputError, match="heads of 12"):
        flux2_config({**shapes, "single_blocks.0.norm.query_norm.scale": (12,)})
    with pytest.raises(InputError, match=r"bn\.running_mean"):
        flux2_vae_config(shapes)
    with pytest.raises(InputError, match="weight_scale"):
        flux2_config({**shapes, "double_blocks.0.img_attn.qkv.weight_scale": ()})

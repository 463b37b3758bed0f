"""ControlNets against the reference: the maps, what the U-Net does with them, several networks at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import randomise, relative
from torch import Tensor

from mezzotint.backbones import published_unets as published
from mezzotint.backbones.controlnet import Controlled, ControlNet, ControlNetConfig
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "conditioning_embedding_out_channels": (8, 16),  # two widths: a hint of twice the latents' size
}
XL: dict[str, Any] = {
    **SMALL,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "stable diffusion 1": SMALL,
    "stable diffusion 2, blue first": {
        **SMALL,
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "controlnet_conditioning_channel_order": "bgr",
    },
    "xl": XL,
    "published stem, plain middle": {
        **SMALL,
        "conditioning_embedding_out_channels": (4, 6, 8, 10),
        "mid_block_type": "UNetMidBlock2D",
    },
}


def unet_options(options: dict[str, Any]) -> dict[str, Any]:
    own = ("conditioning_embedding_out_channels", "controlnet_conditioning_channel_order")
    up = tuple(name.replace("Down", "Up") for name in reversed(options["down_block_types"]))
    return {**{key: value for key, value in options.items() if key not in own}, "up_block_types": up}


def network(options: dict[str, Any], seed: int = 0) -> tuple[Any, ControlNet]:
    theirs = diffusers.ControlNetModel(**options).eval()
    randomise(theirs, seed)
    ours = ControlNet(ControlNetConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def backbone(options: dict[str, Any]) -> tuple[Any, UNet]:
    theirs = diffusers.UNet2DConditionModel(**unet_options(options)).eval()
    randomise(theirs, 7)
    ours = UNet(ConditionalUNetConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def case(options: dict[str, Any]) -> tuple[Tensor, Tensor, Conditioning, dict[str, Any]]:
    """Noisy latents, clock, what ours is told and what the reference is told."""
    draw = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 4, 16, 24, generator=draw), torch.tensor([3.0, 917.25])
    told = Conditioning(tokens=torch.randn(2, 5, 24, generator=draw))
    theirs: dict[str, Any] = {"encoder_hidden_states": told.tokens}
    if "addition_embed_type" in options:
        told = replace(
            told,
            pooled=torch.randn(2, 20, generator=draw),
            time_ids=torch.tensor([[64.0, 96, 0, 8, 64, 96], [32.0, 48, 4, 0, 64, 96]]),
        )
        theirs["added_cond_kwargs"] = {"text_embeds": told.pooled, "time_ids": told.time_ids}
    return x, t, told, theirs


def picture(options: dict[str, Any], seed: int) -> Tensor:
    factor = 2 ** (len(options["conditioning_embedding_out_channels"]) - 1)
    return torch.rand(2, 3, 16 * factor, 24 * factor, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_maps_equal_reference(name: str) -> None:
    """The maps that the reference returns, whatever else the U-Net is joined with."""
    options = VARIANTS[name]
    theirs, ours = network(options)
    x, t, told, arguments = case(options)
    hint = picture(options, 2)
    joined = replace(told, concat=torch.ones(2, 5, 16, 24))
    with torch.no_grad():
        down, middle = theirs(x, t, controlnet_cond=hint, return_dict=False, **arguments)
        found = ours(x, t, joined, hint)
    assert len(found) == len(down) + 1
    for expected, map_ in zip((*down, middle), found, strict=True):
        assert relative(map_, expected) < 1e-5


@pytest.mark.parametrize("name", ["stable diffusion 1", "xl"])
@pytest.mark.parametrize("scales", [(1.0,), (0.7, -1.3)])
def test_controlled_equals_reference(name: str, scales: tuple[float, ...]) -> None:
    """One network or two at once, each with its own picture and scale."""
    options = VARIANTS[name]
    theirs, ours = backbone(options)
    networks = [network(options, seed) for seed in range(len(scales))]
    x, t, told, arguments = case(options)
    hints = tuple(picture(options, seed) for seed in range(2, 2 + len(scales)))
    controlled = Controlled(ours, [mine for _, mine in networks], scales)
    several = diffusers.models.MultiControlNetModel([other for other, _ in networks])
    with torch.no_grad():
        down, middle = several(
            x, t, controlnet_cond=list(hints), conditioning_scale=list(scales), return_dict=False, **arguments
        )
        expected = theirs(
            x, t, down_block_additional_residuals=down, mid_block_additional_residual=middle, **arguments
        ).sample
        assert relative(controlled(x, t, replace(told, hints=hints)), expected) < 1e-5
    assert controlled.config is ours.config


def test_gradients_reach_the_control_network() -> None:
    """Through a frozen backbone, as it is trained."""
    options = VARIANTS["stable diffusion 1"]
    (theirs, ours), (their_net, our_net) = backbone(options), network(options)
    x, t, told, arguments = case(options)
    hint = picture(options, 2)
    Controlled(ours.requires_grad_(False), [our_net], [1.0])(
        x, t, replace(told, hints=(hint,))
    ).square().mean().backward()
    down, middle = their_net(x, t, controlnet_cond=hint, return_dict=False, **arguments)
    theirs(
        x, t, down_block_additional_residuals=down, mid_block_additional_residual=middle, **arguments
    ).sample.square().mean().backward()
    expected = {key: value.grad for key, value in their_net.named_parameters()}
    for key, value in our_net.named_parameters():
        assert value.grad is not None and expected[key] is not None, key
        floor = 1e-3 * expected["controlnet_mid_block.weight"].abs().max()
        assert (value.grad - expected[key]).abs().max() < 1e-4 * max(expected[key].abs().max(), floor), key


def test_control_of_a_network_without_text_equals_reference() -> None:
    """Each skip connection takes its own map: an unconditional U-Net's, against sums written out."""
    config = UNetConfig(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    plain = UNet(config)
    randomise(plain)
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 917.0])
    with torch.no_grad():
        encoded = plain.encode(x, t, Conditioning())
        control = tuple(torch.full_like(part, 0.5) for part in (*encoded.skips, encoded.middle))
        nothing = tuple(torch.zeros_like(part) for part in control)
        assert torch.equal(plain(x, t, Conditioning(control=nothing)), plain(x, t, Conditioning()))
        skips, h = [skip + 0.5 for skip in encoded.skips], encoded.middle + 0.5
        for block in plain.up_blocks:
            h = block(h, skips, *encoded.told)
        expected = plain.conv_out(torch.nn.functional.silu(plain.conv_norm_out(h)))
        assert relative(plain(x, t, Conditioning(control=control)), expected) < 1e-6


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [(published.controlnet_sd1(), 361_279_120, 340), (published.controlnet_sdxl(), 1_251_014_160, 844)],
    ids=["stable diffusion 1", "xl"],
)
def test_published_sizes(config: ControlNetConfig, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        found = list(ControlNet(config).parameters())
    assert (sum(p.numel() for p in found), len(found)) == (parameters, tensors)


def test_inpainting_unet_gets_a_network_that_sees_latents_alone() -> None:
    assert ControlNetConfig.of(published.sd1(9)) == published.controlnet_sd1()


def test_what_does_not_fit_is_named() -> None:
    options = VARIANTS["stable diffusion 1"]
    (_, unet), (_, first), (_, deeper) = backbone(options), network(options), network(XL)
    x, t, told, _ = case(XL)
    hint = picture(options, 2)
    with pytest.raises(InputError, match="20x16 where the latents are 24x16"):
        first(x, t, told, hint[..., :40])
    with pytest.raises(InputError, match=r"block_out_channels is .* the model's"):
        Controlled(unet, [first, deeper], [1.0, 1.0])
    with pytest.raises(InputError, match="takes 7"):
        unet(x, t, replace(told, control=first(x, t, told, hint)[:-1]))
    with pytest.raises(ValueError, match="0 hints"):
        Controlled(unet, [first], [1.0])(x, t, told)
    for key, value in (("controlnet_conditioning_channel_order", "gbr"), ("global_pool_conditions", True)):
        with pytest.raises(InputError, match=key):
            ControlNet(ControlNetConfig.from_config({**options, key: value}))

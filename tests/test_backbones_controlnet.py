"""ControlNets against the reference: the maps, what the U-Net does with them, several at once, and how they start."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import randomise, relative
from torch import Tensor

from mezzotint.backbones import published_unets as published
from mezzotint.backbones.controlnet import Controlled, ControlNet, ControlNetConfig, UNetControlNetConfig
from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import Flux2Config
from mezzotint.backbones.initialise import from_base, initialise
from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

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


NATIVE: dict[str, Any] = {
    "in_channels": 13,  # latents, 5 mask maps, masked latents
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 3,
    "num_attention_heads": 2,  # a field of ours: the published class cannot say it
}


def bases() -> dict[str, UNet]:
    """Every kind of U-Net that can have a control network, with random weights."""
    configs: dict[str, UNetConfig | ConditionalUNetConfig] = {
        "ours": UNetConfig.from_config(NATIVE),
        "pixels, no attention in the middle": UNetConfig.from_config(
            {**NATIVE, "in_channels": 4, "add_attention": False}
        ),
        "stable diffusion 1": ConditionalUNetConfig.from_config(unet_options(SMALL)),
        "inpainting": ConditionalUNetConfig.from_config({**unet_options(SMALL), "in_channels": 9}),
        "xl": ConditionalUNetConfig.from_config(unet_options(XL)),
        "distilled": ConditionalUNetConfig.from_config(
            {**unet_options(SMALL), "time_cond_proj_dim": 12, "time_embedding_dim": 40}
        ),
    }
    found = {name: UNet(config).eval() for name, config in configs.items()}
    for network_ in found.values():
        randomise(network_, 7)
    return found


def told_all(base: UNet, x: Tensor) -> Conditioning:
    """All that any of the bases reads."""
    draw = torch.Generator().manual_seed(1)
    joined = base.config.in_channels - x.shape[1]
    return Conditioning(
        tokens=torch.randn(2, 5, 24, generator=draw),
        pooled=torch.randn(2, 20, generator=draw),
        time_ids=torch.tensor([[64.0, 96, 0, 8, 64, 96], [32.0, 48, 4, 0, 64, 96]]),
        label=torch.tensor([2, 0]),
        guidance=torch.tensor([3.0, 7.5]),
        concat=torch.randn(2, joined, *x.shape[2:], generator=draw) if joined else None,
    )


@pytest.mark.parametrize("name", list(bases()))
def test_pain_20_a_fresh_control_network_changes_nothing_and_then_every_weight_trains(name: str) -> None:
    """The base's output to the bit; zero convolutions learn from step 0, the encoder from step 1, the base never."""
    base = bases()[name]
    control = from_base(base, factor=2)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([3.0, 917.25])
    told = told_all(base, x)
    shown = replace(told, hints=(torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4)),))
    controlled = Controlled(base.requires_grad_(False), [control], [1.0])
    before = {key: value.clone() for key, value in control.state_dict().items()}
    frozen = {key: value.clone() for key, value in base.state_dict().items()}
    with torch.no_grad():
        plain = base(x, t, told)
        assert torch.equal(controlled(x, t, shown), plain)
        encoded = base.encode(x if told.concat is None else torch.cat((x, told.concat), 1), t, told)
        again = control.encode(x if told.concat is None else torch.cat((x, told.concat), 1), t, told)
        assert all(torch.equal(a, b) for a, b in zip(encoded.skips, again.skips, strict=True))
        assert torch.equal(encoded.middle, again.middle)
    optimiser = torch.optim.Adam(control.parameters(), 0.01)
    zero = ("controlnet_down_blocks.", "controlnet_mid_block.")
    for step in range(3):
        optimiser.zero_grad()
        controlled(x, t, shown).square().mean().backward()
        if step == 0:
            moving = {key for key, value in control.named_parameters() if value.grad is not None and value.grad.any()}
            assert moving == {key for key in before if key.startswith(zero)}
        if (
            step == 1
        ):  # behind zero convolutions that have moved, the copy learns; the stem but for its last layer waits
            waiting = {k for k, v in control.named_parameters() if v.grad is None or not v.grad.any()}
            assert waiting and all(key.startswith("controlnet_cond_embedding.") for key in waiting)
            assert not any(key.startswith("controlnet_cond_embedding.conv_out") for key in waiting)
        optimiser.step()
        if step == 0:
            with torch.no_grad():
                assert not torch.equal(controlled(x, t, shown), plain)
    assert not [key for key, value in control.state_dict().items() if torch.equal(value, before[key])]
    assert all(torch.equal(value, frozen[key]) for key, value in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_a_guidance_embedded_base_tells_its_control_network_the_scale() -> None:
    base = bases()["distilled"]
    control = from_base(base, factor=2)
    for layer in control.controlnet_down_blocks:
        torch.nn.init.ones_(layer.weight)
    x, t, hint = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 917.25]), torch.rand(2, 3, 16, 16)
    told = told_all(base, x)
    with torch.no_grad():
        low, high = (control(x, t, replace(told, guidance=torch.full((2,), g)), hint)[1] for g in (1.0, 7.5))
    assert relative(low, high) > 1e-4
    with pytest.raises(ValueError, match="guidance"):
        control(x, t, replace(told, guidance=None), hint)


@pytest.mark.parametrize("options", [SMALL, XL], ids=["stable diffusion 1", "xl"])
def test_start_equals_reference(options: dict[str, Any]) -> None:
    """The reference library's own copy of a U-Net: the same names and values, the same output with the same stem."""
    their_base, our_base = backbone(options)
    theirs = diffusers.ControlNetModel.from_unet(their_base, conditioning_embedding_out_channels=(8, 16)).eval()
    ours = from_base(our_base, options={"conditioning_embedding_out_channels": [8, 16]}).eval()
    expected, found = theirs.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert ControlNetConfig.from_config(dict(theirs.config)) == ours.config
    fresh = "controlnet_cond_embedding"
    differing = {key for key in found if not torch.equal(found[key], expected[key])}
    assert all(key.startswith(fresh) and not key.startswith(f"{fresh}.conv_out") for key in differing)
    ours.load_state_dict({**found, **{key: expected[key] for key in differing}})
    for pair in zip(theirs.controlnet_down_blocks, ours.controlnet_down_blocks, strict=True):
        for layer in pair:
            torch.nn.init.constant_(layer.weight, 0.1)
    x, t, told, arguments = case(options)
    hint = picture(options, 2)
    with torch.no_grad():
        down, _ = theirs(x, t, controlnet_cond=hint, return_dict=False, **arguments)
        for map_, other in zip(ours(x, t, told, hint), down, strict=False):
            assert relative(map_, other) < 1e-5


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(published.sd1(), 361_279_120), (published.sdxl(), 1_251_014_160)],
    ids=["stable diffusion 1", "xl"],
)
def test_copies_of_published_bases_have_the_published_size(config: ConditionalUNetConfig, parameters: int) -> None:
    with torch.device("meta"):
        found = list(from_base(UNet(config)).parameters())
    assert sum(p.numel() for p in found) == parameters


def test_a_network_of_ours_is_described_whole() -> None:
    """config.json of a control network without text: read back equal, wrong options named."""
    config = UNetControlNetConfig(UNetConfig.from_config(NATIVE), conditioning_embedding_out_channels=(8, 16))
    written = json.loads(json.dumps(write_config(config, "UNetControlNet")))
    assert UNetControlNetConfig.from_config(written) == config
    for wrong, message in (
        ({**written, "conditioning_channel": 3}, "did you mean 'conditioning_channels'"),
        ({**written, "unet": {**written["unet"], "layer": 2}}, "UNetConfig does not know the option 'layer'"),
        ({"_class_name": "UNetControlNet"}, "needs 'unet'"),
    ):
        with pytest.raises(InputError, match=message):
            UNetControlNetConfig.from_config(wrong)


def test_what_can_have_no_control_network_is_named() -> None:
    every = bases()
    ours, text = every["ours"], every["stable diffusion 1"]
    with pytest.raises(InputError, match="no control network for DiT"):
        from_base(DiT(DiTConfig(num_layers=1, num_attention_heads=1, attention_head_dim=8, num_embeds_ada_norm=2)))
    with pytest.raises(InputError, match="6 is no power of two"):
        from_base(ours, factor=6)
    with pytest.raises(InputError, match="do not fit its base"):
        from_base(text, options={"block_out_channels": [16, 16]})
    with pytest.raises(InputError, match="did you mean 'conditioning_channels'"):
        from_base(text, options={"conditioning_channel": 1})
    network_ = from_base(ours, factor=2)
    other = UNet(UNetConfig.from_config({**NATIVE, "num_class_embeds": 4}))
    narrow = UNet(UNetConfig.from_config({**NATIVE, "in_channels": 8}))
    for base, message in (
        (text, "its cross_attention_dim is None"),
        (other, "num_class_embeds is 3, the model's 4"),
        (narrow, "reads 13 channels, the model 8"),
    ):
        with pytest.raises(InputError, match=message):
            Controlled(base, [network_], [1.0])


@pytest.mark.parametrize(
    ("factor", "reach", "widths"),
    [
        (1, 320, (16,)), (4, 320, (16, 32, 96)), (8, 320, (16, 32, 96, 256)), (16, 320, (16, 32, 96, 256, 256)),
        (8, 96, (8, 8, 32, 80)), (8, 448, (16, 32, 96, 256)), (4, 16, (8, 8, 8)),
    ],
)  # fmt: skip
def test_the_stem_reaches_the_latents(factor: int, reach: int, widths: tuple[int, ...]) -> None:
    """The published widths, or as much narrower as the base is."""
    changes = {"block_out_channels": (reach, reach), "norm_num_groups": 8, "num_attention_heads": 1}
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "add_attention": False}
    with torch.device("meta"):
        network_ = from_base(UNet(UNetConfig.from_config({**NATIVE, **changes, **plain})), factor)
        assert network_.config.conditioning_embedding_out_channels == widths
        x, told = torch.empty(1, 4, 4, 4), Conditioning(label=torch.zeros(1).long(), concat=torch.empty(1, 9, 4, 4))
        maps = network_(x, torch.empty(1), told, torch.empty(1, 3, 4 * factor, 4 * factor))
    assert maps[0].shape == (1, reach, 4, 4)


def test_only_the_decoder_of_a_frozen_base_builds_a_graph() -> None:
    """Nothing is kept for the half that no gradient passes: saved tensors are the decoder's and the copy's alone."""
    base = bases()["ours"].requires_grad_(False)
    control = from_base(base, factor=2)
    seen: dict[str, bool] = {}

    def note(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[name] = any(part.requires_grad for part in (output if isinstance(output, list) else [output]))

        return hook

    for name in ("conv_in", "time_embedding", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "conv_out"):
        base.get_submodule(name).register_forward_hook(note(name))
    x = torch.randn(2, 4, 8, 8)
    told = replace(told_all(base, x), hints=(torch.rand(2, 3, 16, 16),))
    Controlled(base, [control], [1.0])(x, torch.tensor([3.0, 917.25]), told)
    assert [name for name, graph in seen.items() if graph] == ["up_blocks.0", "conv_out"]


JOINT: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 14,
    "out_channels": 4,
    "pos_embed_max_size": 6,
    "qk_norm": "rms_norm",
    "dual_attention_layers": (0, 1, 2),
}


def joint_case() -> tuple[MMDiT, Tensor, Tensor, Conditioning]:
    base = MMDiT(MMDiTConfig.from_config(JOINT))
    randomise(base, 7)
    draw = torch.Generator().manual_seed(1)
    x, hint, tokens, pooled = (
        torch.randn(2, *shape, generator=draw) for shape in ((4, 8, 8), (4, 8, 8), (5, 10), (14,))
    )
    return base, x, torch.tensor([3.0, 917.25]), Conditioning(tokens=tokens, pooled=pooled, hints=(hint,))


def test_start_of_a_joint_network_equals_reference() -> None:
    """Half the blocks by default; the reference copies what it is asked for, names and values alike."""
    base, *_ = joint_case()
    theirs_base = diffusers.SD3Transformer2DModel(**JOINT)
    theirs_base.load_state_dict(base.state_dict(), strict=True)
    their_network = diffusers.SD3ControlNetModel.from_transformer(theirs_base, 3, num_extra_conditioning_channels=0)
    ours = from_base(base, options={"num_layers": 3, "force_zeros_for_pooled_projection": True})
    expected, found = their_network.state_dict(), ours.state_dict()
    assert found.keys() == expected.keys()
    assert not [key for key, value in found.items() if not torch.equal(value, expected[key])]
    assert from_base(base).config.num_layers == 2
    assert from_base(base).config.reads_pooled and from_base(base).config.hint_shift
    for layers in (0, 4, "all"):
        with pytest.raises(InputError, match="1 to 3 layers"):
            from_base(base, options={"num_layers": layers})


def test_pain_20_a_fresh_joint_control_network_changes_nothing_and_then_every_weight_trains() -> None:
    base, x, t, told = joint_case()
    control = from_base(base)
    controlled = Controlled(base.requires_grad_(False), [control], [1.0])
    before = {key: value.clone() for key, value in control.named_parameters()}
    with torch.no_grad():
        plain = base(x, t, replace(told, hints=None))
        assert torch.equal(controlled(x, t, told), plain)
    optimiser = torch.optim.Adam(control.parameters(), 0.01)
    for step in range(3):
        optimiser.zero_grad()
        controlled(x, t, told).square().mean().backward()
        if step == 0:
            moving = {k for k, v in control.named_parameters() if v.grad is not None and v.grad.any()}
            assert moving == {key for key in before if key.startswith("controlnet_blocks.")}
        optimiser.step()
    with torch.no_grad():
        assert not torch.equal(controlled(x, t, told), plain)
    unread = {id(parameter) for layer in control.unread for parameter in layer.parameters()}
    assert unread == {id(parameter) for parameter in control.parameters() if parameter.grad is None}
    still = {key for key, v in control.named_parameters() if torch.equal(v, before[key]) and id(v) not in unread}
    assert all(
        key.startswith(("transformer_blocks.1.attn.add_q", "transformer_blocks.1.attn.norm_added_q")) for key in still
    )
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("name", ["mmdit", "flux2"])
def test_fresh_transformer_predicts_zero_and_every_weight_learns(name: str) -> None:
    """adaLN-zero: all branches closed, Xavier's bound on every other matrix, and nothing that cannot train."""
    torch.manual_seed(0)
    if name == "mmdit":
        network_: MMDiT | Flux2 = initialise(MMDiT(MMDiTConfig.from_config(JOINT)))
        embedder = network_.time_text_embed
        matrix = network_.get_submodule("transformer_blocks.0.ff.net.2").weight
    else:
        config = Flux2Config(
            in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=10, timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2),
        )  # fmt: skip
        network_ = initialise(Flux2(config))
        embedder = network_.time_guidance_embed
        matrix = network_.get_submodule("transformer_blocks.0.ff.linear_out").weight
    bound = (6 / sum(matrix.shape)) ** 0.5
    assert 0.9 * bound < matrix.abs().max() <= bound
    assert 0.018 < torch.cat([p.flatten() for p in embedder.parameters() if p.ndim == 2]).std() < 0.022
    _, x, t, told = joint_case()
    told = replace(told, hints=None)
    if name == "flux2":
        told = Conditioning(tokens=told.tokens, guidance=torch.tensor([1.0, 4.0]))
    before = {key: value.clone() for key, value in network_.named_parameters()}
    assert network_(x, t, told).abs().max() == 0
    optimiser = torch.optim.Adam(network_.parameters(), 1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        (network_(x, t, told) - x).square().mean().backward()
        optimiser.step()
    unread = ("transformer_blocks.3.attn.add_q_proj.", "transformer_blocks.3.attn.norm_added_q.")  # published so
    still = [key for key, value in network_.named_parameters() if torch.equal(value, before[key])]
    assert all(key.startswith(unread) for key in still)

"""The U-Net against the reference implementation: strict loading, outputs, gradients, published sizes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from networks import channels_last, gradient_error, randomise, relative
from torch import Tensor

from mezzotint.backbones import published_unets as published
from mezzotint.backbones.class_tokens import ClassTokens, ClassTokensConfig
from mezzotint.backbones.initialise import initialise
from mezzotint.backbones.presets import small_latent_unet, small_text_unet
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.digests import settings_of
from mezzotint.errors import InputError
from mezzotint.layers.attention import ImageAttention
from mezzotint.layers.config import write_config

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
UNCONDITIONAL: dict[str, dict[str, Any]] = {
    "plain": {},
    "ddpm": {"attention_head_dim": None, "flip_sin_to_cos": False, "freq_shift": 1, "downsample_padding": 0},
    "adm": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attn_norm_num_groups": 8,
        "num_class_embeds": 5,
        "out_channels": 6,
    },
    "adm, attention at every level": {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "residual resampling": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
    },
    "no attention, scaled middle": {"add_attention": False, "mid_block_scale_factor": 1.4142, "norm_eps": 1e-6},
    "scaled middle attention": {"mid_block_scale_factor": 1.4142, "norm_eps": 1e-3},
    "no middle": {"mid_block_type": None},
    "clock as class": {"class_embed_type": "timestep"},
    "vector as class": {"class_embed_type": "identity"},
    "wide embedding": {"time_embedding_dim": 48, "block_out_channels": (16, 24), "layers_per_block": 1},
}


def inputs(channels: int, size: tuple[int, int] = (16, 16), batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *size, generator=generator)
    return x, torch.tensor([3.0, 417.25, 999.0])[:batch]


def pair(options: dict[str, Any]) -> tuple[Any, UNet]:
    """The reference with random weights, and ours loaded strictly from it through its own config."""
    theirs = diffusers.UNet2DModel(**options).eval()
    randomise(theirs)
    ours = UNet(UNetConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("name", UNCONDITIONAL)
def test_unconditional_equals_reference(name: str) -> None:
    options = {**SMALL, **UNCONDITIONAL[name]}
    theirs, ours = pair(options)
    x, t = inputs(3)
    label = None
    conditioning = Conditioning()
    if options.get("num_class_embeds") or options.get("class_embed_type") == "timestep":
        label = torch.tensor([4, 0, 2])
        conditioning = Conditioning(label=label)
    elif options.get("class_embed_type") == "identity":
        label = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
        conditioning = Conditioning(pooled=label)
    with torch.no_grad():
        expected = theirs(x, t, class_labels=label).sample
        assert relative(ours(x, t, conditioning), expected) < 1e-5
        fast = channels_last(ours)
        assert relative(fast(x.to(memory_format=torch.channels_last), t, conditioning), expected) < 1e-5


@pytest.mark.parametrize("name", ["plain", "adm"])
def test_gradients_equal_reference(name: str) -> None:
    theirs, ours = (module.double() for module in pair({**SMALL, **UNCONDITIONAL[name]}))
    label = torch.tensor([1, 4, 4]) if name == "adm" else None
    x, t = inputs(3)
    x = x.double()
    theirs(x, t, class_labels=label).sample.square().mean().backward()
    ours(x, t, Conditioning(label=label)).square().mean().backward()
    assert gradient_error(ours, theirs) < 1e-9


def test_concat_is_joined_behind_the_input() -> None:
    theirs, ours = pair({**SMALL, "in_channels": 5})
    x, t = inputs(5)
    with torch.no_grad():
        joined = ours(x[:, :2], t, Conditioning(concat=x[:, 2:]))
        assert relative(joined, theirs(x, t).sample) < 1e-5


TEXT: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
XL: dict[str, Any] = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "upcast_attention": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}
CONDITIONAL: dict[str, dict[str, Any]] = {
    "stable diffusion 1": {},
    "inpainting": {"in_channels": 9},
    "stable diffusion 2": {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "xl": XL,
    "refiner": {**XL, "projection_class_embeddings_input_dim": 20 + 5 * 8, "transformer_layers_per_block": 4},
    "consistency": {"time_cond_proj_dim": 24},
    "class labels": {"num_class_embeds": 5, "layers_per_block": (1, 3)},
    "projected classes": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
    "scale-shift, plain middle": {
        "mid_block_type": "UNetMidBlock2D",
        "resnet_time_scale_shift": "scale_shift",
        "down_block_types": ("CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"),
    },
    "resampling at the top": {
        "down_block_types": ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_padding": 0,
        "mid_block_scale_factor": 1.4142,
    },
}


def text_case(options: dict[str, Any], size: tuple[int, int] = (16, 16)) -> tuple[Any, UNet, Tensor, Any, Conditioning]:
    """Both networks, the input, a call of the reference and the conditioning that says the same to ours."""
    merged = {**TEXT, **options}
    theirs = diffusers.UNet2DConditionModel(**merged).eval()
    randomise(theirs)
    ours = UNet(ConditionalUNetConfig.from_config(dict(theirs.config))).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(3)
    x, t = inputs(merged.get("in_channels", 4), size)
    tokens = torch.randn(3, 7, 24, generator=generator)
    mask = torch.arange(7)[None] < torch.tensor([[2], [7], [5]])
    pooled = torch.randn(3, 20, generator=generator)
    label, guidance = torch.tensor([4, 0, 2]), torch.tensor([1.0, 7.5, 3.2])
    numbers = (merged.get("projection_class_embeddings_input_dim", 68) - 20) // 8
    ids = torch.randint(0, 1024, (3, numbers), generator=generator)
    told: dict[str, Any] = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask}
    if merged.get("addition_embed_type"):
        told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    elif merged.get("class_embed_type") == "projection":
        told["class_labels"] = pooled
    elif merged.get("num_class_embeds"):
        told["class_labels"] = label
    if merged.get("time_cond_proj_dim"):
        pipeline = diffusers.LatentConsistencyModelPipeline
        told["timestep_cond"] = pipeline.get_guidance_scale_embedding(None, guidance - 1, embedding_dim=24)
    conditioning = Conditioning(tokens, mask, pooled=pooled, time_ids=ids, label=label, guidance=guidance)
    return theirs, ours, x, (t, told), conditioning


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_equals_reference(name: str) -> None:
    theirs, ours, x, (t, told), conditioning = text_case(CONDITIONAL[name])
    with torch.no_grad():
        expected = theirs(x, t, **told).sample
        assert relative(ours(x, t, conditioning), expected) < 1e-5
        fast = channels_last(ours)
        assert relative(fast(x.to(memory_format=torch.channels_last), t, conditioning), expected) < 1e-5


def test_odd_sizes_equal_reference() -> None:
    theirs, ours, x, (t, told), conditioning = text_case({**XL}, (13, 18))
    with torch.no_grad():
        assert relative(ours(x, t, conditioning), theirs(x, t, **told).sample) < 1e-5


def test_conditional_gradients_equal_reference() -> None:
    theirs, ours, x, (t, told), conditioning = text_case(XL)
    theirs, ours, x = theirs.double(), ours.double(), x.double()
    told["encoder_hidden_states"] = told["encoder_hidden_states"].double()
    conditioning = conditioning.map(lambda value: value.double() if value.is_floating_point() else value)
    theirs(x, t, **told).sample.square().mean().backward()
    ours(x, t, conditioning).square().mean().backward()
    assert gradient_error(ours, theirs) < 1e-9


def test_half_of_a_batch_is_the_batch_of_a_half() -> None:
    """Masked tokens and neighbours in the batch change nothing."""
    _, ours, x, (t, _), conditioning = text_case({})
    assert conditioning.tokens is not None and conditioning.mask is not None
    alone = Conditioning(tokens=conditioning.tokens[:1, :2])
    with torch.no_grad():
        assert relative(ours(x[:1], t[:1], alone), ours(x, t, conditioning)[:1]) < 1e-5


def test_no_token_to_read_is_no_number_to_fear() -> None:
    _, ours, x, (t, _), conditioning = text_case({})
    blind = Conditioning(tokens=conditioning.tokens, mask=torch.zeros(3, 7, dtype=torch.bool))
    other = Conditioning(tokens=torch.ones(3, 7, 24), mask=blind.mask)
    out = ours(x, t, blind)
    out.square().mean().backward()
    assert torch.equal(out, ours(x, t, other))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@dataclass(frozen=True)
class Published:
    """Parameters, and tensors as the file stores them: "original" ones keep q, k and v of pixel attention as one."""

    config: UNetConfig | ConditionalUNetConfig | ClassTokensConfig
    parameters: int
    tensors: int
    original: bool = False


PUBLISHED: dict[str, Published] = {
    "DDPM CIFAR-10": Published(published.ddpm_cifar10(), 35_746_307, 328),
    "DDPM 256": Published(published.ddpm_256(), 113_673_219, 450),
    "iDDPM CIFAR-10": Published(published.iddpm_cifar10(), 52_546_438, 446, original=True),
    "iDDPM 64": Published(published.iddpm_imagenet64(), 121_063_942, 450, original=True),
    "iDDPM 64, classes": Published(published.iddpm_imagenet64(1000), 273_049_350, 451, original=True),
    "iDDPM 256": Published(published.iddpm_lsun256(), 113_676_678, 426, original=True),
    "ADM 64": Published(published.adm_64(), 295_904_454, 541, original=True),
    "ADM 128": Published(published.adm_128(), 421_529_606, 493, original=True),
    "ADM 256": Published(published.adm_256(), 553_838_086, 567, original=True),
    "ADM 256, no classes": Published(published.adm_256(None), 552_814_086, 566, original=True),
    "ADM 512": Published(published.adm_512(), 558_997_638, 645, original=True),
    "LDM-4": Published(published.ldm4_uncond(), 274_056_163, 368, original=True),
    "LDM-4, classes": Published(published.ldm4_cin256(), 400_920_579 + 1001 * 512, 689),
    "LDM-8 churches": Published(published.ldm8_churches(), 294_966_916, 520, original=True),
    "LDM-8, text": Published(published.ldm8_text2img(), 872_300_484, 686),
    "SD 1.5": Published(published.sd1(), 859_520_964, 686),
    "SD 1.5 inpainting": Published(published.sd1(9), 859_520_964 + 5 * 9 * 320, 686),
    "SD 2.1": Published(published.sd2(), 865_910_724, 686),
    "SDXL": Published(published.sdxl(), 2_567_463_684, 1680),
    "SDXL inpainting": Published(published.sdxl(9), 2_567_463_684 + 5 * 9 * 320, 1680),
    "SDXL refiner": Published(published.sdxl_refiner(), 2_259_526_660, 1220),
    "LCM": Published(published.lcm_sd1(), 859_602_884, 687),
    "LCM-SDXL": Published(published.lcm_sdxl(), 2_567_545_604, 1681),
}
OURS_ALONE = ("num_attention_heads", "clock_channels")  # fields that the reference's class does not have


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    row = PUBLISHED[name]
    with torch.device("meta"):
        network = ClassTokens(row.config) if isinstance(row.config, ClassTokensConfig) else UNet(row.config)
    parameters = list(network.parameters())
    fused = sum(isinstance(part, ImageAttention) for part in network.modules())
    assert sum(p.numel() for p in parameters) == row.parameters
    assert len(parameters) - 4 * fused * row.original == row.tensors


@pytest.mark.parametrize("name", ["DDPM CIFAR-10", "ADM 256", "LDM-4", "SD 1.5", "SDXL", "SDXL refiner", "LCM"])
def test_published_shapes_equal_reference(name: str) -> None:
    config = PUBLISHED[name].config
    assert isinstance(config, UNetConfig | ConditionalUNetConfig)
    reference = diffusers.UNet2DModel if isinstance(config, UNetConfig) else diffusers.UNet2DConditionModel
    options = {key: value for key, value in asdict(config).items() if key not in OURS_ALONE}
    with torch.device("meta"):
        network, theirs = UNet(config), reference(**options)
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (network, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("heads", "head_width"), [(4, None), (None, 4), (1, None)])
def test_pixel_attention_is_the_formula_of_guided_diffusion(heads: int | None, head_width: int | None) -> None:
    """x + W softmax(q^T k / sqrt(d)) v head by head; heads by number (iDDPM, ADM 128) or by width (other ADM)."""
    width, groups = 24, 8
    config = UNetConfig(
        **{**SMALL, "block_out_channels": (16, width), "resnet_time_scale_shift": "scale_shift"},
        attn_norm_num_groups=groups,
        num_attention_heads=heads,
    )
    if head_width:
        config = replace(config, attention_head_dim=head_width)
    network = UNet(config)
    randomise(network)
    assert network.mid_block is not None
    layers = [*network.mid_block.attentions, network.down_blocks[1].attentions[0]]  # type: ignore[union-attr,list-item]
    for layer in layers:
        assert isinstance(layer, ImageAttention)
        state = layer.state_dict()
        x = torch.randn(2, width, 5, 3, generator=torch.Generator().manual_seed(1))
        h = torch.nn.functional.group_norm(
            x, groups, state["group_norm.weight"], state["group_norm.bias"], 1e-5
        ).flatten(2)
        q, k, v = (
            torch.einsum("oc,bcn->bon", state[f"to_{n}.weight"], h) + state[f"to_{n}.bias"][:, None] for n in "qkv"
        )
        size = width // heads if heads else head_width
        assert size is not None
        out = []
        for start in range(0, width, size):
            a, b, c = (part[:, start : start + size] for part in (q, k, v))
            weight = torch.softmax(torch.einsum("bct,bcs->bts", a * size**-0.25, b * size**-0.25), dim=-1)
            out.append(torch.einsum("bts,bcs->bct", weight, c))
        mixed = torch.einsum("oc,bcn->bon", state["to_out.0.weight"], torch.cat(out, 1))
        expected = x + (mixed + state["to_out.0.bias"][:, None]).unflatten(2, (5, 3))
        with torch.no_grad():
            assert relative(layer(x), expected) < 1e-5


def test_clock_of_another_width_than_the_finest_level() -> None:
    """ADM 512: told exactly as a network of the clock's width is."""
    config = UNetConfig(**{**SMALL, "clock_channels": 32, "time_embedding_dim": 128})
    wide = UNet(UNetConfig(**{**SMALL, "block_out_channels": (32, 32), "time_embedding_dim": 128}))
    network = UNet(config)
    randomise(network)
    wide.time_embedding.load_state_dict(network.time_embedding.state_dict())
    _, t = inputs(3)
    with torch.no_grad():
        told = [module.embed(t, Conditioning(), torch.float32) for module in (network, wide)]
    assert torch.equal(told[0], told[1]) and told[0].shape == (3, 128)


def test_fields_of_our_own_change_no_digest() -> None:
    config = UNetConfig.from_config(SMALL)
    assert not {"num_attention_heads", "clock_channels"} & settings_of(config).keys()
    fixed = replace(config, num_attention_heads=4)
    assert settings_of(fixed)["num_attention_heads"] == 4
    assert UNetConfig.from_config(write_config(fixed, "UNet2DModel")) == fixed


def test_classes_as_tokens() -> None:
    """The reference reads the table's row as the text of its one token."""
    theirs, unet, x, (t, _), _ = text_case({"attention_head_dim": 1})
    assert isinstance(unet.config, ConditionalUNetConfig)
    config = ClassTokensConfig(unet.config, 6)
    network = ClassTokens(config)
    randomise(network)
    network.unet.load_state_dict(theirs.state_dict(), strict=True)
    table = network.state_dict()["embedding.weight"]
    label = torch.tensor([5, 0, 2])
    with torch.no_grad():
        expected = theirs(x, t, encoder_hidden_states=table[label][:, None]).sample
        assert relative(network(x, t, Conditioning(label=label)), expected) < 1e-5
    written = json.loads(json.dumps(write_config(config, "ClassTokens")))
    assert ClassTokensConfig.from_config(written) == config
    with pytest.raises(InputError, match="classes"):
        ClassTokensConfig.from_config({**written, "classes": True})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("time_embedding_type", "fourier"),
        ("act_fn", "gelu"),
        ("down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"]),
        ("attention_head_dim", 7),
        ("num_attention_heads", 5),
        ("blok_out_channels", [1, 2]),
        ("norm_num_groups", 12),
        ("norm_num_groups", 0),
        ("up_block_types", ["UpBlock2D"]),
        ("block_out_channels", 64),
        ("block_out_channels", []),
        ("layers_per_block", "two"),
        ("norm_num_groups", None),
        ("add_attention", 1),
    ],
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key if key != "down_block_types" else "SkipDownBlock2D"):
        UNet(UNetConfig.from_config({**SMALL, key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dual_cross_attention", True),
        ("encoder_hid_dim", 64),
        ("attention_head_dim", 5),
        ("attention_head_dim", [2]),
        ("addition_embed_type", "image"),
        ("addition_embed_type", "text_time"),
        ("conv_in_kernel", 1),
    ],
)
def test_what_cannot_be_built_with_text_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        UNet(ConditionalUNetConfig.from_config({**TEXT, key: value}))


@pytest.mark.parametrize("name", ["ddpm", "adm"])
def test_written_config_builds_the_same_reference(name: str) -> None:
    theirs, ours = pair({**SMALL, **UNCONDITIONAL[name]})
    written = json.loads(json.dumps(write_config(ours.config, "UNet2DModel")))
    assert written.keys() <= {"_class_name", *theirs.config}
    again = diffusers.UNet2DModel.from_config(written)
    again.load_state_dict(ours.state_dict(), strict=True)
    assert UNetConfig.from_config(written) == ours.config


@pytest.mark.parametrize(
    "config", [small_latent_unet(48, 16, classes=9), small_text_unet(4, 4, text_channels=24)], ids=["label", "text"]
)
def test_fresh_network_predicts_zero_and_every_weight_learns(config: UNetConfig | ConditionalUNetConfig) -> None:
    """At the start all branches are closed; after three steps every parameter has moved."""
    torch.manual_seed(0)
    network = initialise(UNet(config))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, config.in_channels, 8, 8, generator=generator)
    told = Conditioning(
        label=torch.tensor([0, 8]), tokens=torch.randn(2, 5, 24, generator=generator), mask=torch.ones(2, 5).bool()
    )
    t = torch.tensor([10.0, 900.0])
    assert network(x, t, told).abs().max() == 0
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3)
    for _ in range(4):
        optimiser.zero_grad()
        (network(x, t, told) - x[:, : config.out_channels]).square().mean().backward()
        optimiser.step()
    still = [key for key, value in network.state_dict().items() if torch.equal(value, before[key])]
    assert not still


def test_private_keys_are_ignored() -> None:
    config = UNetConfig.from_config({**SMALL, "_class_name": "UNet2DModel", "_diffusers_version": "0.1"})
    assert config.block_out_channels == (16, 32)


def test_missing_conditioning_is_refused() -> None:
    network = UNet(UNetConfig.from_config({**SMALL, "num_class_embeds": 3}))
    with pytest.raises(ValueError, match="label"):
        network(*inputs(3), Conditioning())

"""LoRA put into networks for training: what it computes, what trains, what it is written as, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from networks import randomise, relative
from torch import Tensor, nn

from mezzotint.adapters import BACKBONE, Adapter, attach, merge, modules_of, read, to_diffusers, to_kohya, to_peft
from mezzotint.adapters.targets import TARGETS, changeable, check_places, choose, offered, size
from mezzotint.adapters.training import Settings, collect, trainable
from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import Flux2Config, flux2_dev, klein_4b
from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig, sd35_large, sd35_medium
from mezzotint.backbones.published_unets import sd1, sdxl
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.text.clip_network import ClipConfig, ClipText

pytest.importorskip("peft")

T = torch.tensor([3.0, 741.0])


@dataclass(frozen=True)
class Case:
    """A network and how it is called."""

    network: Any
    call: Callable[[Any], Tensor]
    parts: dict[str, int]  # what it has of TARGETS


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def backbone(network: nn.Module, x: Tensor, told: Conditioning, parts: dict[str, int]) -> Case:
    randomise(network)
    return Case(network.eval(), lambda net: net(x, T, told), parts)


@cache
def case(name: str) -> Case:
    match name:
        case "unet":
            config = UNetConfig(
                in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=8, num_class_embeds=3, resnet_time_scale_shift="scale_shift",
                downsample_type="resnet", upsample_type="resnet",
            )  # fmt: skip
            label = Conditioning(label=torch.tensor([0, 2]))
            parts = {"attention": 16, "self-attention": 16, "convolution": 24, "time": 9}
            return backbone(UNet(config), noise(2, 3, 8, 8), label, parts)
        case "text unet" | "text unet, linear":
            config = ConditionalUNetConfig(
                sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12, attention_head_dim=4,
                use_linear_projection=name.endswith("linear"),
            )  # fmt: skip
            parts = {
                "attention": 32, "self-attention": 16, "cross-attention": 16, "feed-forward": 8, "convolution": 23,
                "projection": 8, "time": 8,
            }  # fmt: skip
            return backbone(UNet(config), noise(2, 4, 8, 8), Conditioning(tokens=noise(2, 5, 12)), parts)
        case "dit":
            config = DiTConfig(
                num_attention_heads=2, attention_head_dim=6, num_layers=2, sample_size=8, num_embeds_ada_norm=3
            )
            parts = {"attention": 8, "self-attention": 8, "feed-forward": 4, "modulation": 2}
            return backbone(DiT(config), noise(2, 4, 8, 8), Conditioning(label=torch.tensor([0, 3])), parts)
        case "mmdit":
            config = MMDiTConfig(
                sample_size=8, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=6,
                num_attention_heads=2, joint_attention_dim=10, caption_projection_dim=12, pooled_projection_dim=14,
                pos_embed_max_size=8, dual_attention_layers=(0, 1), qk_norm="rms_norm",
            )  # fmt: skip
            told = Conditioning(tokens=noise(2, 5, 10), pooled=noise(2, 14))
            parts = {
                "attention": 31, "self-attention": 8, "joint-attention": 23, "feed-forward": 10, "modulation": 7
            }  # fmt: skip
            return backbone(MMDiT(config), noise(2, 4, 8, 8), told, parts)
        case "flux2":
            config = Flux2Config(
                in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=10, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2),
            )  # fmt: skip
            told = Conditioning(tokens=noise(2, 5, 10), guidance=torch.tensor([4.0, 3.0]))
            parts = {"attention": 20, "joint-attention": 20, "feed-forward": 12, "modulation": 4}
            return backbone(Flux2(config), noise(2, 8, 4, 4), told, parts)
        case "clip":
            config = ClipConfig(
                vocab_size=30, hidden_size=12, intermediate_size=20, projection_dim=8, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=9,
            )  # fmt: skip
            network = ClipText(config, projection=True).eval()
            randomise(network)
            ids = torch.arange(18).reshape(2, 9)
            parts = {"attention": 8, "self-attention": 8, "feed-forward": 4}
            return Case(network, lambda net: net.text_projection(net(ids)[-1]), parts)
    raise ValueError(name)


NETWORKS = ("unet", "text unet", "text unet, linear", "dit", "mmdit", "flux2", "clip")
KINDS = {
    "plain": Settings(rank=3, alpha=2.0),
    "stabilised": Settings(rank=4, alpha=3.0, stabilised=True),
    "magnitudes": Settings(rank=2, magnitudes=True),
    "magnitudes, stabilised": Settings(rank=2, alpha=5.0, stabilised=True, magnitudes=True),
}


def shaken(network: nn.Module, seed: int = 1) -> nn.Module:
    """Both matrices random, and magnitudes away from the norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            random = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.3 * random) if "magnitude" in name else random / 3
    return network


def part_of(name: str) -> str:
    return "text_encoder" if name == "clip" else BACKBONE


@pytest.mark.parametrize("name", NETWORKS)
def test_parts_are_those_of_the_network(name: str) -> None:
    """Every part is counted by hand; together with the few layers outside the parts they are all that can change."""
    found = case(name)
    assert offered(found.network) == found.parts
    for part, count in found.parts.items():
        modules = choose(found.network, [part])
        assert len(modules) == count
        assert len(set(modules)) == count
    inside = set(choose(found.network, list(found.parts)))
    outside = {key for key in changeable(found.network) if key not in inside}
    known = ("embed", "conv_in", "conv_out", "proj_out", "text_projection", "linear_1", "linear_2", "in_layer")
    assert all(any(word in key for word in known) for key in outside), outside


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_trains_is_what_is_written_and_attached_and_merged(name: str, kind: str) -> None:
    """Random changes of every linear layer and convolution: peft's network, ours beside the weights, ours merged.

    That all of them agree also says that no network reads a weight past its module, and none uses one twice.
    """
    found, settings, part = case(name), KINDS[kind], part_of(name)
    modules = choose(found.network, [".*"])
    assert set(modules) == set(modules_of(found.network))
    network = trainable(found.network, modules, settings, seed=0)
    assert type(network) is type(found.network)
    assert network.config is not None
    with torch.no_grad():
        start = found.call(found.network)
        assert torch.equal(found.call(network), start) or settings.magnitudes  # `up` is zero
        assert relative(found.call(network), start) < 1e-5
        expected = found.call(shaken(network))
        adapter = collect({part: network}, settings)
        assert relative(expected, start) > 0.1
        assert relative(found.call(attach(found.network, part, [(adapter, 1.0)])), expected) < 2e-5
        assert relative(found.call(merge(found.network, part, [(adapter, 1.0)])), expected) < 2e-5
        assert torch.equal(found.call(found.network), start)
    check_places({part: found.network}, {part: modules})
    assert adapter.facts.modules == len(modules)
    assert adapter.facts.parameters == size(found.network, modules, settings.rank, settings.magnitudes).parameters
    for again in written(adapter, part, found.network):
        same(again, adapter)


def written(adapter: Adapter, part: str, network: nn.Module) -> list[Adapter]:
    """The adapter in each of the three layouts, read again."""
    shapes = {part: modules_of(network)}
    tensors, config = to_peft(adapter, part)
    return [
        read(*to_diffusers(adapter), shapes),
        read(*to_kohya(adapter), shapes),
        read(tensors, {"lora_adapter_metadata": json.dumps(config)}, shapes),
    ]


def same(found: Adapter, expected: Adapter) -> None:
    assert found.parts.keys() == expected.parts.keys()
    for part, changes in expected.parts.items():
        by_name = {low.module: low for low in found.parts[part]}
        assert by_name.keys() == {low.module for low in changes}
        for low in changes:
            other = by_name[low.module]
            assert torch.equal(other.down, low.down)
            assert torch.equal(other.up, low.up)
            assert other.scale == pytest.approx(low.scale, rel=1e-7)
            assert (other.magnitude is None) == (low.magnitude is None)
            if other.magnitude is not None and low.magnitude is not None:
                assert torch.equal(other.magnitude, low.magnitude)


@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_weights_stay_to_the_bit_and_the_changes_move(name: str) -> None:
    found = case(name)
    before = {key: value.clone() for key, value in found.network.state_dict().items()}
    modules = choose(found.network, ["attention"])
    network = trainable(found.network, modules, Settings(rank=2), seed=0)
    moving = {key for key, parameter in network.named_parameters() if parameter.requires_grad}
    assert len(moving) == 2 * len(modules)
    assert all(".lora_A.default.weight" in key or ".lora_B.default.weight" in key for key in moving)
    held = {key: value.clone() for key, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for _ in range(2):  # `down` has no gradient before `up` has left zero
        optimiser.zero_grad()
        found.call(network).square().mean().backward()
        optimiser.step()
    for key, value in network.state_dict().items():
        unread = key.startswith("transformer_blocks.2.attn.add_q_proj.")  # what the text of SD 3's last block looks for
        assert torch.equal(value, held[key]) != (key in moving) or unread, key
    for key, value in found.network.state_dict().items():
        assert torch.equal(value, before[key]), key
    shared = {id(parameter) for parameter in network.parameters()}
    assert all(id(parameter) in shared for parameter in found.network.parameters())  # no second copy of the base


def test_the_gradient_is_the_closed_form() -> None:
    """y = W x + s B A x and L = sum(g * y): dL/dB = s g^T (A x)^T, dL/dA = s B^T g^T x^T (Hu et al. 2021, eq. 3)."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5)).double()
    settings = Settings(rank=3, alpha=2.0)
    network: Any = shaken(trainable(base, ["0"], settings, seed=0)).double()
    x, g = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    (g * network(x)).sum().backward()
    (low,) = collect({BACKBONE: network}, settings).parts[BACKBONE]
    layer = network[0]
    s = 2.0 / 3.0
    assert relative(layer.lora_B.default.weight.grad, s * g.T @ (x @ low.down.T)) < 1e-14
    assert relative(layer.lora_A.default.weight.grad, s * low.up.T @ g.T @ x) < 1e-14
    assert layer.base_layer.weight.grad is None


def test_the_start_is_a_function_of_the_seed_alone() -> None:
    found = case("dit")
    modules = choose(found.network, ["attention"])

    def start(seed: int) -> dict[str, Tensor]:
        network = trainable(found.network, modules, Settings(rank=2), seed)
        return {key: value for key, value in network.state_dict().items() if "lora_A" in key}

    torch.manual_seed(1)
    one, drawn = start(5), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)  # nobody else's numbers were used up
    torch.manual_seed(2)
    two, three = start(5), start(6)
    assert all(torch.equal(two[key], value) for key, value in one.items())
    assert not any(torch.equal(three[key], value) for key, value in one.items())


def test_dropout_is_of_the_changes_alone() -> None:
    found = case("unet")
    network = shaken(trainable(found.network, choose(found.network, ["attention"]), Settings(dropout=0.5), seed=0))
    assert not network.training
    with torch.no_grad():
        assert not torch.equal(found.call(network), found.call(network))
        assert torch.equal(found.call(network.eval()), found.call(network))


def test_half_precision_weights_get_changes_in_full_precision() -> None:
    found = case("mmdit")
    base = MMDiT(found.network.config).to(torch.bfloat16)
    base.load_state_dict(found.network.state_dict())
    network = trainable(base, choose(base, ["attention"]), Settings(), seed=0)
    kinds = {parameter.dtype for parameter in network.parameters() if parameter.requires_grad}
    assert kinds == {torch.float32}
    assert {parameter.dtype for parameter in network.parameters() if not parameter.requires_grad} == {torch.bfloat16}


def test_pain_10_a_target_that_a_network_lacks_is_refused_with_what_it_has() -> None:
    """Claim C5: SD 3.5 and FLUX.2 have no cross-attention; a LoRA for it would train nothing, or miss most layers."""
    with pytest.raises(InputError) as caught:
        choose(case("mmdit").network, ["cross-attention"])
    said = str(caught.value)
    assert "'cross-attention' is nothing that this network has" in said
    assert "attention (31)" in said and "joint-attention (23)" in said
    for name in ("flux2", "dit", "unet", "clip"):
        with pytest.raises(InputError, match=r"cross-attention.*It has attention \("):
            choose(case(name).network, ["attention", "cross-attention"])
    with pytest.raises(InputError, match=r"nearest part: attention"):
        choose(case("dit").network, ["atention"])
    with pytest.raises(InputError, match="no regular expression"):
        choose(case("dit").network, ["to_(q"])
    with pytest.raises(InputError, match="needs a target"):
        choose(case("dit").network, [])
    with pytest.raises(InputError, match="nothing that this network has and an adapter can change"):
        choose(case("unet").network, ["class_embedding"])  # a table: no layout of LoRA files holds it
    # the layers that LoRAs of FLUX.2 were published without: single blocks and the text's stream
    chosen = choose(case("flux2").network, ["attention"])
    for ending in ("single_transformer_blocks.1.attn.to_qkv_mlp_proj", "single_transformer_blocks.1.attn.to_out",
                   "transformer_blocks.0.attn.add_k_proj", "transformer_blocks.0.attn.to_add_out"):  # fmt: skip
        assert ending in chosen


def test_modules_are_named_by_their_ends() -> None:
    network = case("text unet").network
    assert set(choose(network, ["to_q"])) == {n for n in changeable(network) if n.endswith(".to_q")}
    assert set(choose(network, ["attn2.to_q", "to_out.0"])) == {
        n for n in changeable(network) if n.endswith(("attn2.to_q", ".to_out.0"))
    }
    assert all(n.startswith("mid_block.") for n in choose(network, [r"mid_block\..*"]))
    assert choose(network, ["conv_in"]) == ("conv_in",)


def test_a_module_with_two_names_is_refused() -> None:
    layer = nn.Linear(3, 3)
    network = nn.ModuleDict({"a": layer, "b": nn.ModuleDict({"c": layer, "d": nn.Linear(3, 3)})})
    with pytest.raises(InputError, match=r"two names \(a and b\.c\)"):
        choose(network, [".*"])
    assert choose(network, ["d"]) == ("b.d",)


def test_what_no_layout_can_name_is_refused() -> None:
    network = nn.ModuleDict({"a_b": nn.Linear(3, 3), "a": nn.ModuleDict({"b": nn.Linear(3, 3)})})
    with pytest.raises(InputError, match=r"a\.b cannot be written: lora_unet_a_b"):
        check_places({BACKBONE: network}, {BACKBONE: ["a.b"]})
    with pytest.raises(InputError, match="'bert' cannot be written"):
        check_places({BACKBONE: network, "bert": network}, {"bert": ["a.b"]})


TRANSFORMERS: dict[str, dict[str, Any]] = {
    "t5": {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2,
           "feed_forward_proj": "gated-gelu"},
    "qwen3": {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
    "mistral": {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
    "bert": {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
             "num_attention_heads": 2, "max_position_embeddings": 9},
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("t5", {"attention": 8, "self-attention": 8, "feed-forward": 6}),
        ("qwen3", {"attention": 8, "self-attention": 8, "feed-forward": 6}),
        ("mistral", {"attention": 8, "self-attention": 8, "feed-forward": 6}),
        ("bert", {"attention": 8, "self-attention": 8, "feed-forward": 4}),
    ],
)
def test_text_encoders_of_transformers(kind: str, parts: dict[str, int]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(kind, **TRANSFORMERS[kind])
    made: Any = transformers.T5EncoderModel(config) if kind == "t5" else transformers.AutoModel.from_config(config)
    made.eval()
    randomise(made)
    assert offered(made) == parts
    ids, settings = torch.arange(14).reshape(2, 7), KINDS["plain"]
    modules = choose(made, ["attention", "feed-forward"])
    network = trainable(made, modules, settings, seed=0)
    with torch.no_grad():
        start = made(input_ids=ids).last_hidden_state
        expected = shaken(network)(input_ids=ids).last_hidden_state
        adapter = collect({"text_encoder": network}, settings)
        assert relative(expected, start) > 0.05
        merged = merge(made, "text_encoder", [(adapter, 1.0)])
        assert relative(merged(input_ids=ids).last_hidden_state, expected) < 1e-5
    check_places({"text_encoder": made}, {"text_encoder": modules})
    for again in written(adapter, "text_encoder", made):
        same(again, adapter)


PUBLISHED: dict[str, Callable[[], nn.Module]] = {
    "SD 1.5": lambda: UNet(sd1()),
    "SDXL": lambda: UNet(sdxl()),
    "SD 3.5 Medium": lambda: MMDiT(sd35_medium()),
    "SD 3.5 Large": lambda: MMDiT(sd35_large()),
    "klein 4B": lambda: Flux2(klein_4b()),
    "FLUX.2 dev": lambda: Flux2(flux2_dev()),
}


@cache
def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return PUBLISHED[name]()


@pytest.mark.parametrize(
    ("name", "targets", "rank", "ratio", "megabytes"),
    [
        # claims C3 and C4, each digit
        ("SD 1.5", "attention", 1, 4313, None),
        ("SD 1.5", "attention", 4, 1078, 1.6),
        ("SD 1.5", "attention", 16, 270, 6.4),
        ("SDXL", "attention", 16, 111, None),
        ("SDXL", "attention", 32, 55, 93),
        ("SDXL", "cross-attention", 16, None, 25),
        ("SDXL", "cross-attention", 32, None, 50),
        ("klein 4B", "attention", 16, 207, None),
        ("FLUX.2 dev", "attention", 16, 387, 167),
        ("FLUX.2 dev", "attention", 32, None, 333),
    ],
)
def test_sizes_of_published_networks(
    name: str, targets: str, rank: int, ratio: int | None, megabytes: float | None
) -> None:
    network = on_meta(name)
    found = size(network, choose(network, [targets]), rank)
    assert ratio is None or round(found.ratio) == ratio
    if megabytes is not None:
        digits = 1 if isinstance(megabytes, float) else 0
        assert round(found.bytes(torch.float16) / 1e6, digits) == megabytes


@pytest.mark.parametrize(("name", "megabytes"), [("SD 1.5", 134.5), ("SDXL", 393.5)])
def test_sizes_of_lcm_lora(name: str, megabytes: float) -> None:
    """LCM-LoRA as published has rank 64 on all the parts that these U-Nets have (claim C4)."""
    network = on_meta(name)
    found = size(network, choose(network, ["attention", "feed-forward", "convolution", "projection", "time"]), 64)
    assert round(found.bytes(torch.float16) / 1e6, 1) == megabytes


def test_no_part_is_without_a_network() -> None:
    assert {part for name in NETWORKS for part in case(name).parts} == TARGETS.keys()

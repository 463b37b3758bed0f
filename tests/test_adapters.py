"""Low-rank adapters in every published layout against diffusers and peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from networks import randomise, relative
from torch import Tensor, nn

from mezzotint.adapters import (
    BACKBONE,
    Adapter,
    attach,
    describe,
    is_adapter,
    merge,
    modules_of,
    read,
    to_diffusers,
    to_kohya,
    to_peft,
)
from mezzotint.backbones.published_unets import sd1, sdxl
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.checkpoints.keymap import entry
from mezzotint.checkpoints.layouts.unet import unet
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj")
KERNELS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "proj_in", "proj_out")
CONSISTENCY = (*LINEAR, *KERNELS, "conv_in", "time_embedding.linear_1", "time_embedding.linear_2")  # as in LCM-LoRA

X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
T = torch.tensor([3.0, 741.0])
TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2))

Matrices = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def reference() -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(**TINY).eval()
    randomise(network)
    return network


@pytest.fixture(scope="module")
def ours(reference: Any) -> UNet:
    network = UNet(ConditionalUNetConfig.from_config(dict(reference.config))).eval()
    network.load_state_dict(reference.state_dict(), strict=True)
    return network


def matrices(network: nn.Module, endings: tuple[str, ...], seed: int = 0, rank: int = 3) -> Matrices:
    """Random down and up for every module whose name ends so; ranks differ from module to module."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for index, (name, module) in enumerate(network.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name.endswith(endings):
            weight, r = module.weight, rank + index % 2
            down = torch.randn(r, *weight.shape[1:], generator=generator) / weight[0].numel() ** 0.5
            up = torch.randn(len(weight), r, *[1] * (weight.ndim - 2), generator=generator) / (2 * r**0.5)
            found[name] = (down, up)
    return found


def alphas_of(found: Matrices) -> dict[str, float]:
    """Alphas that differ from module to module, but not in attention, where the reference cannot tell them apart."""
    return {module: 1.5 if "attn" in module else 2.5 + index % 3 for index, module in enumerate(found)}


def spelled(found: Matrices, name: str) -> dict[str, Tensor]:
    """A file's tensors, in one of the published spellings."""
    alphas = alphas_of(found)
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in found.items():
        match name:
            case "diffusers":
                stem, halves, alpha = f"unet.{module}", (".lora_A.weight", ".lora_B.weight"), None
            case "one part":
                stem, halves, alpha = module, (".lora_A.default.weight", ".lora_B.default.weight"), None
            case "older":
                stem, halves, alpha = f"unet.{module}", (".lora.down.weight", ".lora.up.weight"), None
            case "processors":
                stem = f"unet.{module}".replace(".to_", ".processor.to_").removesuffix(".0")
                halves, alpha = ("_lora.down.weight", "_lora.up.weight"), None
            case _:
                stem, halves = f"lora_unet_{module.replace('.', '_')}", (".lora_down.weight", ".lora_up.weight")
                alpha = torch.tensor(alphas[module])
        tensors |= {stem + halves[0]: down, stem + halves[1]: up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = alpha
    return tensors


def taken(tensors: Mapping[str, Tensor], network: nn.Module, metadata: Mapping[str, str] | None = None) -> Adapter:
    layouts = {BACKBONE: unet(network.config)} if isinstance(network, UNet) else {}
    return read(tensors, metadata or {}, {BACKBONE: modules_of(network)}, layouts)


def answers(network: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(network, UNet):
            return network(X, T, Conditioning(TOKENS))
        return network(X, T, TOKENS).sample


def loaded(reference: Any, tensors: dict[str, Tensor], **options: Any) -> Any:
    """The reference with the adapter in it, through its own conversions."""
    network = copy.deepcopy(reference)
    if any(key.startswith("lora_unet_") for key in tensors):
        from diffusers.loaders import lora_conversion_utils as conversions

        tensors = conversions._maybe_map_sgm_blocks_to_diffusers(dict(tensors), network.config)
        tensors, options["network_alphas"] = conversions._convert_non_diffusers_lora_to_diffusers(tensors)
    prefix = "unet" if next(iter(tensors)).startswith("unet.") else None
    network.load_lora_adapter(tensors, prefix=prefix, adapter_name="first", **options)
    return network


def check(ours: UNet, adapter: Adapter, expected: Tensor) -> None:
    plain = answers(ours)
    assert relative(plain, expected) > 1e-2  # the adapter does something
    assert relative(answers(attach(ours, BACKBONE, [(adapter, 1.0)])), expected) < 1e-5
    assert relative(answers(merge(ours, BACKBONE, [(adapter, 1.0)])), expected) < 1e-5
    assert torch.equal(answers(ours), plain)


@pytest.mark.parametrize(
    ("name", "endings", "format"),
    [
        ("diffusers", CONSISTENCY, "diffusers"),
        ("older", LINEAR, "diffusers, before peft"),
        ("processors", LINEAR[:4], "diffusers, before peft"),
        ("kohya", CONSISTENCY, "kohya"),
    ],
)
def test_every_spelling_equals_the_reference(
    reference: Any, ours: UNet, name: str, endings: tuple[str, ...], format: str
) -> None:
    """Convolutions, projections, embeddings; ranks and (kohya) alphas that differ from module to module."""
    tensors = spelled(matrices(reference, endings), name)
    adapter = taken(tensors, ours)
    assert adapter.facts.format == format
    assert adapter.facts.ranks == (3, 4)
    assert adapter.facts.parameters == sum(t.numel() for key, t in tensors.items() if not key.endswith("alpha"))
    check(ours, adapter, answers(loaded(reference, tensors)))


def test_alphas_of_their_own_in_every_module_equal_peft(reference: Any, ours: UNet) -> None:
    found = matrices(reference, LINEAR)
    alphas = {module: 0.5 + index / 8 for index, module in enumerate(found)}
    tensors = spelled(found, "kohya")
    tensors |= {f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(alpha) for module, alpha in alphas.items()}
    settings = {
        "r": 3,
        "rank_pattern": {f"^{module}": 4 for module, (down, _) in found.items() if len(down) == 4},
        "alpha_pattern": {f"^{module}": alpha for module, alpha in alphas.items()},
        "target_modules": list(found),
    }
    theirs = loaded(
        reference, spelled(found, "diffusers"), metadata={f"unet.{key}": value for key, value in settings.items()}
    )
    check(ours, taken(tensors, ours), answers(theirs))


def test_what_is_written_for_the_reference_is_read_by_it(reference: Any, ours: UNet) -> None:
    """An alpha for each module goes into the header as peft's patterns."""
    adapter = taken(spelled(matrices(reference, CONSISTENCY), "kohya"), ours)
    tensors, header = to_diffusers(adapter)
    theirs = loaded(reference, tensors, metadata=json.loads(header["lora_adapter_metadata"]))
    check(ours, adapter, answers(theirs))


@pytest.mark.parametrize(("make", "count", "family"), [(sd1, 67_252_224, "1.x"), (sdxl, 196_751_360, "XL")])
def test_published_consistency_adapters_have_all_their_places(make: Any, count: int, family: str) -> None:
    """LCM-LoRA: rank 64 on attention, feed-forward, projections, residual blocks and resampling, in kohya's names."""
    with torch.device("meta"):
        network = UNet(make())
        tensors: dict[str, Tensor] = {}
        for name, shape in modules_of(network).items():
            if name.endswith((*LINEAR, *KERNELS)):
                stem = f"lora_unet_{name.replace('.', '_')}"
                tensors[f"{stem}.lora_down.weight"] = torch.empty(64, *shape[1:])
                tensors[f"{stem}.lora_up.weight"] = torch.empty(shape[0], 64, *[1] * (len(shape) - 2))
    adapter = taken(tensors, network)
    assert adapter.facts.parameters == count
    assert len(adapter.parts[BACKBONE]) == len(tensors) // 2
    assert str(adapter.facts.family).endswith(family)
    assert is_adapter(tensors)
    assert not is_adapter(network.state_dict())


def test_a_file_of_one_part_needs_no_prefix(reference: Any, ours: UNet) -> None:
    found = matrices(reference, LINEAR)
    plain, prefixed = taken(spelled(found, "one part"), ours), taken(spelled(found, "diffusers"), ours)
    same_parts(plain, prefixed)


def test_names_of_the_original_layout_equal_the_reference(reference: Any, ours: UNet) -> None:
    """kohya's files for SDXL call the blocks input_blocks, middle_block and output_blocks."""
    original = {row.ours[0]: row.theirs for row in unet(ours.config) if row.ours}
    found = {
        original[name].replace(".", "_"): pair
        for name, pair in matrices(reference, (*LINEAR[:6], "proj_in", "proj_out", "conv1")).items()
    }
    tensors = spelled(found, "kohya")
    assert any("output_blocks_1_1_transformer_blocks_0_attn2_to_k" in key for key in tensors)
    check(ours, taken(tensors, ours), answers(loaded(reference, tensors)))


def test_several_adapters_with_weights_equal_the_reference(reference: Any, ours: UNet) -> None:
    first = spelled(matrices(reference, CONSISTENCY, seed=1), "diffusers")
    second = spelled(matrices(reference, LINEAR, seed=2), "diffusers")
    theirs = loaded(reference, first)
    theirs.load_lora_adapter(second, prefix="unet", adapter_name="second")
    theirs.set_adapters(["first", "second"], [0.7, -0.4])
    expected = answers(theirs)
    both = [(taken(first, ours), 0.7), (taken(second, ours), -0.4)]
    assert relative(answers(attach(ours, BACKBONE, both)), expected) < 1e-5
    assert relative(answers(merge(ours, BACKBONE, both)), expected) < 1e-5


def test_merged_weights_equal_the_reference(reference: Any, ours: UNet) -> None:
    tensors = spelled(matrices(reference, CONSISTENCY), "diffusers")
    theirs = loaded(reference, tensors)
    theirs.fuse_lora(lora_scale=0.6)
    theirs.unload_lora()
    merged = merge(ours, BACKBONE, [(taken(tensors, ours), 0.6)]).state_dict()
    for name, expected in theirs.state_dict().items():
        assert (merged[name] - expected).abs().max() < 1e-6, name


@pytest.mark.parametrize("stabilised", [False, True])
def test_alphas_in_the_header_equal_the_reference(reference: Any, ours: UNet, stabilised: bool) -> None:
    """Newer diffusers writes peft's configuration there, with patterns for modules of their own."""
    found = matrices(reference, LINEAR)
    tensors = spelled(found, "diffusers")
    other = {f"^{name}": len(down) for name, (down, _) in found.items() if len(down) != 3}
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "rank_pattern": other,
        "alpha_pattern": {"attn2.to_k": 2.0, f"^{next(iter(found))}": 0.5},
        "use_rslora": stabilised,
        "target_modules": list(found),
    }
    said = {f"unet.{key}": value for key, value in settings.items()}
    adapter = taken(tensors, ours, {"lora_adapter_metadata": json.dumps(said)})
    check(ours, adapter, answers(loaded(reference, tensors, metadata=said)))


def test_networks_share_what_no_adapter_touches(ours: UNet) -> None:
    """Two requests use one model at once; only merged weights are new, and the base keeps every tensor it had."""
    before = {name: (tensor, tensor.clone()) for name, tensor in ours.state_dict(keep_vars=True).items()}
    adapter = taken(spelled(matrices(ours, ("to_q",)), "diffusers"), ours)
    beside, merged = attach(ours, BACKBONE, [(adapter, 1.0)]), merge(ours, BACKBONE, [(adapter, 1.0)])
    touched = {f"{low.module}.weight" for low in adapter.parts[BACKBONE]}
    assert len(touched) == 8
    after, shared, new = (network.state_dict(keep_vars=True) for network in (ours, beside, merged))
    for name, (tensor, value) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value)
        assert shared[name] is tensor
        assert (new[name] is tensor) == (name not in touched)
    assert attach(ours, BACKBONE, [(adapter, 0.0)]) is ours
    assert attach(ours, "text_encoder", [(adapter, 1.0)]) is ours


def test_half_precision_is_computed_in_float32(ours: UNet) -> None:
    adapter = taken(spelled(matrices(ours, LINEAR), "kohya"), ours)
    half = copy.deepcopy(ours).to(torch.bfloat16)
    merged = merge(half, BACKBONE, [(adapter, 0.5)]).state_dict()
    for low in adapter.parts[BACKBONE]:
        weight = half.state_dict()[f"{low.module}.weight"].double()
        exact = weight + 0.5 * low.scale * low.up.double() @ low.down.double()
        found = merged[f"{low.module}.weight"]
        assert found.dtype == torch.bfloat16
        assert ((found - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all(), low.module  # rounded once
    beside = attach(half, BACKBONE, [(adapter, 0.5)])
    x = X.to(torch.bfloat16)
    with torch.no_grad():
        told = Conditioning(TOKENS.to(torch.bfloat16))
        full = attach(ours, BACKBONE, [(adapter, 0.5)])
        assert relative(beside(x, T, told).float(), full(X, T, Conditioning(TOKENS))) < 0.1


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"linear": nn.Linear(6, 5), "flat": nn.Linear(5, 4, bias=False)})
        self.conv, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["flat"](self.inner["linear"](self.down(self.conv(x)).flatten(2).mean(2)))


@pytest.mark.parametrize("magnitudes", [False, True])
def test_peft_itself_agrees(magnitudes: bool) -> None:
    """peft's own files and configuration, with and without magnitudes, at a weight of 0.8, on linear and conv."""
    torch.manual_seed(0)
    network = Bare()
    randomise(network)
    config = peft.LoraConfig(
        r=2, lora_alpha=3, use_dora=magnitudes, target_modules=["inner.linear", "inner.flat", "conv", "down"]
    )
    theirs = peft.get_peft_model(copy.deepcopy(network), config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape)
            parameter.data = 1 + 0.2 * noise if "magnitude" in name else noise / 3
    tensors = peft.get_peft_model_state_dict(theirs)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 0.8)
    adapter = taken(tensors, network, {"lora_adapter_metadata": json.dumps(config.to_dict(), default=list)})
    assert adapter.facts.format == "peft"
    assert adapter.facts.magnitudes == magnitudes
    x = torch.randn(4, 3, 7, 7)
    with torch.no_grad():
        expected = theirs(x)
        assert relative(network(x), expected) > 0.05
        assert relative(attach(network, BACKBONE, [(adapter, 0.8)])(x), expected) < 1e-5
        assert relative(merge(network, BACKBONE, [(adapter, 0.8)])(x), expected) < 1e-5
    written, settings = to_peft(adapter)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], value) for key, value in tensors.items())
    again = peft.get_peft_model(copy.deepcopy(network), peft.LoraConfig(**settings)).eval()
    outcome = peft.set_peft_model_state_dict(again, written)
    assert not outcome.unexpected_keys
    for module in again.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 0.8)
    with torch.no_grad():
        assert torch.equal(again(x), expected)
    kohya = to_kohya(adapter)[0]
    same_parts(taken(kohya, network), adapter)
    if magnitudes:  # the other trainers keep them as a column, and name them otherwise
        assert kohya["lora_unet_conv.dora_scale"].shape == (6, 1, 1, 1)
        wrong = {**kohya, "lora_unet_conv.dora_scale": torch.ones(1, 3, 1, 1)}
        with pytest.raises(InputError, match="magnitude for each input"):
            taken(wrong, network)


def same_parts(found: Adapter, expected: Adapter) -> None:
    """The same matrices to the bit, and the same strength, whatever the file."""
    assert found.parts.keys() == expected.parts.keys()
    for part, changes in expected.parts.items():
        by_name = {low.module: low for low in found.parts[part]}
        assert by_name.keys() == {low.module for low in changes}
        for low in changes:
            other = by_name[low.module]
            assert torch.equal(other.down, low.down)
            assert torch.equal(other.up, low.up)
            assert other.scale == low.scale
            if low.magnitude is None or other.magnitude is None:
                assert low.magnitude is other.magnitude
            else:
                assert torch.equal(other.magnitude, low.magnitude)


class Text(nn.Module):
    """The names of two CLIP encoders, one with the inner model as a level of its own, one without."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        layers = nn.ModuleList(nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(6, 6)})}) for _ in "ab")
        encoder = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": layers})})
        self.text_model = encoder if inner else None
        self.encoder = None if inner else encoder["encoder"]


def test_layouts_round_trip_with_text_encoders(ours: UNet) -> None:
    """Every part, an alpha for each module: written in diffusers' and kohya's layouts and read again, to the bit."""
    networks = {BACKBONE: ours, "text_encoder": Text(inner=False), "text_encoder_2": Text(inner=True)}
    modules = {part: modules_of(network) for part, network in networks.items()}
    tensors = spelled(matrices(ours, CONSISTENCY), "kohya")
    q = "encoder.layers.1.self_attn.q_proj"
    for number, alpha in ((1, 0.3), (2, 4.0)):
        stem = f"lora_te{number}_text_model_{q.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": torch.randn(2, 6), f"{stem}.lora_up.weight": torch.randn(6, 2)}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    adapter = read(tensors, {"ss_network_dim": "4"}, modules)
    assert [low.module for low in adapter.parts["text_encoder"]] == [q]
    assert [low.module for low in adapter.parts["text_encoder_2"]] == [f"text_model.{q}"]
    kohya, header = to_kohya(adapter)
    assert kohya.keys() == tensors.keys()
    assert all(torch.equal(kohya[key], value) for key, value in tensors.items())
    assert header["ss_network_dim"] == "4"
    written, header = to_diffusers(adapter)
    assert f"text_encoder.text_model.{q}.lora_A.weight" in written
    same_parts(read(written, header, modules), adapter)


def test_older_names_of_text_encoders() -> None:
    network, down, up = Text(inner=True), torch.randn(2, 6), torch.randn(6, 2)
    stem = "text_encoder.text_model.encoder.layers.0.self_attn"
    for middle in ("to_q_lora", "q_proj.lora_linear_layer", "q_proj.lora"):
        tensors = {f"{stem}.{middle}.down.weight": down, f"{stem}.{middle}.up.weight": up}
        adapter = read(tensors, {}, {"text_encoder": modules_of(network)})
        assert adapter.parts["text_encoder"][0].module == "text_model.encoder.layers.0.self_attn.q_proj"


def test_a_file_that_does_not_say_which_text_encoder_is_not_guessed_at() -> None:
    modules = modules_of(Text(inner=True))
    stem = "base_model.model.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(6, 2)}
    assert "text_encoder" in read(tensors, {}, {BACKBONE: {}, "text_encoder": modules}).parts
    with pytest.raises(InputError, match="no place"):
        read(tensors, {}, {BACKBONE: {}, "text_encoder": modules, "text_encoder_2": modules})


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lora_mid.weight", "Tucker"),
        ("unet.conv_in.lora_B.bias", "biases"),
        ("unet.conv_in.oft_blocks", "OFT"),
        ("unet.conv_in.weight", "not a LoRA file"),
        ("lora_unet_conv_in.alpha", "one of their two matrices"),
    ],
)
def test_other_kinds_are_refused_by_name(ours: UNet, key: str, kind: str) -> None:
    with pytest.raises(InputError, match=kind):
        taken({key: torch.ones(1)}, ours)


def test_what_has_no_place_is_counted_and_its_family_named(ours: UNet) -> None:
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, family in ((768, "1.x"), (1024, "2.x"), (2048, "XL"), (1280, "refiner")):
        tensors = {f"{stem}.lora_down.weight": torch.ones(2, width), f"{stem}.lora_up.weight": torch.ones(16, 2)}
        for index in range(5):
            tensors |= {f"lora_unet_other_{index}.lora_{way}.weight": torch.ones(2, 2) for way in ("down", "up")}
        header = {"ss_base_model_version": "sd_v0", "ss_network_dim": "2"}
        with pytest.raises(InputError) as caught:
            taken(tensors, ours, header)
        said = str(caught.value)
        assert "5 of 6 modules have no place in this model (lora_unet_other_0, " in said
        assert "and 2 more" in said
        assert f"1 of 6 modules have another shape here ({stem})" in said
        assert family in said
        assert "sd_v0" in said
        assert said.count("\n") == 1


def test_names_of_the_original_layout_need_its_table(ours: UNet) -> None:
    stem = "lora_unet_input_blocks_4_1_proj_in"
    tensors = {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(16, 2)}
    with pytest.raises(InputError, match="no place"):
        read(tensors, {}, {BACKBONE: modules_of(ours)})
    table = {BACKBONE: [entry("input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in")]}
    (low,) = read(tensors, {}, {BACKBONE: modules_of(ours)}, table).parts[BACKBONE]
    assert low.down.shape == (2, 16, 1, 1)  # stored for a linear layer, wanted by a convolution


def test_one_module_in_two_spellings_is_refused(ours: UNet) -> None:
    found = matrices(ours, ("to_q",))
    with pytest.raises(InputError, match="twice"):
        taken(spelled(found, "kohya") | spelled(found, "diffusers"), ours)


def test_facts_come_without_a_model() -> None:
    stem = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(4, 1536),
        f"{stem}.lora_up.weight": torch.ones(4608, 4),
        f"{stem}.alpha": torch.tensor(2.0),
    }
    header = {
        "ss_base_model_version": "sd3",
        "modelspec.prediction_type": "v",
        "ss_tag_frequency": json.dumps({"10_plate": {"etching": 7, "ink": 9}, "5_more": {"etching": 3}}),
    }
    facts = describe(tensors, header)
    assert facts.family == "Stable Diffusion 3.5 medium"
    assert (facts.format, facts.ranks, facts.scales, facts.modules) == ("kohya", (4,), (0.5,), 1)
    assert (facts.parameters, facts.magnitudes) == (4 * 1536 + 4608 * 4, False)
    assert (facts.base, facts.prediction, facts.words) == ("sd3", "v", ("etching", "ink"))
    assert describe(tensors, {"modelspec.trigger_phrase": "a plate, sks"}).words == ("a plate", "sks")
    with pytest.raises(InputError, match="not JSON"):
        describe(tensors, {"lora_adapter_metadata": "{"})


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"lora_alpha": "8"}, "other than numbers"),
        ({"lora_alpha": 8, "alpha_pattern": {"conv_in": None}}, "other than numbers"),
        ({"lora_alpha": 8, "alpha_pattern": {"(conv": 2}}, "no regular expression"),
        ({"lora_alpha": 8, "alpha_pattern": {"(a+)+b": 2}}, "is not read"),
        ({"lora_alpha": float("inf")}, "alpha is inf"),
    ],
)
def test_strange_headers_are_refused(ours: UNet, said: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        taken(spelled(matrices(ours, ("to_q",)), "one part"), ours, {"lora_adapter_metadata": json.dumps(said)})


def test_damaged_tensors_are_refused(ours: UNet) -> None:
    stem, good = "lora_unet_conv_in", {"lora_down.weight": torch.ones(2, 4, 3, 3), "lora_up.weight": torch.ones(8, 2)}
    bad = [
        ({"lora_down.weight": torch.ones(0, 4, 3, 3), "lora_up.weight": torch.ones(8, 0)}, "cannot be multiplied"),
        ({"lora_up.weight": torch.ones(8, 3)}, "cannot be multiplied"),
        ({"lora_up.weight": torch.ones(2)}, "cannot be multiplied"),
        ({"alpha": torch.ones(2)}, "not one number"),
        ({"alpha": torch.tensor(float("nan"))}, "alpha is nan"),
        ({"dora_scale": torch.ones(8, 2)}, "16 magnitudes for 8 outputs"),
        ({"lora_down.weight": torch.ones(2, 4, 1, 1)}, "another shape"),
    ]
    for change, why in bad:
        with pytest.raises(InputError, match=why):
            taken({f"{stem}.{key}": value for key, value in {**good, **change}.items()}, ours)
    assert taken({f"{stem}.{key}": value for key, value in good.items()}, ours).facts.modules == 1


def test_magnitudes_in_some_modules_have_kohyas_layout_alone(ours: UNet) -> None:
    tensors = spelled(matrices(ours, ("attn1.to_q",)), "kohya")
    name = next(iter(tensors)).partition(".")[0]
    adapter = taken({**tensors, f"{name}.dora_scale": torch.ones(16, 1)}, ours)
    same_parts(taken(to_kohya(adapter)[0], ours), adapter)
    with pytest.raises(InputError, match="kohya"):
        to_diffusers(adapter)


def test_changes_of_several_adapters_add_up() -> None:
    """W' = W + sum of (W'_i - W), with magnitudes and without, beside the weights and merged into them."""
    torch.manual_seed(0)
    network = Bare()
    randomise(network)
    adapters: list[tuple[Adapter, float]] = []
    for seed, strength in ((1, 0.7), (2, -0.4), (3, 1.2)):
        tensors = spelled(matrices(network, ("linear", "conv", "down"), seed), "kohya")
        for name in ("inner_linear", "conv") if seed > 1 else ():
            rows = len(tensors[f"lora_unet_{name}.lora_up.weight"])
            tensors[f"lora_unet_{name}.dora_scale"] = 0.5 + torch.rand(rows, 1)
        adapters.append((taken(tensors, network), strength))
    base = network.state_dict()
    singles = [merge(network, BACKBONE, [one]).state_dict() for one in adapters]
    merged, x = merge(network, BACKBONE, adapters), torch.randn(2, 3, 7, 7)
    for name, found in merged.state_dict().items():
        expected = base[name] + sum(single[name] - base[name] for single in singles)
        assert (found - expected).abs().max() < 2e-6, name
    with torch.no_grad():
        assert relative(attach(network, BACKBONE, adapters)(x), merged(x)) < 1e-5

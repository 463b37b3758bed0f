"""The multimodal diffusion transformer and its control networks against the reference implementation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import gradient_error, randomise, relative
from torch import Tensor

from mezzotint.backbones.controlnet import Controlled
from mezzotint.backbones.mmdit import MMDiT, MMDiTConfig, sd3_medium, sd35_large, sd35_medium
from mezzotint.backbones.mmdit_controlnet import MMDiTControlNet, MMDiTControlNetConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 10,
    "caption_projection_dim": 24,
    "pooled_projection_dim": 14,
    "pos_embed_max_size": 20,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "SD 3": {},
    "SD 3.5 Medium": {"dual_attention_layers": (0, 1, 3), "qk_norm": "rms_norm"},
    "SD 3.5 Large": {"qk_norm": "rms_norm", "dual_attention_layers": ()},
    "patch 1, other channels out": {"patch_size": 1, "out_channels": 8, "pos_embed_max_size": 33},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "joint": {"force_zeros_for_pooled_projection": False},
    "zeros for the pooled prompt": {},
    "repainting": {"extra_conditioning_channels": 1, "qk_norm": "rms_norm", "dual_attention_layers": (1,)},
    "no places": {"pos_embed_type": None},
}
STABILITY: dict[str, Any] = {
    "joint_attention_dim": None,
    "caption_projection_dim": 2048,
    "pos_embed_max_size": None,
    "pos_embed_type": None,
    "use_pos_embed": False,
    "force_zeros_for_pooled_projection": False,
}
TIME = torch.tensor([3.0, 417.25, 1000.0])


def pair(options: dict[str, Any]) -> tuple[Any, MMDiT]:
    theirs = diffusers.SD3Transformer2DModel(**{**SMALL, **options}).eval()
    randomise(theirs)
    ours = MMDiT(MMDiTConfig.from_config(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def control_pair(options: dict[str, Any]) -> tuple[Any, MMDiTControlNet]:
    theirs = diffusers.SD3ControlNetModel(**{**SMALL, "num_layers": 3, **options}).eval()
    randomise(theirs)
    ours = MMDiTControlNet(MMDiTControlNetConfig.from_config(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(height: int = 16, width: int = 24) -> tuple[Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x, tokens, pooled = (torch.randn(3, *shape, generator=generator) for shape in ((4, height, width), (7, 10), (14,)))
    return x, Conditioning(tokens=tokens, pooled=pooled)


def reference(theirs: Any, x: Tensor, told: Conditioning, **options: Any) -> Tensor:
    return theirs(x, told.tokens, told.pooled, TIME, **options).sample


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (10, 32)])
def test_equals_reference(name: str, height: int, width: int) -> None:
    theirs, ours = pair(VARIANTS[name])
    x, told = inputs(height, width)
    with torch.no_grad():
        assert relative(ours(x, TIME, told), reference(theirs, x, told)) < 1e-5


def test_gradients_equal_reference() -> None:
    theirs, ours = (module.double() for module in pair(VARIANTS["SD 3.5 Medium"]))
    x, told = inputs()
    x, told = x.double(), told.map(Tensor.double)
    # the reference takes its root mean square in float32, which alone is 1e-7
    reference(theirs, x, told).square().mean().backward()
    ours(x, TIME, told).square().mean().backward()
    assert gradient_error(ours, theirs) < 2e-6


@pytest.mark.parametrize("skip", [(1,), (0, 2), (3,)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_skipped_blocks_and_control_residuals(skip: tuple[int, ...], count: int) -> None:
    """Residuals come behind skipped blocks too, and never behind the last one."""
    theirs, ours = pair(VARIANTS["SD 3.5 Medium"])
    x, told = inputs()
    residuals = tuple(torch.randn(3, 96, 24, generator=torch.Generator().manual_seed(k)) for k in range(count)) or None
    with torch.no_grad():
        expected = reference(theirs, x, told, skip_layers=list(skip), block_controlnet_hidden_states=residuals)
        found = ours(x, TIME, replace(told, skip=skip, control=residuals))
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize(("layers", "count"), [(10, 9), (9, 5), (18, 14)])
def test_residuals_are_spread_over_the_blocks(layers: int, count: int) -> None:
    """With all branches closed the picture stream is the patches plus the residuals: their sum tells which came when.

    18 over 14 is where a quotient of floats and one of whole numbers part.
    """
    theirs, ours = pair({"num_layers": layers})
    x, told = inputs()
    for module in (theirs, ours):
        for name, parameter in module.named_parameters():
            if ".norm1.linear." in name:
                parameter.data.zero_()
    residuals = tuple(torch.randn(3, 96, 24, generator=torch.Generator().manual_seed(k)) for k in range(count))
    with torch.no_grad():
        expected = reference(theirs, x, told, block_controlnet_hidden_states=residuals)
        assert relative(ours(x, TIME, replace(told, control=residuals)), expected) < 1e-5


def test_modulations_kept_by_the_caller_change_nothing() -> None:
    _, ours = pair(VARIANTS["SD 3.5 Medium"])
    x, told = inputs()
    with torch.inference_mode():
        kept = ours.modulations(TIME, told.pooled)  # type: ignore[arg-type]
        assert torch.equal(ours.apply_modulations(x, kept, told), ours(x, TIME, told))


@pytest.mark.parametrize("options", [{}, {"sample_size": 128, "pos_embed_max_size": 192}, {"attention_head_dim": 32}])
def test_fresh_table_is_the_references(options: dict[str, Any]) -> None:
    """A network made from its configuration alone has the places that the published files store."""
    options = {**SMALL, **options, "caption_projection_dim": 2 * options.get("attention_head_dim", 12)}
    theirs = diffusers.SD3Transformer2DModel(**options)
    ours = MMDiT(MMDiTConfig.from_config(options))
    assert torch.equal(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)


def test_weights_bring_their_own_table() -> None:
    """The stored table is used, not the computed one."""
    theirs, ours = pair({})
    theirs.pos_embed.pos_embed += torch.randn_like(theirs.pos_embed.pos_embed)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, told = inputs()
    with torch.no_grad():
        assert relative(ours(x, TIME, told), reference(theirs, x, told)) < 1e-5


@pytest.mark.parametrize(
    ("config", "parameters", "stored", "tensors"),
    [
        (sd3_medium(), 2_028_328_000, 56_623_104, 683),
        (sd35_medium(), 2_243_171_520, 226_492_416, 909),
        (sd35_large(), 8_056_627_520, 89_653_248, 1227),
    ],
)
def test_published_sizes(config: MMDiTConfig, parameters: int, stored: int, tensors: int) -> None:
    with torch.device("meta"):
        ours = MMDiT(config)
        theirs = diffusers.SD3Transformer2DModel.from_config(write_config(config, "SD3Transformer2DModel"))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(b.numel() for b in ours.buffers()) == stored
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert len(shapes[0]) == tensors


@pytest.mark.parametrize("name", CONTROLS)
def test_control_network_equals_reference(name: str) -> None:
    """Networks trained on zeros for the pooled prompt put the zeros there themselves; the reference is handed them."""
    theirs, ours = control_pair(CONTROLS[name])
    x, told = inputs()
    hint = torch.randn(3, 4 + ours.config.extra_conditioning_channels, 16, 24)
    pooled = told.pooled if name == "joint" else torch.zeros(3, 14)
    with torch.no_grad():
        expected = theirs(
            x, hint, timestep=TIME, encoder_hidden_states=told.tokens, pooled_projections=pooled
        ).controlnet_block_samples  # fmt: skip
        found = ours(x, TIME, told, hint)
    assert len(found) == len(expected) == 3
    assert max(map(relative, found, expected)) < 1e-5


def test_control_network_that_reads_patches_through_its_backbone() -> None:
    """Stability's networks for SD 3.5 Large: no text, no patch embedding of their own."""
    their_backbone, backbone = pair({})
    theirs, ours = control_pair(STABILITY)
    x, told = inputs()
    hint = torch.randn(3, 4, 16, 24)
    with pytest.raises(ValueError, match="attach"):
        ours(x, TIME, told, hint)
    names = ours.state_dict().keys()
    ours.attach(backbone)
    assert ours.state_dict().keys() == names
    theirs.pos_embed = theirs._get_pos_embed_from_transformer(their_backbone)
    with torch.no_grad():
        expected = theirs(x, hint, timestep=TIME, pooled_projections=told.pooled).controlnet_block_samples
        found = ours(x, TIME, Conditioning(pooled=told.pooled), hint)
    assert max(map(relative, found, expected)) < 1e-5


def test_backbone_under_two_control_networks() -> None:
    """Three residuals over four blocks, from two networks with strengths of their own."""
    their_backbone, backbone = pair(VARIANTS["SD 3.5 Large"])
    pairs = [control_pair(CONTROLS[name]) for name in ("joint", "zeros for the pooled prompt")]
    x, told = inputs()
    hints = tuple(torch.randn(2, 3, 4, 16, 24))
    pooled = (told.pooled, torch.zeros(3, 14))
    with torch.no_grad():
        each = [
            theirs(
                x, hints[k], (0.7, -0.4)[k], told.tokens, pooled_projections=pooled[k], timestep=TIME
            ).controlnet_block_samples
            for k, (theirs, _) in enumerate(pairs)
        ]
        summed = [first + second for first, second in zip(*each, strict=True)]
        expected = reference(their_backbone, x, told, block_controlnet_hidden_states=summed)
        found = Controlled(backbone, [ours for _, ours in pairs], (0.7, -0.4))(x, TIME, replace(told, hints=hints))
    assert relative(found, expected) < 1e-5


def test_control_network_gradients_equal_reference() -> None:
    theirs, ours = (module.double() for module in control_pair(CONTROLS["joint"]))
    x, told = inputs()
    x, told = x.double(), told.map(Tensor.double)
    hint = torch.randn(3, 4, 16, 24).double()
    options = {"encoder_hidden_states": told.tokens, "pooled_projections": told.pooled}
    for residuals in (theirs(x, hint, timestep=TIME, **options).controlnet_block_samples, ours(x, TIME, told, hint)):
        torch.stack([residual.square().mean() for residual in residuals]).sum().backward()
    # the text of the last block goes nowhere, so its weights have no gradient in either
    both = [{key for key, p in module.named_parameters() if p.grad is None} for module in (theirs, ours)]
    assert both[0] == both[1]
    for module in (theirs, ours):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    assert gradient_error(ours, theirs) < 1e-9


def test_what_the_pipeline_must_know_of_a_control_network() -> None:
    """Facts of the reference's pipelines: which hints are shifted, who reads tokens and the pooled prompt."""
    told = {name: control_pair(options)[1].config for name, options in {**CONTROLS, "Stability": STABILITY}.items()}
    facts = {name: (c.reads_tokens, c.reads_pooled, c.hint_shift) for name, c in told.items()}
    assert facts["joint"] == (True, True, True)
    assert facts["zeros for the pooled prompt"] == (True, False, False)
    assert facts["repainting"] == (True, False, True)
    assert facts["Stability"] == (False, True, True)


def test_a_control_network_of_another_model_is_refused() -> None:
    _, ours = control_pair({"num_attention_heads": 3, "caption_projection_dim": 36})
    with pytest.raises(InputError, match="channels is 36, the model's 24"):
        ours.attach(pair({})[1])


def test_pictures_beyond_the_table_are_refused() -> None:
    _, ours = pair({})
    x, told = inputs(16, 42)
    with pytest.raises(InputError, match="16 x 42 is too large"):
        ours(x, TIME, told)


@pytest.mark.parametrize(
    ("key", "value"), [("qk_norm", "layer_norm"), ("caption_projection_dim", 25), ("dual_attention_layer", (0,))]
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        MMDiT(MMDiTConfig.from_config({**SMALL, key: value}))

"""The diffusion transformer against the reference implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from networks import gradient_error, randomise, relative

from mezzotint.backbones.dit import DiT, DiTConfig, Embedder, position_table
from mezzotint.backbones.initialise import initialise
from mezzotint.backbones.presets import dit
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 3,
    "sample_size": 16,
    "num_embeds_ada_norm": 7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "patch 2": {},
    "patch 4, learned variance": {"patch_size": 4, "out_channels": 8},
    "patch 8, one channel": {"patch_size": 8, "in_channels": 1},
    "exact gelu, affine norm, no bias": {
        "activation_fn": "gelu",
        "norm_elementwise_affine": True,
        "attention_bias": False,
        "norm_eps": 1e-3,
    },
}
LABEL = torch.tensor([6, 7, 0])
TIME = torch.tensor([3.0, 417.25, 999.0])


def pair(options: dict[str, Any]) -> tuple[Any, DiT]:
    theirs = diffusers.DiTTransformer2DModel(**{**SMALL, **options}).eval()
    randomise(theirs)
    ours = DiT(DiTConfig.from_config(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("size", [16, 24])
def test_equals_reference(name: str, size: int) -> None:
    """At the trained resolution and beyond it; every block has an embedder of its own in these random weights."""
    theirs, ours = pair(VARIANTS[name])
    x = torch.randn(3, ours.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(x, TIME, LABEL).sample
        assert relative(ours(x, TIME, Conditioning(label=LABEL)), expected) < 1e-5


def test_gradients_equal_reference() -> None:
    theirs, ours = (module.double() for module in pair({}))
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    theirs(x, TIME, LABEL).sample.square().mean().backward()
    ours(x, TIME, Conditioning(label=LABEL)).square().mean().backward()
    assert gradient_error(ours, theirs) < 1e-9


def test_oblong_pictures_keep_their_shape() -> None:
    """The reference forgets the aspect. With closed branches, one changed patch must come back in its place alone."""
    network = DiT(DiTConfig.from_config(SMALL))
    randomise(network)
    for block in network.transformer_blocks:
        block.norm1.linear.weight.data.zero_()  # type: ignore[union-attr]
        block.norm1.linear.bias.data.zero_()  # type: ignore[union-attr]
    x = torch.zeros(1, 4, 8, 16)
    with torch.no_grad():
        still = network(x, TIME[:1], Conditioning(label=LABEL[:1]))
        x[0, :, 2:4, 10:12] = 1.0
        moved = network(x, TIME[:1], Conditioning(label=LABEL[:1])) != still
    assert moved.any(dim=1).nonzero().min(dim=0).values.tolist() == [0, 2, 10]
    assert moved.any(dim=1).nonzero().max(dim=0).values.tolist() == [0, 3, 11]


def test_modulations_kept_by_the_caller_change_nothing() -> None:
    _, ours = pair({})
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        kept = ours.modulations(TIME, LABEL)
        assert torch.equal(ours.apply_modulations(x, kept), ours(x, TIME, Conditioning(label=LABEL)))


def test_training_after_inference_mode() -> None:
    """The position table is made once: under inference mode it must still serve training."""
    network = DiT(DiTConfig.from_config({**SMALL, "sample_size": 12}))
    x, told = torch.randn(2, 4, 12, 12), Conditioning(label=torch.tensor([0, 1]))
    with torch.inference_mode():
        network(x, TIME[:2], told)
    network(x, TIME[:2], told).mean().backward()


@pytest.mark.parametrize(
    ("name", "size", "count", "tensors", "original"),
    [
        ("S/2", 32, 39_805_088, 234, 32_963_360),
        ("B/2", 32, 147_439_904, 234, 130_512_416),
        ("L/2", 32, 511_609_888, 462, 458_102_816),
        ("XL/2", 32, 749_826_464, 538, 675_129_632),
        ("XL/2", 64, 749_826_464, 538, 676_014_368),
    ],
)
def test_published_sizes(name: str, size: int, count: int, tensors: int, original: int) -> None:
    """As the reference layout stores them, each block with a copy of the embedder; the original file has one of those
    and the position table."""
    config = dit(name, in_channels=4, out_channels=8, classes=1000, sample_size=size)
    with torch.device("meta"):
        network = DiT(config)
        theirs = diffusers.DiTTransformer2DModel(
            num_attention_heads=config.num_attention_heads,
            attention_head_dim=config.attention_head_dim,
            num_layers=config.num_layers,
            out_channels=8,
            sample_size=size,
        )
        copy = sum(p.numel() for p in Embedder(1000, config.channels).parameters())
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (network, theirs)]
    assert shapes[0] == shapes[1]
    assert (sum(p.numel() for p in network.parameters()), len(shapes[0])) == (count, tensors)
    assert count - (config.num_layers - 1) * copy + (size // 2) ** 2 * config.channels == original


def test_position_table_is_the_one_that_original_files_store() -> None:
    """Columns first, then rows; sines, then cosines of k / 10000^(i / (D / 4)) (the papers' code, written out)."""
    channels, side = 24, 5
    table = position_table(channels, side, side, side)
    for row in range(side):
        for column in range(side):
            angles = [[k / 10000 ** (i / (channels / 4)) for i in range(channels // 4)] for k in (column, row)]
            expected = [wave(a) for k in angles for wave in (math.sin, math.cos) for a in k]
            assert relative(table[row * side + column], torch.tensor(expected)) < 1e-7


def test_fresh_network_predicts_zero_and_every_weight_learns() -> None:
    torch.manual_seed(0)
    network = initialise(DiT(DiTConfig.from_config(SMALL)))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    x, label = torch.randn(8, 4, 16, 16), torch.arange(8)
    t = torch.linspace(0, 999, 8)
    assert network(x, t, Conditioning(label=label)).abs().max() == 0
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(5):
        optimiser.zero_grad()
        (network(x, t, Conditioning(label=label)) - x).square().mean().backward()
        optimiser.step()
    still = [key for key, value in network.state_dict().items() if torch.equal(value, before[key])]
    assert not still


def test_all_embedders_start_alike() -> None:
    state = initialise(DiT(DiTConfig.from_config(SMALL))).state_dict()
    for key, value in state.items():
        if ".norm1.emb." in key:
            first = "transformer_blocks.0." + key.split(".", 2)[2]
            assert torch.equal(value, state[first])


@pytest.mark.parametrize(
    ("key", "value"), [("activation_fn", "geglu"), ("norm_type", "ada_norm"), ("dropout", 0.1), ("num_layer", 3)]
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        DiT(DiTConfig.from_config({**SMALL, key: value}))

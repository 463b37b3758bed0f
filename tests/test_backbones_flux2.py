"""FLUX.2 against the reference implementation, called as its pipelines call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import gradient_error, randomise, relative
from torch import Tensor

from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import Flux2Config, flux2_dev, klein_4b, klein_9b
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (2, 6, 4, 4),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "dev": {},
    "klein": {"guidance_embeds": False},
    "other ratio, angles, epsilon and output": {
        "mlp_ratio": 2.5,
        "rope_theta": 100,
        "eps": 1e-3,
        "out_channels": 8,
        "axes_dims_rope": (4, 4, 4, 4),
    },
}
TIME = torch.tensor([3.0, 507.4025, 999.9])  # the second is not itself after / 1000 * 1000 in float32
SCALE = torch.tensor([1.0, 4.0, 3.37])
CASES = {  # height and width of the picture, of each reference, and the words
    "square": ((6, 6), (), 5),
    "oblong, one word": ((3, 8), (), 1),
    "one reference": ((4, 6), ((5, 3),), 9),
    "two references": ((7, 2), ((2, 9), (4, 4)), 4),
}


def pair(options: dict[str, Any]) -> tuple[Any, Flux2]:
    theirs = diffusers.Flux2Transformer2DModel(**{**SMALL, **options}).eval()
    randomise(theirs)
    ours = Flux2(Flux2Config.from_config(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def case(name: str, guidance: bool, like: torch.dtype = torch.float32) -> tuple[Tensor, Conditioning]:
    size, references, words = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x, *looked_at = (torch.randn(3, 12, *s, generator=generator, dtype=like) for s in (size, *references))
    tokens = torch.randn(3, words, 20, generator=generator, dtype=like)
    scale = SCALE.to(like) if guidance else None
    return x, Conditioning(tokens=tokens, references=tuple(looked_at) or None, guidance=scale)


def as_the_pipeline(theirs: Any, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
    """The reference network under the ids, packing and scales of its own pipeline; (B, C, h, w)."""
    pipeline = diffusers.Flux2Pipeline
    ids, packed = pipeline._prepare_latent_ids(x), pipeline._pack_latents(x)
    if told.references:
        looked_at = [reference[:1] for reference in told.references]
        ids = torch.cat([ids, pipeline._prepare_image_ids(looked_at).repeat(len(x), 1, 1)], dim=1)
        packed = torch.cat([packed, *map(pipeline._pack_latents, told.references)], dim=1)
    found = theirs(
        hidden_states=packed,
        timestep=t / 1000,
        guidance=told.guidance,
        encoder_hidden_states=told.tokens,
        txt_ids=pipeline._prepare_text_ids(told.tokens),
        img_ids=ids,
        return_dict=False,
    )[0]
    size = x.shape[-2] * x.shape[-1]
    return pipeline._unpack_latents_with_ids(found[:, :size], ids[:, :size])


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("shape", CASES)
def test_equals_reference(name: str, shape: str) -> None:
    theirs, ours = pair(VARIANTS[name])
    x, told = case(shape, ours.config.guidance_embeds)
    with torch.no_grad():
        found, expected = ours(x, TIME, told), as_the_pipeline(theirs, x, TIME, told)
    assert found.shape == (3, ours.out_channels, *x.shape[-2:])
    assert relative(found, expected) < 2e-6


def test_gradients_equal_reference() -> None:
    theirs, ours = (module.double() for module in pair({}))
    x, told = case("two references", guidance=True, like=torch.float64)
    as_the_pipeline(theirs, x, TIME, told).square().mean().backward()
    ours(x, TIME, told).square().mean().backward()
    assert gradient_error(ours, theirs) < 1e-6  # both turn queries and keys in float32


@pytest.mark.parametrize(
    ("config", "count"),
    [(flux2_dev(), 32_223_281_152), (klein_4b(), 3_875_544_576), (klein_9b(), 9_078_581_248)],
    ids=["dev", "klein 4B", "klein 9B"],
)
def test_published_sizes(config: Flux2Config, count: int) -> None:
    written = write_config(config, "Flux2Transformer2DModel")
    assert Flux2Config.from_config(written) == config
    with torch.device("meta"):
        network, theirs = Flux2(config), diffusers.Flux2Transformer2DModel.from_config(written)
    assert sum(p.numel() for p in network.parameters()) == count
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (network, theirs)]
    assert shapes[0] == shapes[1]


def test_training_after_inference_mode() -> None:
    """The position table is made once: under inference mode it must still serve training."""
    _, network = pair({})
    x, told = torch.randn(1, 12, 5, 7), Conditioning(tokens=torch.randn(1, 2, 20), guidance=SCALE[:1])
    with torch.inference_mode():
        network(x, TIME[:1], told)
    network(x, TIME[:1], told).mean().backward()


def test_a_network_without_distilled_guidance_reads_no_scale() -> None:
    _, ours = pair({"guidance_embeds": False})
    x, told = case("square", guidance=False)
    with torch.no_grad():
        assert torch.equal(ours(x, TIME, told), ours(x, TIME, case("square", guidance=True)[1]))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("tokens", Conditioning(guidance=SCALE)),
        ("guidance", Conditioning(tokens=torch.zeros(3, 1, 20))),
        ("mask", Conditioning(tokens=torch.zeros(3, 1, 20), mask=torch.ones(3, 1, dtype=torch.bool))),
        ("concat", Conditioning(tokens=torch.zeros(3, 1, 20), concat=torch.zeros(3, 1, 6, 6))),
        ("skip", Conditioning(tokens=torch.zeros(3, 1, 20), skip=(1,))),
    ],
)
def test_missing_and_useless_conditioning_is_named(part: str, told: Conditioning) -> None:
    _, network = pair({})
    with pytest.raises(ValueError, match=part):
        network(torch.zeros(3, 12, 6, 6), TIME, told)


@pytest.mark.parametrize(
    ("key", "value"),
    [("patch_size", 2), ("axes_dims_rope", (4, 4, 4)), ("axes_dims_rope", (3, 5, 4, 4)), ("layers", 3)],
)
def test_what_cannot_be_built_is_named(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key):
        Flux2(Flux2Config.from_config({**SMALL, key: value}))

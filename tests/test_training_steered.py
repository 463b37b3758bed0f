"""A backbone with text encoders that train: what it computes is what generation computes, and gradients go through."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import relative
from reference_adapters import loaded, sd1, sd35, sdxl
from torch import Tensor

import mezzotint as mz
from mezzotint.conditioning import Conditioning
from mezzotint.families.steering import steering
from mezzotint.training.steered import Steered

pytest.importorskip("diffusers")

FAMILIES = {"sd1": sd1, "sdxl": sdxl, "sd35": sd35}
PROMPTS = ["a crack on the cell", "", "the dark area", "a crack on the cell"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steered")


def network(model: mz.Model) -> Steered:
    assert model.text is not None
    return Steered(model.backbone, model.text)


def noisy(model: mz.Model) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, model.codec.channels, 8, 8, generator=generator), torch.tensor([1.0, 300.0, 600.0, 990.0])


def cached(model: mz.Model) -> Conditioning:
    """A row for every prompt, encoded once; no prompt is zeros for the family that was trained so."""
    text = model.text
    assert text is not None
    rows = text.encode(list(dict.fromkeys(PROMPTS))).map(lambda part: part[torch.tensor([0, 1, 2, 0])])
    nothing = text.empty()
    for name in ("tokens", "pooled"):
        row, none = getattr(rows, name), getattr(nothing, name)
        if row is not None and text.stands_for_nothing == "zeros":
            row[1] = none[0]
        elif row is not None:
            assert relative(row[1], none[0]) < 1e-6
    return rows


def told(model: mz.Model) -> Conditioning:
    """What else the family's backbone wants to be told."""
    names = model.contract.picture
    return Conditioning(time_ids=torch.full((4, len(names)), 32.0) if names else None)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_read_anew_give_what_cached_rows_give_to_the_bit(place: Path, name: str) -> None:
    model = loaded(FAMILIES[name](place))
    x, t = noisy(model)
    rows = cached(model)
    steered = network(model).train()  # nothing in it drops out
    with torch.no_grad():
        expected = model.backbone(x, t, replace(told(model), tokens=rows.tokens, mask=rows.mask, pooled=rows.pooled))
        assert torch.equal(steered(x, t, told(model), PROMPTS), expected)
        assert not torch.equal(steered(x, t, told(model), PROMPTS[1:] + PROMPTS[:1]), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_prompt_is_what_generation_puts_against_one(place: Path, name: str) -> None:
    from mezzotint.training.steered import spoken

    model = loaded(FAMILIES[name](place))
    request = mz.Request(prompt="a crack on the cell", width=32, height=32)
    positive, negative = steering(model, [request], 3.0, (32, 32))
    assert negative is not None and model.text is not None
    found = spoken(model.text, [request.prompt, ""])
    for part in ("tokens", "pooled"):
        rows = getattr(found, part)
        if rows is not None:
            assert torch.equal(rows[:1], getattr(positive, part)) and torch.equal(rows[1:], getattr(negative, part))
    assert model.text.stands_for_nothing == ("zeros" if name == "sdxl" else "encoded")


def test_a_copy_speaks_with_its_own_networks(place: Path) -> None:
    model = loaded(sdxl(place))
    steered = network(model)
    twin = copy.deepcopy(steered)
    mine, its = steered.text, twin.text
    assert mine.networks.keys() == its.networks.keys() == {"text_encoder", "text_encoder_2"}
    assert all(mine.networks[folder] is net for folder, net in (model.text.networks if model.text else {}).items())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    before, after = mine.encode(PROMPTS).tokens, its.encode(PROMPTS).tokens
    assert before is not None and after is not None and (before - after).abs().max() > 1e-2
    x, t = noisy(model)
    with torch.no_grad():
        assert not torch.equal(steered(x, t, told(model), PROMPTS), twin(x, t, told(model), PROMPTS))
    assert its.clips[0].vocabulary is mine.clips[0].vocabulary  # pyright: ignore[reportAttributeAccessIssue]
    assert {name.split(".")[0] for name, _ in steered.named_parameters()} == {"backbone", "text"}
    assert any(name.startswith("text.text_encoder_2.text_model.") for name, _ in steered.named_parameters())


def test_gradients_reach_a_text_encoder_that_asks_for_them_and_no_other(place: Path) -> None:
    model = loaded(sdxl(place))
    steered = copy.deepcopy(network(model))
    weight = dict(steered.named_parameters())["text.text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.weight"]
    x, t = noisy(model)
    assert not steered(x, t, told(model), PROMPTS).requires_grad  # frozen networks build no graph
    weight.requires_grad_(True)
    steered(x, t, told(model), PROMPTS).square().mean().backward()
    assert [n for n, p in steered.named_parameters() if p.grad is not None] == [
        "text.text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.weight"
    ]
    assert weight.grad is not None and weight.grad.abs().max() > 0
    steered.zero_grad()
    steered(x, t, told(model), [""] * 4).square().mean().backward()
    assert weight.grad is not None and not weight.grad.any()  # zeros stand for nothing: no way back to the encoder


def test_adapters_that_peft_put_into_an_encoder_are_read(place: Path) -> None:
    peft = pytest.importorskip("peft")
    model = loaded(sd1(place))
    steered = copy.deepcopy(network(model))
    inner = steered.text.networks["text_encoder"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), inner)
    x, t = noisy(model)
    plain = network(model)(x, t, told(model), PROMPTS)
    assert torch.equal(steered(x, t, told(model), PROMPTS), plain)  # up is zero
    for name, parameter in steered.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            parameter.data.normal_()
    changed = steered(x, t, told(model), PROMPTS)
    assert (changed - plain).abs().max() > 1e-4
    changed.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in steered.named_parameters() if "lora_A" in n)

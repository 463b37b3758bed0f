"""Recipes: read, overridden, refused with the nearest valid name, written back to the same thing."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from training_parts import full_recipe, vae_recipe

from mezzotint.errors import InputError
from mezzotint.training import recipe

MINIMAL = """
method = "full"
steps = 3
batch = 4
[data]
folder = "train"
size = [16, 16]
[backbone]
name = "unet"
config = { block_out_channels = [16, 32], "odd key" = "ü\\n" }
"""


def file(tmp_path: Path, content: str = MINIMAL, name: str = "small.toml") -> Path:
    path = tmp_path / name
    path.write_text(content)
    return path


def test_defaults_overrides_and_place(tmp_path: Path) -> None:
    plan = recipe.read(file(tmp_path), ["optimiser.rate=2e-3", "data.flips=['vertical']", "out=elsewhere", "seed = 7"])
    assert (plan.out, plan.optimiser.rate, plan.data.flips, plan.seed) == ("elsewhere", 2e-3, ["vertical"], 7)
    assert recipe.read(file(tmp_path)).out == "runs/small"
    assert recipe.read(file(tmp_path)).data.flips == []  # orientation matters unless someone says otherwise


@pytest.mark.parametrize("make", [full_recipe, vae_recipe])
def test_the_resolved_recipe_reads_back_equal(tmp_path: Path, make: object) -> None:
    plan = recipe.check(make(tmp_path), "test")  # type: ignore[operator]
    again = recipe.read(file(tmp_path, recipe.to_toml(plan), "resolved.toml"))
    assert again.model_dump() == plan.model_dump()


def test_awkward_strings_survive_toml(tmp_path: Path) -> None:
    plan = recipe.read(file(tmp_path))
    assert plan.backbone is not None and plan.backbone.config["odd key"] == "ü\n"
    assert recipe.check(tomllib.loads(recipe.to_toml(plan)), "test").model_dump() == plan.model_dump()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", "unknown key stepz (nearest valid name: steps)"),
        ("data.flip=['vertical']", "unknown key data.flip (nearest valid name: flips)"),
        ("rate=1e-3", "unknown key rate: it belongs into [optimiser], as optimiser.rate"),
        ("optimizer.rate=1e-3", "unknown key optimizer (nearest valid name: optimiser)"),
        ("method=lora", "method 'lora' needs a [base] table."),
        ("method=textual-inversion", "method 'textual-inversion' needs a [base] table."),
        ("method=ful", "method:"),
        ("steps=0", "steps: input should be greater than or equal to 1, found 0"),
        ("steps=many", "steps: input should be a valid integer"),
        ("data.flips=['diagonal']", "data.flips.0:"),
        ("accumulation=3", "batch 4 must be a multiple of accumulation 3"),
        ("ema.decay=1.0", "ema.decay:"),
        ("optimiser.rate=nan", "optimiser.rate:"),
        ("steps", "--set takes key=value"),
        ("steps.many=3", "'steps' is a value, not a table"),
    ],
)
def test_pain_09_wrong_keys_and_values_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        recipe.read(file(tmp_path), [override])
    assert message in str(caught.value)
    assert str(caught.value).count("\n") <= 1


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe"):
        recipe.read(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="not valid TOML"):
        recipe.read(file(tmp_path, "method = "))
    with pytest.raises(InputError, match=r"data is missing|steps is missing"):
        recipe.read(file(tmp_path, 'method = "full"'))
    with pytest.raises(InputError, match=r"needs a \[vae\] table"):
        recipe.read(file(tmp_path), ["method=vae"])


def test_changes_name_key_and_both_values(tmp_path: Path) -> None:
    one, two = recipe.read(file(tmp_path)), recipe.read(file(tmp_path), ["data.channels=1", "checkpoints.keep=9"])
    assert recipe.changes(one, two) == ["data.channels: 3 in the checkpoint, 1 in the recipe"]

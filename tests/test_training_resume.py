"""A run killed at any moment and resumed ends with the weights of one that was never stopped, bit for bit."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_nursery import Nursery, nursery, regression_recipe
from training_parts import full_recipe, image_folder, vae_recipe

from mezzotint.errors import InputError
from mezzotint.training import loop, metrics, recipe, state


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("words")) as found:
        yield found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything in the last checkpoint: weights, average, optimiser state."""
    last = state.newest(folder / loop.CHECKPOINTS)
    assert last is not None
    return {f"{path.name}/{k}": v for path in sorted(last.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same(a: Path, b: Path) -> None:
    ours, theirs = tensors(a), tensors(b)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 30
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("make", [full_recipe, vae_recipe, regression_recipe], ids=["full", "vae", "frozen"])
def test_killed_and_resumed_gives_the_same_bits(tmp_path: Path, home: Nursery, make: Any) -> None:
    if make is not regression_recipe:
        image_folder(tmp_path / "train", 10)
    small: dict[str, Any] = {"regression": make is regression_recipe}
    settings: dict[str, Any] = {"steps": 12, "checkpoints": {"every": 3, "keep": 2}}
    home.run(make(tmp_path, "whole", **settings), **small)
    broken = make(tmp_path, "broken", **settings)
    # before the first checkpoint, between two, while one is written, and after one is written but not yet named
    for moment in ("step:2", "step:5", "writing:6", "renaming:9", "step:11"):
        assert home.run(broken, moment, resume=True, **small)[0][0] == -signal.SIGKILL
    assert home.run(broken, resume=True, **small) == [(0, "finished 12")]
    assert_same(tmp_path / "whole", tmp_path / "broken")
    weights = sorted((tmp_path / "whole" / "model").rglob("*.safetensors"))
    assert weights
    for path in weights:
        other = tmp_path / "broken" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes()
    records = [metrics.read(tmp_path / name) for name in ("whole", "broken")]
    # every step once, although most were trained twice
    assert [record["step"] for record in records[1] if "loss" in record] == list(range(1, 13))
    for one, other in zip(*records, strict=True):
        assert {**one, "images_per_second": 0} == {**other, "images_per_second": 0}
    assert not list((tmp_path / "broken" / "checkpoints").glob(".*"))  # nothing half-written is left


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 2, "targets": ["attention"], "text_targets": ["attention"], "dropout": 0.1}},
    "dreambooth": {"dreambooth": {"prompt": "sks", "class_prompt": "cell", "prior_images": 2, "prior_steps": 1}},
    "textual-inversion": {"textual_inversion": {"word": "<x>", "vectors": 2, "initial": "cell", "templates": ["{}"]}},
    "controlnet": {"controlnet": {"condition": "edges"}},
    "lcm": {"lcm": {"guidance": 2.0}, "lora": {"rank": 2}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1 as the reference library writes it, and pictures beside it."""
    pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    from reference_adapters import sd1

    root = tmp_path_factory.mktemp("base")
    image_folder(root / "pictures", 4, size=32)
    return sd1(root)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_after_kill_9_to_the_same_bits(
    tmp_path: Path, home: Nursery, base: Path, method: str
) -> None:
    def plan(out: str) -> dict[str, Any]:
        return {
            "method": method, "out": str(tmp_path / out), "base": {"path": str(base)}, "steps": 4, "batch": 2,
            "data": {"folder": str(base.parent / "pictures"), "size": [32, 32]}, "threads": 1, "log_every": 1,
            "optimiser": {"rate": 1e-2}, "ema": {"decay": 0.5}, "checkpoints": {"every": 2}, **METHODS[method],
        }  # fmt: skip

    assert home.run(plan("whole")) == [(0, "finished 4")]
    assert home.run(plan("broken"), "step:3")[0][0] == -signal.SIGKILL
    half = tensors(tmp_path / "broken")
    assert home.run(plan("broken"), resume=True) == [(0, "finished 4")]
    ours, theirs = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert ours.keys() == theirs.keys() == half.keys() and ours
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert any(not torch.equal(half[name], value) for name, value in theirs.items() if ".optimiser" not in name)
    files = sorted(path for path in (tmp_path / "whole" / "model").rglob("*.safetensors"))
    assert files and all(
        load_file(path).keys() == load_file(tmp_path / "broken" / path.relative_to(tmp_path / "whole")).keys()
        and all(
            torch.equal(value, load_file(tmp_path / "broken" / path.relative_to(tmp_path / "whole"))[name])
            for name, value in load_file(path).items()
        )
        for path in files
    )


@pytest.mark.parametrize("moment", ["interrupt:3", "impatient:3"])  # during a step, and while that step is saved
def test_pain_21_ctrl_c_saves_once_and_completely(tmp_path: Path, home: Nursery, moment: str) -> None:
    plan = regression_recipe(tmp_path, checkpoints={"every": 3}, validation={"every": 1000}, steps=50)
    assert home.run(plan, moment, regression=True) == [(0, "stopped 3")]
    kept = state.complete(tmp_path / "run" / loop.CHECKPOINTS)
    assert [path.name for path in kept] == ["step-00000003"]
    assert state.facts(kept[0])["step"] == 3  # digests hold
    assert not (tmp_path / "run" / loop.MODEL).exists()
    assert not list((tmp_path / "run" / loop.CHECKPOINTS).glob(".*"))


def test_pain_21_a_resumed_addition_goes_on_learning(tmp_path: Path, home: Nursery) -> None:
    """Neither back at its start, nor frozen, nor with moments that began anew."""
    home.run(regression_recipe(tmp_path), "step:5", regression=True)
    stopped = tensors(tmp_path / "run")
    assert home.run(regression_recipe(tmp_path), resume=True, regression=True) == [(0, "finished 6")]
    ended = tensors(tmp_path / "run")
    moving = [name for name in stopped if not name.endswith(".step") and "spare" not in name]
    assert all(not torch.equal(stopped[name], ended[name]) for name in moving) and len(moving) == 28
    steps = {name: (int(stopped[name]), int(ended[name])) for name in stopped if name.endswith(".step")}
    assert set(steps.values()) == {(4, 6)}


def test_full_disk_is_named_and_the_last_checkpoint_stays(tmp_path: Path, home: Nursery) -> None:
    plan = regression_recipe(tmp_path, checkpoints={"every": 3})
    home.run({**plan, "out": str(tmp_path / "whole")}, regression=True)
    assert home.run(plan, "step:4", regression=True)[0][0] == -signal.SIGKILL
    before = {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoints/step-00000003").iterdir()}
    # the optimiser's file is the largest: a checkpoint is cut short, after others of its files
    largest = len(before["network.optimiser.safetensors"]) - 1
    _, said = home.run({**plan, "previews": {"every": 0}}, f"largest:{largest}", resume=True, regression=True)[0]
    assert said.startswith("InputError: cannot write the checkpoint"), said
    assert "step-00000003 is complete" in said
    assert said.count("\n") == 1
    # and where nothing can be written at all, the records meet it first
    _, said = home.run(plan, "full:5", resume=True, regression=True)[0]
    assert said.startswith("InputError: cannot write into") and "File too large" in said, said
    assert "step-00000003 is complete; free space, then --resume" in said.replace("\n", " ")
    after = {p.name: p.read_bytes() for p in (tmp_path / "run/checkpoints/step-00000003").iterdir()}
    assert after == before
    assert home.run(plan, resume=True, regression=True) == [(0, "finished 6")]
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_resume_refuses_what_changed(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, steps=3)
    loop.train(recipe.check(plan, "test"))
    with pytest.raises(InputError, match="holds a run already"):
        loop.train(recipe.check(plan, "test"))
    changed = {**plan, "optimiser": {"rate": 5e-4}}
    with pytest.raises(InputError, match=r"optimiser.rate: 0.0001 in the checkpoint, 0.0005 in the recipe"):
        loop.train(recipe.check(changed, "test"), resume=True)
    (tmp_path / "train" / "0.png").write_bytes((tmp_path / "train" / "2.png").read_bytes())
    # the cache notices the data first
    with pytest.raises(InputError, match="was made with data"):
        loop.train(recipe.check(plan, "test"), resume=True)
    for path in (tmp_path / "run" / "cache").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="its data had digest"):
        loop.train(recipe.check(plan, "test"), resume=True)


def test_two_runs_cannot_train_in_one_folder(tmp_path: Path, home: Nursery) -> None:
    image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, steps=2)
    inside: list[list[tuple[int, str]]] = []
    watch = loop.Watch(step=lambda step, total, loss: inside.append(home.run(plan, resume=True)) if step == 1 else None)
    loop.train(recipe.check(plan, "test"), watch=watch)
    assert inside[0][0][1].startswith("InputError: another process is training in")


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 6)
    plan = recipe.check(full_recipe(tmp_path, steps=3), "test")
    loop.train(plan)
    path = tmp_path / "run/checkpoints/step-00000003/ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"ema.safetensors is damaged"):
        loop.train(plan, resume=True)

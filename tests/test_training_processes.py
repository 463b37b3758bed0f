"""Two processes, copied or sharded, walk the path of one; where one of them fails, none is left waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_nursery import Nursery, nursery, regression_recipe
from training_parts import UNET, full_recipe, image_folder, vae_recipe

from mezzotint.training import loop, metrics, recipe, state

STRATEGIES = ("ddp", "fsdp2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    with nursery(tmp_path_factory.mktemp("words")) as found:
        yield found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    last = state.newest(folder / loop.CHECKPOINTS)
    assert last is not None
    return {f"{path.name}/{k}": v for path in sorted(last.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_close(one: Path, several: Path) -> None:
    """The same curve, and the same weights, average and moments to rounding."""
    curves = [[record for record in metrics.read(folder)] for folder in (one, several)]
    assert len(curves[0]) == len(curves[1]) > 3
    for ours, theirs in zip(*curves, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"images_per_second"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5), (ours["step"], key)
    ours, theirs = tensors(one), tensors(several)
    assert ours.keys() == theirs.keys()
    for name in ours:
        difference = (ours[name] - theirs[name]).norm() / ours[name].norm().clamp_min(1e-6)
        assert difference < 1e-3, (name, float(difference))


def small(root: Path, out: str, **changes: Any) -> dict[str, Any]:
    """The full method with everything on the way: classes, masks, dropout, validation, previews."""
    data = full_recipe(root)["data"] | {"validation": str(root / "train")}
    plan = full_recipe(root, out, steps=6, data=data, backbone={"name": "unet", "config": UNET})
    plan |= {"optimiser": {"rate": 1e-3}, "validation": {"every": 3, "images": 4, "bands": 2}}
    return plan | {"previews": {"every": 3, "count": 2, "steps": 2}} | changes


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process, in as many pieces as two have."""
    root = tmp_path_factory.mktemp("full")
    image_folder(root / "train", 10)
    loop.train(recipe.check(small(root, "one", accumulation=2), "test"))
    return root


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one(alone: Path, home: Nursery, strategy: str) -> None:
    ended = home.run(small(alone, strategy, parallel=strategy), processes=2)
    assert ended == [(0, "finished 6")] * 2
    assert_close(alone / "one", alone / strategy)
    ours, theirs = (load_file(next((alone / out / "model").glob("unet/*.safetensors"))) for out in ("one", strategy))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    drawn = [sorted(path.name for path in (alone / out / loop.SAMPLES).iterdir()) for out in ("one", strategy)]
    assert drawn[0] == drawn[1] == ["step-00000003.png", "step-00000006.png"]


@pytest.mark.parametrize(("strategy", "decay"), [("ddp", 0.9), ("fsdp2", 0.9), ("fsdp2", 0.0)])
def test_frozen_and_idle_weights_do_not_disturb(tmp_path: Path, home: Nursery, strategy: str, decay: float) -> None:
    """As with a LoRA: most is frozen, and some of what trains gets no gradient; two pieces in each process."""
    changes: dict[str, Any] = {"batch": 8, "ema": {"decay": decay}}
    home.run(regression_recipe(tmp_path, "one", accumulation=4, **changes), regression=True)
    plan = regression_recipe(tmp_path, "two", parallel=strategy, accumulation=2, **changes)
    assert home.run(plan, processes=2, regression=True) == [(0, "finished 6")] * 2
    assert_close(tmp_path / "one", tmp_path / "two")
    assert not any("base" in name for name in tensors(tmp_path / "two"))
    ours, theirs = (load_file(tmp_path / out / "model/network.safetensors") for out in ("one", "two"))
    assert torch.equal(ours["base.weight"], theirs["base.weight"])
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_low_rank_addition_trains_as_in_one_process(alone: Path, home: Nursery, strategy: str) -> None:
    pytest.importorskip("peft")
    plan = full_recipe(alone, strategy + "-lora", method="lora", steps=5, optimiser={"rate": 1e-2}, lora={"rank": 4})
    plan |= {"base": {"path": str(alone / "one/model")}, "parallel": strategy}
    for table in ("backbone", "process"):
        del plan[table]
    one = plan | {"out": str(alone / "one-lora"), "accumulation": 2}
    if not (alone / "one-lora").exists():
        assert home.run(one) == [(0, "finished 5")]
    assert home.run(plan, processes=2) == [(0, "finished 5")] * 2
    assert_close(alone / "one-lora", alone / (strategy + "-lora"))
    path = "model/pytorch_lora_weights.safetensors"
    ours, theirs = (load_file(alone / out / path) for out in ("one-lora", strategy + "-lora"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)
    assert max(float(tensor.abs().max()) for name, tensor in ours.items() if "lora_B" in name) > 1e-3  # it learned


def test_two_players_train_as_one_process_does(tmp_path: Path, home: Nursery) -> None:
    """An autoencoder against a discriminator that joins on the way: copied; to shard both is refused."""
    image_folder(tmp_path / "train", 6)
    home.run(vae_recipe(tmp_path, "one", accumulation=2, steps=7, optimiser={"rate": 1e-3}))
    plan = vae_recipe(tmp_path, "two", steps=7, optimiser={"rate": 1e-3})
    assert home.run(plan, processes=2) == [(0, "finished 7")] * 2
    assert_close(tmp_path / "one", tmp_path / "two")
    ended = home.run({**plan, "out": str(tmp_path / "three"), "parallel": "fsdp2"}, processes=2)
    assert all("fsdp2 shards one network, and here train autoencoder, discriminator" in said for _, said in ended)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, home: Nursery) -> None:
    """Two shards, one of them killed, then one process, then two again: the run that was never stopped."""
    home.run(regression_recipe(tmp_path, "one"), regression=True)
    plan = regression_recipe(tmp_path, "two", parallel="fsdp2")
    began = time.monotonic()
    main, killed = home.run(plan, "step:3", where=1, processes=2, regression=True)
    assert killed[0] == -signal.SIGKILL and time.monotonic() - began < 30
    assert main[1].startswith("InputError: another process of this run has ended"), main
    assert home.run(plan, "step:5", resume=True, regression=True)[0][0] == -signal.SIGKILL
    assert home.run(plan, resume=True, processes=2, regression=True) == [(0, "finished 6")] * 2
    assert_close(tmp_path / "one", tmp_path / "two")


def test_a_loss_that_breaks_in_one_process_stops_all(tmp_path: Path, home: Nursery) -> None:
    plan = regression_recipe(tmp_path)
    (tmp_path / "train/broken-3").write_text("2")  # the second process's
    ended = home.run(plan, processes=2, regression=True)
    assert [code for code, _ in ended] == [0, 0]
    for _, said in ended:
        assert said.startswith("InputError: the loss is nan at step 3; the batch was image 2, image 3."), said
    (tmp_path / "train/broken-3").unlink()
    assert home.run(plan, resume=True, processes=2, regression=True) == [(0, "finished 6")] * 2


def test_ctrl_c_in_one_process_stops_all_after_the_same_step(tmp_path: Path, home: Nursery) -> None:
    plan = regression_recipe(tmp_path, steps=50, checkpoints={"every": 1000})
    ended = home.run(plan, "interrupt:3", where=1, processes=2, regression=True)
    assert ended == [(0, "stopped 4")] * 2
    assert [path.name for path in state.complete(tmp_path / "run" / loop.CHECKPOINTS)] == ["step-00000004"]


def test_a_full_disk_of_the_main_process_stops_all(tmp_path: Path, home: Nursery) -> None:
    plan = regression_recipe(tmp_path)
    main, other = home.run(plan, "full:3", processes=2, regression=True)
    assert "File too large" in main[1] and "step-00000002 is complete" in main[1], main
    assert other[1].startswith("InputError: the main process stopped: ") and "File too large" in other[1], other
    assert home.run(plan, resume=True, processes=2, regression=True) == [(0, "finished 6")] * 2


def test_what_several_processes_cannot_do_is_said(tmp_path: Path, home: Nursery) -> None:
    ended = home.run(regression_recipe(tmp_path, batch=3), processes=2, regression=True)
    assert all("batch 3 must be a multiple of accumulation x processes, 1 x 2" in said for _, said in ended)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_launchers_start_it(alone: Path, launcher: str) -> None:
    """The commands as documented, in processes of their own."""
    out = alone / launcher
    path = alone / f"{launcher}.toml"
    path.write_text(recipe.to_toml(recipe.check(small(alone, launcher, parallel="fsdp2", steps=3), "test")))
    tools = Path(sys.executable).parent
    start = {
        "torchrun": [str(tools / "torchrun"), "--standalone", "--nproc-per-node", "2"],
        "accelerate": [str(tools / "accelerate"), "launch", "--cpu", "--num_processes", "2", "--main_process_port=0"],
    }[launcher]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*start, "-m", "mezzotint", "train", str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = ([r["loss"] for r in metrics.read(f) if "loss" in r][:3] for f in (alone / "one", out))
    assert theirs[:2] == pytest.approx(ours[:2], rel=1e-5)  # the third's rate differs: fewer steps
    assert (out / "model/model_index.json").exists()

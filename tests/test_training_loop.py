"""The loop against a plain one written out by hand, and what it promises whatever the method."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training_nursery import Network, Regression, regression_recipe

from mezzotint.errors import InputError
from mezzotint.training import draws, ema, loop, metrics, recipe, state, weights
from mezzotint.training.methods import Place

FROZEN = {"base.weight", "base.bias"}


@pytest.fixture(autouse=True)
def _regression(monkeypatch: pytest.MonkeyPatch) -> list[Regression]:
    made: list[Regression] = []

    def make(plan: recipe.Recipe, place: Place) -> Regression:
        made.append(Regression(plan, place))
        return made[-1]

    monkeypatch.setattr(loop, "method", make)
    return made


def train(plan: dict[str, Any], resume: bool = False) -> loop.Outcome:
    return loop.train(recipe.check(plan, "test"), resume)


def by_hand(plan: dict[str, Any]) -> tuple[Network, dict[str, torch.Tensor], list[float]]:
    """Six steps of plain PyTorch: network, its moving average, losses."""
    torch.manual_seed(draws.number(0, 0, "start"))
    job = Regression(recipe.check(plan, "test"), Place(Path(), torch.device("cpu"), lambda *_: None))
    network = job.trained["network"]
    assert isinstance(network, Network)
    named = {name: p for name, p in network.named_parameters() if name not in FROZEN}
    groups = []
    for name, p in named.items():
        share = {"head.weight": 0.25, "head.bias": 3.0}.get(name, 1.0)
        decay = 0.1 if name in ("down.weight", "up.weight", "head.weight", "spare.weight") else 0.0
        groups.append({"params": [p], "weight_decay": decay, "share": share})
    optimiser = torch.optim.AdamW(groups, lr=1.0, foreach=False, fused=False)
    average = {name: p.detach().clone() for name, p in named.items()}
    losses = []
    for step in range(6):
        batch = job.draw(step)
        total = 0.0
        for index in range(2):
            torch.manual_seed(draws.number(0, step, f"network {index}"))
            loss, _ = job.loss({key: value[2 * index : 2 * index + 2] for key, value in batch.items()}, step)
            (loss / 2).backward()
            total += loss.item() / 2
        losses.append(total)
        torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        rate = 0.02 * (0.5 if step == 0 else 1.0 if step == 1 else (1 + math.cos(math.pi * (step - 2) / 4)) / 2)
        for group in optimiser.param_groups:
            group["lr"] = rate * group["share"]
        optimiser.step()
        optimiser.zero_grad()
        d = min(0.9, (1 + step) / (10 + step))
        average = {name: d * average[name] + (1 - d) * p.detach() for name, p in named.items()}
    return network, average, losses


def test_the_loop_is_the_plain_one(tmp_path: Path) -> None:
    """Pieces, clipping, rates by name, decay of matrices that the method does not spare, and the average."""
    plan = regression_recipe(tmp_path, accumulation=2)
    train(plan)
    network, average, losses = by_hand(plan)
    last = tmp_path / "run/checkpoints/step-00000006"
    ours, mean = load_file(last / "network.safetensors"), load_file(last / "ema.safetensors")
    assert ours.keys() == mean.keys() == average.keys()
    for name, p in network.named_parameters():
        if name in FROZEN:
            continue
        assert torch.allclose(ours[name], p.detach(), rtol=1e-5, atol=1e-7), name
        assert torch.allclose(mean[name], average[name], rtol=1e-5, atol=1e-7), name
    assert (ours["rows.weight"] - mean["rows.weight"]).abs().max() > 1e-3  # it moved
    records = [record for record in metrics.read(tmp_path / "run") if "loss" in record]
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-6)
    assert {"gradient/network", "loss/first"} <= records[0].keys()
    saved = load_file(tmp_path / "run/model/network.safetensors")
    assert torch.equal(saved["up.weight"], mean["up.weight"])
    torch.manual_seed(draws.number(0, 0, "start"))
    assert torch.equal(saved["base.weight"], Network().base.weight)


def test_a_checkpoint_holds_what_trains(tmp_path: Path) -> None:
    train(regression_recipe(tmp_path, steps=2))
    last = tmp_path / "run/checkpoints/step-00000002"
    trained = {name for name, _ in Network().named_parameters()} - FROZEN
    assert load_file(last / "network.safetensors").keys() == trained
    moments = load_file(last / "network.optimiser.safetensors").keys()
    used = {name for name in trained if not name.startswith("spare")}  # without a gradient there are no moments
    assert moments == {f"{name}.{entry}" for name in used for entry in ("exp_avg", "exp_avg_sq", "step")}


def test_tied_weights_and_buffers_are_kept_once_and_where_they_move() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    network[1].weight = network[0].weight
    network[2].register_buffer("computed", torch.zeros(1), persistent=False)
    names = {"0.weight", "0.bias", "1.bias", "2.weight", "2.bias"}
    buffers = {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert state.trained(network).keys() == names | buffers
    assert state.same(copy.deepcopy(network), names | buffers).keys() == names | buffers
    network[0].bias.requires_grad_(False)
    assert state.trained(network).keys() == names - {"0.bias"}


def test_the_average_takes_memory_for_what_trains_alone() -> None:
    network = Network()
    average = ema.follow(network)
    pairs = zip(average.named_parameters(), network.parameters(), strict=True)
    assert {name for (name, mine), theirs in pairs if mine.data_ptr() == theirs.data_ptr()} == FROZEN
    assert dict(average.named_buffers())["statistic"] is network.statistic
    before = network.base.weight.clone()
    with torch.no_grad():
        network.up.weight.add_(1.0)
    ema.update(average, network, 0, 0.75, warmup=False)
    assert torch.allclose(average.up.weight, network.up.weight - 0.75)  # type: ignore[union-attr]
    assert torch.equal(network.base.weight, before)


def test_without_an_average_the_network_itself_is_judged_and_saved(
    tmp_path: Path, _regression: list[Regression]
) -> None:
    plan = regression_recipe(tmp_path, ema={"decay": 0.0}, accumulation=2)
    train(plan)
    last = tmp_path / "run/checkpoints/step-00000006"
    assert not (last / "ema.safetensors").exists()
    job = _regression[0]
    network = job.trained["network"]
    saved = load_file(tmp_path / "run/model/network.safetensors")
    assert all(torch.equal(saved[name], p) for name, p in network.named_parameters())
    assert network.training and job.followed == []  # dropout is back after it was judged
    record = metrics.read(tmp_path / "run")[-1]
    with ema.at_rest(network):
        assert record["validation"] == pytest.approx(job.validate(network)["validation"], rel=1e-6)
    averaged = train(regression_recipe(tmp_path, "averaged", accumulation=2))
    assert averaged.finished and len(_regression[1].followed) == 1
    assert metrics.read(tmp_path / "averaged")[-1]["loss"] == record["loss"]  # an average changes no step
    assert metrics.read(tmp_path / "averaged")[-1]["validation"] != record["validation"]


def test_pain_13_validation_tells_where_a_run_starts_from(tmp_path: Path) -> None:
    for out, seed in (("run", 0), ("other", 0)):
        train(regression_recipe(tmp_path, out, seed=seed, optimiser={"rate": 0.001 if out == "run" else 0.01}))
    records, others = metrics.read(tmp_path / "run"), metrics.read(tmp_path / "other")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records if "validation" in record] == [0, 3, 6]
    torch.manual_seed(draws.number(0, 0, "start"))
    job = Regression(recipe.check(regression_recipe(tmp_path), "test"), Place(Path(), torch.device("cpu"), print))
    expected = job.validate(job.trained["network"].eval())["validation"]
    assert records[0] == {"step": 0, "validation": pytest.approx(expected, rel=1e-6)}
    assert others[0] == records[0] and others[-1] != records[-1]


def test_an_image_that_breaks_the_loss_is_named_with_its_piece_alone(tmp_path: Path) -> None:
    plan = regression_recipe(tmp_path, accumulation=2)
    (tmp_path / "train/broken-3").write_text("2")
    with pytest.raises(InputError, match=r"the loss is nan at step 3; the batch was image 2, image 3\.\n"):
        train(plan)
    assert state.newest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-00000002"
    (tmp_path / "train/broken-3").unlink()
    assert train(plan, resume=True).finished
    train({**plan, "out": str(tmp_path / "whole")})
    ends = [load_file(tmp_path / out / "model/network.safetensors") for out in ("run", "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


def test_a_launcher_that_shards_and_a_recipe_that_copies_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match='accelerate was told to use FSDP and the recipe says parallel = "ddp"'):
        train(regression_recipe(tmp_path))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train(regression_recipe(tmp_path, parallel="fsdp2")).finished  # one process shards nothing


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = regression_recipe(tmp_path, steps=2)
    train(plan)

    def more(plan: recipe.Recipe, place: Place) -> Regression:
        job = Regression(plan, place)
        job.trained["network"].get_submodule("base").requires_grad_(True)
        return job

    monkeypatch.setattr(loop, "method", more)
    with pytest.raises(InputError, match=r"network.safetensors does not hold what this recipe trains: base.bias"):
        train(plan, resume=True)


def test_the_longest_name_decides() -> None:
    rates = {"network": 1.0, "network.text": 0.5, "network.text.head": 0.1}
    names = {
        "network.x": 1.0,
        "network.text.a.weight": 0.5,
        "network.text.head.bias": 0.1,
        "network.texture": 1.0,
        "other": 1.0,
    }
    assert {name: weights.nearest(rates, name) for name in names} == names


def test_buckets_take_turns_and_visit_every_image() -> None:
    for step in range(12):
        bucket, index = draws.bucketed(5, step, 4, [10])
        assert bucket == 0 and torch.equal(index, draws.shuffled(5, step, 4, 10))
    counts, batch = [10, 0, 2, 8], 4
    rounds = [[draws.bucketed(5, step, batch, counts) for step in range(6 * k, 6 * k + 6)] for k in range(4)]
    for turn in rounds:  # ceil(n / 4) batches of each, in an order of its own
        assert Counter(bucket for bucket, _ in turn) == {0: 3, 2: 1, 3: 2}
    assert len({tuple(bucket for bucket, _ in turn) for turn in rounds}) > 1
    for bucket in (0, 2, 3):
        drawn = torch.cat([index for turn in rounds for b, index in turn if b == bucket])
        assert torch.equal(drawn, torch.cat([draws.shuffled(5 + bucket, k, 4, counts[bucket])
                                             for k in range(len(drawn) // 4)]))  # fmt: skip
        seen = Counter(drawn.tolist())
        assert seen.keys() == set(range(counts[bucket])) and max(seen.values()) - min(seen.values()) <= 1

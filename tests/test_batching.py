"""Runs that share one network step by step: each draws what it draws alone, and the network is called less often."""

from __future__ import annotations

import copy
import gc
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parts import class_model
from reference_adapters import (
    CONSISTENCY,
    JOINT,
    LINEAR,
    TEXT,
    apart,
    file,
    invented,
    learned,
    loaded,
    magnitudes,
    request,
    sd1,
    sd35,
    spelled,
    vectors,
)  # fmt: skip
from torch import Tensor, nn

import mezzotint as mz
from mezzotint.adapters import BACKBONE
from mezzotint.batching import Batcher
from mezzotint.families.adapt import adapted
from mezzotint.generate import generate

SAME = 1e-5  # relative, of the final latents: rounding


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("batching")


class Counted(nn.Module):
    """A network that notes the rows of its calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, list[int]()

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        self.rows.append(len(x))
        return self.network(x, *rest)


def alone(model: mz.Model, wishes: Sequence[mz.Request]) -> tuple[list[Tensor], list[list[int]]]:
    """The latents of each wish, and the rows of its calls."""
    found: list[Tensor] = []
    rows: list[list[int]] = []
    for wish in wishes:
        counted: list[Counted] = []

        def engine(network: nn.Module, counted: list[Counted] = counted) -> Any:
            counted.append(Counted(network))
            return nullcontext(counted[0])

        found.append(generate(model, wish, engine=engine).latents)
        rows.append(counted[0].rows)
    return found, rows


def together(model: mz.Model, wishes: Sequence[mz.Request], most: int = 64) -> tuple[list[Any], Batcher]:
    """The latents of all wishes, or what each came to instead; none is answered before all are walking."""
    batcher = Batcher(model.backbone, most)

    def run(wish: mz.Request) -> Any:
        try:
            return generate(model, wish, engine=batcher).latents
        except Exception as trouble:
            return trouble

    with ThreadPoolExecutor(len(wishes)) as pool:
        with batcher(model.backbone):  # walks and asks nothing, so that the others wait
            runs = [pool.submit(run, wish) for wish in wishes]
            until = time.monotonic() + 60
            while batcher.walking <= len(wishes) and time.monotonic() < until:
                time.sleep(0.001)
        found = [each.result(60) for each in runs]
    batcher.close()
    return found, batcher


def test_labels_steps_samplers_and_guidance_share_batches_and_change_nothing() -> None:
    model = class_model()
    wishes = [
        mz.Request(label=0, seed=1, steps=4),
        mz.Request(label=1, seed=2, steps=7, guidance=3.0, count=2),
        mz.Request(label=2, seed=3, steps=5, sampler="heun", guidance=2.0, guidance_interval=(0.2, 0.7)),
        mz.Request(seed=4, steps=6, sampler="euler_ancestral"),
        mz.Request(label=0, seed=5, steps=3, sampler="dpmpp_2m_karras", guidance=1.5),
    ]
    expected, rows = alone(model, wishes)
    found, batcher = together(model, wishes)
    assert max(map(apart, found, expected)) < SAME
    assert batcher.rows == sum(map(sum, rows)), "nothing is computed twice"
    assert batcher.calls == max(map(len, rows)), "as many calls as the longest run has, and no more"


def test_a_batch_never_exceeds_its_bound_unless_one_run_does() -> None:
    model = class_model()
    wishes = [mz.Request(label=i % 3, seed=i, steps=2, count=1 + i) for i in range(4)]
    expected, _ = alone(model, wishes)
    base = Counted(model.backbone)
    found, _ = together(replace(model, backbone=_passing(model.backbone, base)), wishes, most=3)
    assert max(map(apart, found, expected)) < SAME
    assert [rows for rows in base.rows if rows > 3] == [4, 4] and sum(base.rows) == 20  # two steps of 1, 2, 3 and 4


def _passing(network: nn.Module, counted: Counted) -> nn.Module:
    """The network, whose calls go through a counter."""
    twin = Counted(network)
    twin.forward = counted.forward  # type: ignore[method-assign]
    setattr(twin, "config", getattr(network, "config"))  # noqa: B009, B010
    return twin


@pytest.mark.parametrize(("family", "endings"), [(sd1, (*CONSISTENCY, *TEXT)), (sd35, JOINT)])
def test_different_adapters_share_one_batch(family: Any, endings: Sequence[str], place: Path, tmp_path: Path) -> None:
    model = loaded(family(place))
    parts = (BACKBONE, "text_encoder") if TEXT[0] in endings else (BACKBONE,)
    folder = "unet" if family is sd1 else "transformer"
    files = [
        file(tmp_path / f"{i}.safetensors", spelled(invented(model, endings, parts, seed=i), "diffusers",
                                                    backbone=folder))
        for i in range(2)
    ]  # fmt: skip
    if family is sd1:
        changes = invented(model, LINEAR, seed=2)
        files.append(file(tmp_path / "dora.safetensors", magnitudes(spelled(changes, "kohya"), model, changes)))
    wish = request(model, sampler=None, start_noise=None, steps=3)
    wishes = [
        wish,
        replace(wish, lora=[(files[0], 1.0)], seed=1, steps=2),
        replace(wish, lora=[(files[1], -0.7)], seed=2, guidance=1.0, negative=""),
        replace(wish, lora=[(files[-1], 0.8), (files[0], 0.3)], seed=3, count=2),
    ]
    expected, rows = alone(model, wishes)
    found, batcher = together(model, wishes)
    assert max(map(apart, found, expected)) < SAME
    without, _ = alone(model, [replace(one, lora=()) for one in wishes[1:]])
    assert min(map(apart, expected[1:], without)) > 1e-2, "adapters change what is drawn"
    assert batcher.calls == max(map(len, rows)) and batcher.rows == sum(map(sum, rows))


def test_a_run_that_ends_badly_holds_nobody_up() -> None:
    model = class_model()

    class Stopped(Exception):
        pass

    batcher = Batcher(model.backbone)

    def stop(index: int, *rest: Any) -> None:
        if index == 1:
            raise Stopped

    wishes = [mz.Request(label=i, seed=i, steps=6) for i in range(2)]
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(generate, model, wishes[0], stop, batcher)
        good = pool.submit(generate, model, wishes[1], None, batcher)
        with pytest.raises(Stopped):
            bad.result(60)
        assert apart(good.result(60).latents, alone(model, wishes[1:])[0][0]) < SAME
    batcher.close()
    with pytest.raises(RuntimeError, match="closed"):
        generate(model, wishes[0], engine=batcher)


def test_trouble_in_the_network_reaches_the_runs_that_asked_for_it() -> None:
    model = class_model()

    class Broken(nn.Module):
        def forward(self, *rest: Any) -> Tensor:
            raise ValueError("no memory left")

    found, _ = together(replace(model, backbone=_passing(model.backbone, Counted(Broken()))), [mz.Request(steps=1)] * 2)
    assert all(isinstance(each, ValueError) and "no memory" in str(each) for each in found)


def test_the_same_files_give_the_same_network_until_one_is_written_anew(place: Path, tmp_path: Path) -> None:
    model = replace(loaded(sd1(place)), backbone=copy.deepcopy(loaded(sd1(place)).backbone))
    first = file(tmp_path / "a.safetensors", spelled(invented(model, LINEAR, seed=1), "diffusers"))
    one, same = (adapted(model, [(first, 0.5)]) for _ in range(2))
    assert one.backbone is same.backbone and one.backbone is not adapted(model, [(first, 0.6)]).backbone
    os.utime(first, ns=(1, 1))
    assert adapted(model, [(first, 0.5)]).backbone is not one.backbone
    word = learned(tmp_path / "learned_embeds.safetensors", {"<plate>": vectors(2, 64)})
    assert adapted(model, embedding=[word]).backbone is model.backbone
    other = replace(model, text=copy.deepcopy(model.text))
    assert adapted(other, [(first, 0.5)]).text is not adapted(model, [(first, 0.5)]).text, "an encoder of its own"
    del other
    gone = weakref.ref(model.backbone)
    del model, one, same
    gc.collect()
    assert gone() is None, "what is kept does not keep its base"

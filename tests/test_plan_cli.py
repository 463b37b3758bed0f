"""`mezzotint plan`: what is printed, kept and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mezzotint.cli.main import main
from mezzotint.plan import calibrate, machines, trials, zoo
from mezzotint.plan.machines import Machine, Point
from mezzotint.plan.operators import Call
from mezzotint.plan.training import updates


def said(args: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main(["plan", *args]) == code
    return capsys.readouterr().out


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mezzotint: ") and len(error.splitlines()) <= 2 and "Traceback" not in error
    return error


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_json_holds_every_figure_and_they_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["ddpm-cifar10", "--steps", "3", "--images", "2", "--batch", "2", "--device", "t4", "--price-per-hour", "1"]
    (plan,) = json.loads(said([*args, "--json"], capsys))
    assert plan["model"] == "ddpm-cifar10" and plan["parameters"]["backbone"] == 35_746_307
    assert plan["peak_bytes"] == plan["machine"]["base_bytes"] + max(phase["bytes"] for phase in plan["phases"])
    assert plan["flops"] == sum(phase["flops"] for phase in plan["phases"])
    for phase in plan["phases"]:
        assert phase["bytes"] == pytest.approx(sum(phase["bytes_by_part"].values()))
        assert phase["flops"] == pytest.approx(phase["times"] * sum(phase["flops_by_kind"].values()))
        assert phase["seconds"] == pytest.approx(phase["times"] * sum(phase["seconds_by_kind"].values()))
    assert plan["cost"] == pytest.approx(plan["seconds"] / 3600)
    assert plan["machine"]["measured"] is False and "datasheet" in plan["machine"]["source"]


def test_models_stand_side_by_side_with_their_licences(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    out = said(["ddpm-cifar10", "iddpm-cifar10", "--steps", "2", "--device", "h100", "--html", str(page)], capsys)
    assert out.splitlines()[0].split() == ["model", "job", "parameters", "peak", "in", "work", "time", "licence"]
    assert "not stated" in out and "iddpm-cifar10" in out
    html = page.read_text()
    assert "<script" not in html and "http" not in html.replace("http-equiv", "")
    assert "iddpm-cifar10" in html and "Side by side" in html


def test_the_sums_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(["ddpm-cifar10", "--steps", "2", "--device", "h100", "--explain"], capsys)
    assert "MB backbone + " in out and "2 x (" in out and "operators at 6.0 us" in out


def test_an_unmeasured_processor_has_no_times_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    (plan,) = json.loads(said(["ddpm-cifar10", "--steps", "2", "--json"], capsys))
    assert plan["seconds"] is None and "--calibrate" in plan["machine"]["source"]


def test_a_measured_machine_is_kept_and_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {kernel: [Point((1,), 1e10)] for kernel in (*machines.COMPUTING, *machines.MOVING)}

    def measured(device: str, watch: Any = None) -> Machine:
        return Machine("here", "cpu", 8e9, {"float32": rates}, 1e-5, 0.0, "measured", True)

    monkeypatch.setattr(calibrate, "calibrate", measured)
    (plan,) = json.loads(said(["ddpm-cifar10", "--calibrate", "--steps", "2", "--json"], capsys))
    assert plan["machine"]["measured"] and plan["seconds"] > 0
    found = calibrate.kept("cpu")
    assert found is not None and found.points["float32"]["linear"] == [Point((1,), 1e10)]
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "EDITION", calibrate.EDITION + 1)
        assert calibrate.kept("cpu") is None
    monkeypatch.setattr(calibrate, "key", lambda device: "another torch")
    assert calibrate.kept("cpu") is None


def test_kernels_are_really_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SPENT", 0.001)
    monkeypatch.setattr(trials, "LINEAR", ((1, 8, 16, 32), (4, 8, 16, 32)))
    monkeypatch.setattr(trials, "CONVOLUTION", ((2, 16, 16, 3, 8),))
    monkeypatch.setattr(trials, "ATTENTION", ((2, 16, 16, 64),))
    monkeypatch.setattr(calibrate, "NUMBERS", (1 << 12,))
    monkeypatch.setattr(trials, "UPDATED", (1 << 6,))
    at = torch.device("cpu")
    found = calibrate._measured(at, torch.float32, None, None)
    assert {*machines.COMPUTING, "copying", "other", "norm"} <= found.keys()
    assert {call.name for call in updates(1, ema=True)} <= found.keys()
    assert all(0 < point.rate < 1e14 for points in found.values() for point in points)
    assert 0 < calibrate._overhead(at) < 0.01


def test_passes_over_weights_cost_no_more_in_whole_networks() -> None:
    rates = {kernel: [Point((1,), 1e9)] for kernel in (*machines.COMPUTING, *machines.MOVING)}
    rates["AdamW"] = [Point((1,), 1e10)]
    machine = Machine("here", "cpu", None, {"float32": rates}, 0.0, whole={"forward": 1.5, "backward": 2.0})
    back = Call("convolution_backward", "convolution", "float32", (64, 8, 8, 3), 3e9, 1e6)
    assert machine.seconds({back: 1.0}) == pytest.approx(6.0)
    step = {back: 1.0} | {call: 1.0 for call in updates(10**9, ema=True)}
    assert machine.by_kind(step) == pytest.approx({"update": 4 + 8 + 2.8 + 12, "convolution": 6.0})


def test_a_network_is_measured_against_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    at, rates = torch.device("cpu"), {kernel: [Point((1,), 1e10)] for kernel in (*machines.COMPUTING, *machines.MOVING)}
    machine, found = Machine("here", "cpu", None, {"float32": rates}, 0.0), []
    for spent in (3.0, 6.0):
        monkeypatch.setattr(calibrate, "_seconds", lambda act, at, spent, s=spent: s)
        found.append(calibrate.whole(machine, at))
    for way in ("forward", "backward"):
        assert found[1][way] == pytest.approx(2 * found[0][way])
    assert 2.5 < found[0]["forward"] / found[0]["backward"] < 3.5  # there and back is three times the work


def test_fit_answers_for_each_model(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["ddpm-cifar10", "dit-s/2", "--steps", "2", "--device", "t4", "--fit", "1GB"]
    out = said(args, capsys, code=1)
    assert "ddpm-cifar10, generate: " in out and "GB: fits" in out and "fits with " in out
    ways = json.loads(said([*args, "--json"], capsys, code=1))
    assert [way["fits"] for way in ways] == [True, False]
    assert all(way["peak_bytes"] > 0 for way in ways[1]["ways"])
    said(["ddpm-cifar10", "--steps", "2", "--device", "t4", "--fit", "16GB"], capsys, code=0)


def test_training_methods_stand_side_by_side(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    out = said([str(tiny_folder), "--train", "full", "lora", "--device", "h100", "--batch", "2"], capsys)
    rows = out.splitlines()
    assert len(rows) == 3 and " full " in rows[1] and " lora " in rows[2]
    one = said([str(tiny_folder), "--train", "lora", "--rank", "4", "--steps", "7"], capsys)
    assert "lora: 7 steps of 1" in one and "rank 4" in one


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "name a model"),
        (["sd1.6"], "did you mean 'sd1.5'"),
        (["nothing-like-it"], ", ".join(list(zoo.ZOO)[:3])),
        (["sd1.5", "--size", "large"], "WIDTHxHEIGHT"),
        (["sd1.5", "--size", "500x500"], "use 496x496"),
        (["sd1.5", "--train", "full", "--size", "500x500"], "use 496x496"),
        (["sd1.5", "--price-per-hour", "-1"], "at least 0"),
        (["sd1.5", "--price-per-hour", "nan"], "at least 0"),
        (["sd1.5", "--batch", "0"], "at least 1"),
        (["sd1.5", "--steps", "0"], "at least 1"),
        (["sd1.5", "--fit", "plenty"], "12GiB"),
        (["sd1.5", "--device", "h10"], "did you mean 'h100'"),
        (["sd1.5", "--device", "cuda:99"], "not in this machine"),
        (["sd1.5", "--sampler", "eular"], "did you mean 'euler'"),
        (["sd1.5", "--dtype", "int8"], "dtype"),
        (["sd1.5", "--quant", "int3"], "quant"),
        (["sd1.5", "--train", "laura"], "did you mean 'lora'"),
        (["sd1.5", "--train", "lora", "--quant", "int8"], "--quant is for generating"),
        (["sd1.5", "--train", "lora", "--batch", "4", "--accumulation", "3"], "multiple of accumulation"),
        (["flux2-klein-4b", "--guidance", "4"], "distilled"),
        (["flux2-klein-4b", "--train", "controlnet"], "no control network"),
        (["ddpm-cifar10", "--train", "textual-inversion"], "reads no text"),
        (["ddpm-cifar10", "--train", "vae"], "works on pixels"),
        (["sd1.5", "--prediction", "guess"], "prediction"),
        (["sd1.5", "--distilled", "yes"], "no 'distilled' to choose"),
    ],
)
def test_what_cannot_be_planned_is_refused(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(args, capsys)


def test_bfloat16_on_a_card_without_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "float32, float16" in refused(["ddpm-cifar10", "--device", "t4", "--dtype", "bfloat16"], capsys)

"""The probe of speed: what it counts against closed forms, faults it must name, and healthy models it must not."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parts
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.contract import ClassFacts, GuidanceFacts
from mezzotint.doctor import ceiling, clock, earlier, operators, overheads, planned, remedies, timing
from mezzotint.doctor.case import Case
from mezzotint.doctor.clock import Paired
from mezzotint.doctor.finding import Checked, Finding, Measure, Outcome
from mezzotint.doctor.probes import speed
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.layers import attention as attention_layer


def case_of(model: Model, **more: Any) -> Case:
    return Case(Path("model"), model, **more)


def seen_of(case: Case) -> remedies.Seen:
    request = timing.asked(case)
    told, _ = timing.encoding(case.model, request)
    return timing.step_of(case, timing.sizes(case.model, request, told))[0]


def broader(channels: int = 64, size: int = 16, heads: int = 16) -> Model:
    """A network in which operators outweigh their calls."""
    config = UNetConfig(
        sample_size=size, in_channels=3, out_channels=3, block_out_channels=(channels, channels),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        layers_per_block=1, norm_num_groups=8, num_class_embeds=4, attention_head_dim=heads,
    )  # fmt: skip
    classes = ClassFacts(names=parts.CLASSES, null=3)
    return parts.model(parts.fixed(UNet(config)), parts.pixel_codec(), classes=classes, size=(size, size))


def alarms(found: list[Finding]) -> list[str]:
    return [finding.cause for finding in found if finding.grade != "note"]


# What is counted.


def test_operations_are_counted_by_kind_as_on_paper() -> None:
    linear, conv = nn.Linear(24, 40), nn.Conv2d(3, 8, 3, padding=1)
    x, image = torch.randn(5, 24), torch.randn(2, 3, 6, 10)
    q, k = torch.randn(1, 2, 7, 16), torch.randn(1, 2, 9, 16)

    def act() -> None:
        linear(x), conv(image), F.scaled_dot_product_attention(q, k, k)

    with torch.inference_mode():
        found = operators.flops(act)
    assert found == {
        "linear": 2 * 5 * 24 * 40, "convolution": 2 * 9 * 3 * 8 * 2 * 60, "attention": 2 * 2 * (2 * 7 * 9 * 16),
    }  # fmt: skip


def test_time_goes_to_the_kind_that_takes_it() -> None:
    a = torch.randn(600, 600)

    def act() -> Tensor:
        return F.silu(a @ a)

    act()
    found = [operators.timed(act, "cpu") for _ in range(7)]  # the least of several: other jobs only ever add
    linear, activation = (min(each.seconds[kind] for each in found) for kind in ("linear", "activation"))
    assert linear > activation > 0
    assert found[0].calls == 2 and not found[0].softmaxes


def test_attention_by_hand_is_seen_with_its_shapes() -> None:
    q = torch.randn(2, 3, 10, 8)
    found = operators.timed(lambda: (q @ q.transpose(-1, -2)).softmax(-1) @ q, "cpu")
    assert found.softmaxes == (((6, 10, 8), (6, 8, 10)),)
    assert found.seconds["linear"] == 0.0 < found.seconds["attention"]


def test_a_ratio_holds_only_where_most_pairs_agree() -> None:
    assert Paired((1.3, 1.2, 1.25, 1.4, 1.1)).beyond(1.15)
    assert not Paired((1.3, 1.2, 1.25, 0.9, 0.95)).beyond(1.15)  # the median alone would say yes
    assert not Paired((1.1, 1.12, 1.1, 1.14, 1.1)).beyond(1.15)


def test_pairs_find_a_known_ratio() -> None:
    found = clock.proven(1.5, lambda: time.sleep(0.03), lambda: time.sleep(0.01), "cpu")
    assert found.beyond(1.5) and 2.0 < found.value < 4.0


def test_the_ceiling_weighs_operations_by_kind() -> None:
    roof = ceiling.Ceiling(matrix=100.0, convolution=50.0, copy=1.0)
    assert roof.seconds({"convolution": 100.0, "linear": 100.0, "attention": 50.0}) == pytest.approx(3.5)


def test_the_sampler_is_walked_without_the_network() -> None:
    model = parts.class_model()
    spent, evaluations = clock.walked(clock.prepared(model, timing.asked(case_of(model))))
    assert evaluations == 5 and spent < 0.5


# The healthy one.


def test_a_healthy_model_has_no_alarm_and_is_measured_by_part() -> None:
    checked = speed.examine(case_of(broader()))
    assert not [cause for cause in alarms(list(checked.findings)) if cause != "speed.threads"]
    told = {each.name: each for each in checked.measures}
    for name in ("step", "step.convolution", "step.python", "codec.decode", "request", "work", "rate", "reached"):
        assert name in told
    assert 0 < told["reached"].value < 150
    whole = sum(each.value for name, each in told.items() if name.startswith("step."))
    assert whole == pytest.approx(told["step"].value, rel=0.5)
    assert [plot.kind for plot in checked.plots] == ["bars", "bars"]


# Seeded faults.


def test_a_number_format_that_is_slow_here_is_named() -> None:
    model = broader()
    model.backbone.double()
    (found,), _ = remedies.number_format(seen_of(case_of(model)))
    assert (found.cause, found.grade) == ("speed.dtype", "harmful") and "--dtype float32" in found.command


def test_pain_14_and_15_adapters_beside_the_weights_are_slow(tmp_path: Path) -> None:
    model = broader()
    tensors: dict[str, Tensor] = {}
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.Conv2d) and "resnets" in name and "shortcut" not in name:
            out, inner, *kernel = module.weight.shape
            tensors[f"unet.{name}.lora_A.weight"] = 1e-3 * torch.randn(256, inner, *kernel)
            tensors[f"unet.{name}.lora_B.weight"] = 1e-3 * torch.randn(out, 256, 1, 1)
    save_file(tensors, tmp_path / "lora.safetensors")
    case = case_of(model, lora=((tmp_path / "lora.safetensors", 1.0),))
    assert case.model is not case.bare
    (found,), _ = overheads.adapters(seen_of(case))
    assert (found.cause, found.grade) == ("speed.adapters", "harmful") and "merged" in found.do
    assert overheads.adapters(seen_of(case_of(model))) == ([], [])


def test_hooks_that_take_time_are_named_and_stay_where_they_were() -> None:
    model = broader(size=8)
    assert overheads.hooks(seen_of(case_of(model))) == ([], [])
    handle = model.backbone.register_forward_hook(lambda module, given, out: time.sleep(0.05))
    before = dict(model.backbone._forward_hooks)
    (found,), _ = overheads.hooks(seen_of(case_of(model)))
    assert (found.cause, found.grade) == ("speed.python", "harmful")
    assert dict(model.backbone._forward_hooks) == before
    handle.remove()
    model.backbone.register_forward_hook(lambda module, given, out: None)
    findings, measures = overheads.hooks(seen_of(case_of(model)))
    assert not findings and measures[0].value < 1.05


def test_a_network_left_in_training_is_noted_and_left_as_it_was() -> None:
    model = broader(size=8)
    assert overheads.untidy(seen_of(case_of(model))) == ([], [])
    model.backbone.train().requires_grad_(True)
    findings, _ = overheads.untidy(seen_of(case_of(model)))
    assert findings[0].cause == "speed.python" and "training mode" in findings[0].says
    assert model.backbone.training and all(p.requires_grad for p in model.backbone.parameters())


def test_threads_are_tried_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = False

    @contextlib.contextmanager
    def threads(count: int) -> Iterator[None]:
        nonlocal quick
        quick = count > torch.get_num_threads()
        yield

    model, now = broader(size=8), torch.get_num_threads()
    seen = seen_of(case_of(model))
    assert not alarms(overheads.threads(replace(seen))[0]) or now < ceiling.cores()
    assert torch.get_num_threads() == now
    monkeypatch.setattr(ceiling, "cores", lambda: now + 1)
    monkeypatch.setattr(ceiling, "product", lambda device, dtype: lambda: time.sleep(0.005 if quick else 0.01))
    monkeypatch.setattr(overheads, "_threads", threads)
    model.backbone.register_forward_hook(lambda module, given, out: time.sleep(0.0 if quick else 0.4))
    (found,), _ = overheads.threads(seen)
    assert found.cause == "speed.threads" and f"OMP_NUM_THREADS={now + 1}" in found.command


def test_attention_by_an_explicit_softmax_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def explicit(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1) @ v

    model = broader(channels=32, size=32, heads=8)
    assert not alarms(remedies.attention(seen_of(case_of(model)))[0])
    monkeypatch.setattr(attention_layer.F, "scaled_dot_product_attention", explicit)
    seen = seen_of(case_of(model))
    monkeypatch.undo()
    (found,), _ = remedies.attention(seen)
    assert (found.cause, found.grade) == ("speed.kernel", "harmful") and "softmax" in found.says


def test_moving_parts_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(broader(size=8), works_on=torch.device("cpu"))
    seen = seen_of(case_of(model))
    assert not overheads.offload(seen, 1.0)[0]

    @contextlib.contextmanager
    def slow(model: Model, part: str) -> Iterator[None]:
        time.sleep(0.1)
        yield

    monkeypatch.setattr(overheads, "working", slow)
    (found,), _ = overheads.offload(seen, 0.5)
    assert (found.cause, found.grade) == ("speed.offload", "harmful")
    assert overheads.offload(replace(seen, work=replace(seen.work, model=broader(size=8))), 0.5) == ([], [])


def test_guidance_is_noted_with_its_factor() -> None:
    model = broader(size=32)
    assert speed.guidance(seen_of(case_of(model))) == ([], [])
    guided = parts.with_contract(model, guidance=GuidanceFacts(dropout=0.1, scale=3.0))
    (found,), (told,) = speed.guidance(seen_of(case_of(guided)))
    assert (found.cause, found.grade) == ("speed.guidance", "note") and 1.3 < told.value < 3.5


def test_memory_that_runs_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = broader(size=8)
    assert not speed.scarce(model, (0,) * 7)[0]
    (found,), _ = speed.scarce(model, (40, 50, 30, 60, 20, 45, 30))
    assert (found.cause, found.grade) == ("speed.memory", "harmful")
    monkeypatch.setattr(ceiling, "memory", lambda: ceiling.Memory(1e3, 1e3, 0.0, 0))
    assert [(f.cause, f.grade) for f in speed.scarce(model, (0,) * 7)[0]] == [("speed.memory", "note")]


def test_the_part_that_takes_most_is_noted() -> None:
    usual = {"text": 0.1, "steps": 2.0, "sampler": 0.0, "codec.decode": 0.2}
    assert speed.dominant(usual, 20) == []
    assert [f.cause for f in speed.dominant(usual, 100)] == ["speed.steps"]
    assert [f.cause for f in speed.dominant({**usual, "codec.decode": 9.0}, 20)] == ["speed.codec"]
    assert [f.cause for f in speed.dominant({**usual, "text": 9.0}, 20)] == ["speed.text"]


def test_a_text_encoder_at_work_in_every_step_is_named() -> None:
    model = broader(size=8)
    encoder = nn.Linear(4, 4)
    encoder.register_forward_hook(lambda module, given, out: time.sleep(0.02))
    seen = seen_of(case_of(model))
    text = SimpleNamespace(networks={"text_encoder": encoder})
    spoken = replace(seen, work=replace(seen.work, model=replace(model, text=text)))
    assert overheads.text_within(spoken) == ([], [])
    model.backbone.register_forward_hook(lambda module, given, out: [encoder(torch.ones(1, 4)), out][1])
    (found,), _ = overheads.text_within(spoken)
    assert (found.cause, found.grade) == ("speed.text", "harmful")


def test_a_step_far_beyond_its_plan_is_noted_with_the_part_that_is() -> None:
    step, text, decode = (timing.Timed(name, (0.9 * spent, spent, 1.2 * spent))
                          for name, spent in (("step", 0.4), ("text", 0.1), ("codec.decode", 0.2)))  # fmt: skip
    kinds = [timing.Timed("step.convolution", (0.1,)), timing.Timed("step.attention", (0.3,))]
    plan = planned.Planned(0.3, {"convolution": 0.2, "attention": 0.1}, 0.1, 0.4, 2e9)
    assert planned.against(None, step, kinds, text, decode) == ([], [])
    findings, told = planned.against(plan, step, kinds, text, decode)
    values = {each.name: each.value for each in told}
    assert not findings
    assert values["step over its plan"] == pytest.approx(0.4 / 0.3) and values["codec.decode over its plan"] == 0.5
    assert values["step.attention over its plan"] == pytest.approx(3.0) and values["planned peak of memory"] == 2.0
    (found,), _ = planned.against(replace(plan, step=0.15), step, kinds, text, decode)
    assert (found.cause, found.grade) == ("speed.plan", "note") and "2.4 times" in found.says
    assert "attention" in found.says and "--calibrate" in found.command
    smaller = replace(step, note="measured at 32x32")
    assert "codec.decode over its plan" not in {
        each.name for each in planned.against(plan, smaller, [], text, decode)[1]
    }


# Runs and earlier diagnoses.


def measures(**seconds: float) -> list[Measure]:
    told = {"request": 2.0, "step": 0.1, "step.convolution": 0.07, "step.attention": 0.02, **seconds}
    timed = [
        Measure(name.replace("__", "."), value, 0.97 * value, 1.03 * value, "", "s") for name, value in told.items()
    ]
    return [*timed, Measure("ceiling.matrix", 100.0), Measure("work", 2.0)]


def report(folder: Path, told: list[Measure]) -> Path:
    outcome = Outcome("speed", Checked(measures=tuple(told)))
    (folder / "doctor.json").write_text(json.dumps({"outcomes": [asdict(outcome)]}))
    return folder


def test_the_part_that_became_slower_is_named(tmp_path: Path) -> None:
    path = earlier.report_of(report(tmp_path, measures()))
    assert path is not None
    assert earlier.regressed(path, measures())[0] == []
    now = [replace(each, value=3 * each.value, low=3 * (each.low or 0), high=3 * (each.high or 0))
           if each.name == "step.attention" else each for each in measures(step=0.14)]  # fmt: skip
    (found,), told = earlier.regressed(path, now)
    assert found.cause == "speed.regressed" and "step takes 1.40 times" in found.says
    assert "attention (3.00 times)" in found.says
    ratio = next(each for each in told if each.name == "regressed.step.attention")
    assert ratio.value == pytest.approx(3.0) and ratio.low is not None and ratio.low < 3.0


def test_a_slower_machine_is_no_regression(tmp_path: Path) -> None:
    path = earlier.report_of(report(tmp_path, measures()))
    assert path is not None
    slow = [replace(each, value=2 * each.value, low=2 * (each.low or 0), high=2 * (each.high or 0))
            if each.unit == "s" else replace(each, value=50.0) for each in measures()]  # fmt: skip
    assert earlier.regressed(path, slow)[0] == []
    with pytest.raises(InputError, match="no diagnosis"):
        (tmp_path / "doctor.json").write_text("{}")
        earlier.regressed(path, slow)


def run(folder: Path, records: list[dict[str, float]]) -> Path:
    (folder / "recipe.toml").write_text("batch = 4\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_loading_that_takes_a_step_is_named(tmp_path: Path) -> None:
    steady = [{"step": i, "images_per_second": 40.0, "loading_seconds": 0.002} for i in range(12)]
    assert earlier.loading(run(tmp_path, steady), 0.01)[0] == []
    slow = [{**record, "loading_seconds": 0.06} for record in steady]
    (found,), _ = earlier.loading(run(tmp_path, slow), 0.01)  # 0.06 s of steps of 0.1 s
    assert (found.cause, found.grade) == ("speed.loading", "harmful") and "60 %" in found.says


def test_a_run_far_slower_than_its_network_is_noted(tmp_path: Path) -> None:
    records = [{"step": float(i), "images_per_second": 30.0} for i in range(12)]
    assert earlier.loading(run(tmp_path, records), 0.01)[0] == []
    (found,), _ = earlier.loading(run(tmp_path, records), 0.001)
    assert (found.cause, found.grade) == ("speed.loading", "note")
    slowing = [{**record, "images_per_second": 10.0} if record["step"] >= 6 else record for record in records]
    assert [f.cause for f in earlier.loading(run(tmp_path, slowing), 0.02)[0]] == ["speed.memory"]

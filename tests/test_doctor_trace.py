"""The doctor's look at run folders: seeded faults of metrics and checkpoints are named, a sound run is silent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import parts
import pytest
import torch
from torch import Tensor

from mezzotint.checkpoints import write_tensors
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, NotChecked
from mezzotint.doctor.probes import trace
from mezzotint.families import Model

STEPS = 400


def sound(step: int) -> dict[str, Any]:
    """A loss that falls as 1/sqrt(step) does, with luck of 5 % in each record, and bands that fall with it."""
    luck = 1 + 0.05 * float(torch.randn(1, generator=torch.Generator().manual_seed(step)))
    mean = 0.2 + 0.8 / math.sqrt(1 + step / 10)
    record = {"step": step, "loss": mean * luck, "rate": 1e-3, "gradient/backbone": 0.3 * luck}
    if step % 50 == 0:
        record |= {"validation": mean, "validation/0-50%": 0.5 * mean, "validation/50-100%": 1.5 * mean}
    return record


def run(
    path: Path, records: Sequence[Mapping[str, Any]], checkpoints: Mapping[str, Mapping[str, Mapping[str, Tensor]]] = {}
) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (path / "recipe.toml").write_text("steps = 400\n")
    for step, files in checkpoints.items():
        for name, tensors in files.items():
            (path / "checkpoints" / step).mkdir(parents=True, exist_ok=True)
            write_tensors(path / "checkpoints" / step / f"{name}.safetensors", tensors)
    return path


def moments(weights: Mapping[str, Tensor], share: float = 0.2) -> dict[str, Tensor]:
    """Adam's of a gradient whose mean is `share` of its deviation."""
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        found[f"{name}.exp_avg"] = torch.full_like(value, share * 1e-2)
        found[f"{name}.exp_avg_sq"] = torch.full_like(value, 1e-4)
    return found


def trained(start: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(0)
    return {name: value + by * torch.randn(value.shape, generator=noise) for name, value in start.items()}


def weights(model: Model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.backbone.named_parameters()}


def examine(path: Path, **more: Any) -> Checked:
    return trace.examine(Case(Path("model"), parts.class_model(), trace=path, **more))


def only(checked: Checked) -> Finding:
    (found,) = checked.findings
    return found


def measured(checked: Checked, name: str) -> float:
    return next(m.value for m in checked.measures if m.name == name)


def test_a_sound_run_is_silent(tmp_path: Path) -> None:
    base = parts.class_model()
    first, last = trained(weights(base), 1e-3), trained(weights(base), 2e-3)
    files = {
        "step-00000350": {"backbone": first},
        "step-00000400": {"backbone": last, "backbone.optimiser": moments(last)},
    }
    path = run(tmp_path / "run", [sound(step) for step in range(0, STEPS + 1, 5)], files)
    checked = examine(path, base=base)
    assert not checked.findings
    size = math.sqrt(sum(float(v.square().sum()) for v in weights(base).values()))
    count = sum(v.numel() for v in last.values())
    moved = measured(checked, "relative distance of the weights from the base")
    assert moved == pytest.approx(2e-3 * math.sqrt(count) / size, rel=0.05)
    end = math.sqrt(sum(float(v.square().sum()) for v in last.values()))
    update = measured(checked, "relative change of the weights in a step")
    assert update == pytest.approx(1e-3 * 0.2 * math.sqrt(count) / end, rel=1e-3)
    assert set(checked.plots[0].curves) == {"0-50%", "50-100%"}


def test_no_run_and_a_former_report_are_not_checked(tmp_path: Path) -> None:
    with pytest.raises(NotChecked, match="--trace"):
        trace.examine(Case(Path("model"), parts.class_model()))
    (tmp_path / "doctor.json").write_text("{}")
    with pytest.raises(NotChecked, match="speed"):
        examine(tmp_path / "doctor.json")
    with pytest.raises(NotChecked, match=r"metrics\.jsonl"):
        examine(tmp_path)


def test_pain_20_control_weights_equal_to_the_start(tmp_path: Path) -> None:
    base = parts.class_model()
    same = {f"networks.0.{name}": value for name, value in weights(base).items()}
    path = run(tmp_path / "run", [sound(step) for step in range(0, STEPS, 5)], {"step-00000395": {"network": same}})
    found = only(examine(path, base=base))
    assert found.cause == "run.frozen" and found.grade == "broken" and "number for number" in found.says


def test_pain_20_zero_convolutions_that_are_still_zero(tmp_path: Path) -> None:
    network = {
        "networks.0.conv_in.weight": torch.randn(8, 4, 3, 3),
        "networks.0.controlnet_down_blocks.0.weight": torch.zeros(8, 8, 1, 1),
        "networks.0.controlnet_mid_block.weight": torch.zeros(8, 8, 1, 1),
    }
    records = [sound(step) for step in range(0, STEPS, 5)]
    found = only(examine(run(tmp_path / "run", records, {"step-00000395": {"network": network}})))
    assert found.cause == "run.frozen" and "controlnet_down_blocks.0.weight" in found.says
    network["networks.0.controlnet_mid_block.weight"] = torch.ones(8, 8, 1, 1)
    assert not examine(run(tmp_path / "other", records, {"step-00000395": {"network": network}})).findings


def test_pain_21_a_resumed_run_that_changes_nothing(tmp_path: Path) -> None:
    frozen = {"network": {"a.lora_A.weight": torch.randn(4, 8), "a.lora_B.weight": torch.randn(8, 4)}}
    records = [sound(step) for step in range(0, 200, 5)]
    still = {key: value for key, value in sound(150).items() if key.startswith("validation")}
    records += [{**sound(step), **(still if step % 50 == 0 else {})} for step in range(200, STEPS + 1, 5)]
    path = run(tmp_path / "run", records, {"step-00000200": frozen, "step-00000400": frozen})
    found = only(examine(path))
    assert found.cause == "run.frozen"
    assert "step 400 are those of step 200" in found.says and "last 6 validations" in found.says
    assert found.command.startswith("mezzotint train ")


def test_no_gradient_no_rate_no_second_matrix(tmp_path: Path) -> None:
    unmoved = {"a.lora_A.weight": torch.randn(4, 8), "a.lora_B.weight": torch.zeros(8, 4)}
    nothing = {name: torch.zeros_like(value) for name, value in moments(unmoved).items()}
    records = [{**sound(step), "rate": 0.0} for step in range(0, STEPS, 5)]
    path = run(tmp_path / "run", records, {"step-00000395": {"network": unmoved, "network.optimiser": nothing}})
    says = only(examine(path)).says
    assert "still zero" in says and "no gradient" in says and "rate was 0" in says


def test_a_loss_that_rises_or_is_not_finite_has_diverged(tmp_path: Path) -> None:
    records = [sound(step) for step in range(0, STEPS, 5)]
    risen = [{**r, "loss": r["loss"] * (1 if r["step"] < 300 else 4)} for r in records]
    found = only(examine(run(tmp_path / "risen", risen)))
    assert found.cause == "run.diverged" and found.grade in ("harmful", "broken")
    broken = [{**r, "loss": r["loss"] if r["step"] < 300 else math.nan} for r in records]
    found = only(examine(run(tmp_path / "broken", broken)))
    assert found.cause == "run.diverged" and found.grade == "broken" and "from step 300 on" in found.says


def test_a_loss_that_scatters_as_it_is_high_has_diverged(tmp_path: Path) -> None:
    luck = torch.rand(18, generator=torch.Generator().manual_seed(0))
    records = [{"step": 50 * i, "loss": 0.5 * (1 if i < 7 else float(8 + 8 * luck[i]))} for i in range(18)]
    assert only(examine(run(tmp_path / "run", records))).cause == "run.diverged"


def test_luck_of_single_records_is_no_divergence(tmp_path: Path) -> None:
    noise = torch.rand(STEPS, generator=torch.Generator().manual_seed(0))
    records = [{"step": i, "loss": 0.2 + float(noise[i])} for i in range(STEPS)]
    assert not examine(run(tmp_path / "run", records)).findings


@pytest.mark.parametrize(("rate", "says"), [(1.0, "wander"), (1e-8, "hardly move")])
def test_a_rate_that_is_too_high_or_too_low(tmp_path: Path, rate: float, says: str) -> None:
    last = {"a.weight": torch.ones(8, 8)}
    records = [{**sound(step), "rate": rate} for step in range(0, STEPS, 5)]
    files = {"backbone": last, "backbone.optimiser": moments(last)}
    found = only(examine(run(tmp_path / "run", records, {"step-00000395": files})))
    assert found.cause == "run.rate" and says in found.says
    assert measured(examine(tmp_path / "run"), "relative change of the weights in a step") == pytest.approx(0.2 * rate)


def test_validation_that_rose_after_its_minimum(tmp_path: Path) -> None:
    records = [sound(step) for step in range(0, STEPS + 1, 5)]
    for record in records:
        for key in record:
            if key.startswith("validation"):
                record[key] *= 1 + max(0, record["step"] - 200) / 200 * (1.0 if key.endswith("50-100%") else 0.7)
    found = only(examine(run(tmp_path / "run", records)))
    assert found.cause == "fit.over" and "50-100%" in found.says and "step 200" in found.says
    assert "--set steps=200" in found.command


def test_validation_that_still_falls_is_a_run_too_short(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 1.0, "validation": 1.0 - 0.7 * step / 40} for step in range(0, 41, 5)]
    found = only(examine(run(tmp_path / "run", records)))
    assert found.cause == "fit.under" and "steps=160" in found.command

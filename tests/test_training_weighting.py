"""What a run visits and how much it counts, on models as they are found: terminal SNR, shifts, densities."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import reference_pixels
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal
from training_parts import image_folder

from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.process import Discrete, Prediction, Process, schedules, weighting
from mezzotint.training import recipe
from mezzotint.training.methods import Method, Place, method
from mezzotint.training.methods.full import Full

COUNT = 20_000
KOLMOGOROV = 1.95  # exceeded once in a thousand draws: sqrt(n) times the largest distance of two distributions


class Affine(nn.Module):
    """raw = 0.3 x + 0.1, computed by hand."""

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return 0.3 * x[:, :3] + 0.1


def plan(root: Path, base: Path, side: int = 8, channels: int = 3, **changes: Any) -> recipe.Recipe:
    folder = root / f"train{side}"
    if not folder.exists():
        image_folder(folder, 6, size=side)
    table: dict[str, Any] = {
        "method": "full", "out": str(root / "run"), "steps": 2, "batch": 6, "threads": 1, "base": {"path": str(base)},
        "data": {"folder": str(folder), "size": [side, side], "channels": channels},
    }  # fmt: skip
    return recipe.check({**table, **changes}, str(root / "small.toml"))


def job(said: recipe.Recipe) -> Method:
    return method(said, Place(Path(said.out), torch.device("cpu"), lambda *_: None))


def full(said: recipe.Recipe) -> Full:
    made = job(said)
    assert isinstance(made, Full)
    return made


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return reference_pixels.tiny_folder(tmp_path / "base", reference_pixels.PLAIN, reference_pixels.HO)


VELOCITY = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture
def zero(tmp_path: Path) -> Path:
    """A base that was trained from pure noise on."""
    return reference_pixels.tiny_folder(tmp_path / "zero", reference_pixels.PLAIN, {**reference_pixels.HO, **VELOCITY})


# The process of the base is the process of the run.


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_pain_01_another_prediction_than_the_bases_stops_before_any_work(
    base: Path, tmp_path: Path, prediction: str
) -> None:
    """Both values and both files are named, and nothing was written."""
    process = {"prediction": prediction, "schedule": {"kind": "discrete", "betas": "linear"}}
    with pytest.raises(InputError) as raised:
        job(plan(tmp_path, base, process=process))
    said = str(raised.value)
    ours, theirs = base / "scheduler" / "scheduler_config.json", tmp_path / "small.toml"
    assert f"process.prediction is 'epsilon' in {ours} but '{prediction}' in {theirs}" in said
    assert "process.schedule" not in said and not (tmp_path / "run").exists()
    agreeing = {"prediction": "epsilon", "schedule": {"kind": "discrete", "betas": "linear"}}
    assert full(plan(tmp_path, base, process=agreeing)).core.process.prediction is Prediction.EPSILON


def test_pain_06_zero_terminal_snr_trains_on_the_rescaled_table(zero: Path, tmp_path: Path) -> None:
    """Pure noise in, minus the image out; min-SNR counts that level nothing and stays finite."""
    from diffusers import DDPMScheduler

    reference: Any = DDPMScheduler.from_pretrained(zero / "scheduler")
    for name, expected_last in (("uniform", None), ("min_snr", 0.0)):
        made = full(plan(tmp_path, zero, loss={"weighting": name}))
        schedule = made.core.process.schedule
        assert isinstance(schedule, Discrete) and schedule.zero_terminal_snr
        batch = made.draw(0)
        made.trained["backbone"] = Affine()
        batch["t"] = torch.full_like(batch["t"], 999)
        level = made.core.process.levels(batch["t"])
        x = made.core.process.noised(batch["clean"], batch["noise"], level)
        assert torch.equal(x, batch["noise"])  # nothing of the image is left
        said = F.mse_loss(0.3 * batch["noise"] + 0.1, -batch["clean"]).item()
        assert made.loss(batch, 0)[0].item() == pytest.approx(said if expected_last is None else 0.0, rel=1e-6)
        batch["t"] = torch.tensor([0, 200, 500, 800, 998, 999])
        noisy = reference.add_noise(batch["clean"], batch["noise"], batch["t"])
        target = reference.get_velocity(batch["clean"], batch["noise"], batch["t"])
        error = (0.3 * noisy + 0.1 - target).square().mean((1, 2, 3))
        bar = reference.alphas_cumprod[batch["t"]]
        snr = bar / (1 - bar)
        weight = torch.ones(6) if name == "uniform" else snr.clamp(max=5) / (snr + 1)
        assert made.loss(batch, 0)[0].item() == pytest.approx((weight * error).mean().item(), rel=2e-5)


def test_pain_06_epsilon_at_zero_terminal_snr_is_refused(tmp_path: Path) -> None:
    wrong = {**reference_pixels.HO, **VELOCITY, "prediction_type": "epsilon"}
    folder = reference_pixels.tiny_folder(tmp_path / "wrong", reference_pixels.PLAIN, wrong)
    with pytest.raises(InputError, match="noise alone cannot give the image"):
        job(plan(tmp_path, folder))


# Shifts.


def shares(batch: dict[str, Tensor]) -> Tensor:
    return batch["t"].double() / 1000


@pytest.mark.parametrize(("said", "side", "shift"), [
    ("contract", 64, 1.0), (2.5, 32, 2.5), ("resolution", 32, 1.0), ("resolution", 64, 2.0), ("resolution", 16, 0.5),
])  # fmt: skip
def test_pain_08_times_are_bent_by_the_shift_asked_for(
    tiny_folder: Path, tmp_path: Path, said: str | float, side: int, shift: float
) -> None:
    """Esser 2024, eq. 23, for a base of 32 x 32 pixels: sqrt(m / n) s / (1 + (sqrt(m / n) - 1) s)."""
    common: dict[str, Any] = {"side": side, "channels": 1, "inpaint": {"bank": 2}, "batch": 6}
    plain = shares(full(plan(tmp_path, tiny_folder, loss={"shift": 1.0}, **common)).draw(4))
    bent = shares(full(plan(tmp_path, tiny_folder, loss={"shift": said}, **common)).draw(4))
    assert torch.allclose(bent, shift * plain / (1 + (shift - 1) * plain), rtol=1e-5)


def test_pain_08_resolution_shifts_are_the_published_rules() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    static = Process(schedules.sd35(), Prediction.FLOW)
    assert weighting.resolution_shift(static, 4096, 1024, 28) == pytest.approx(3 * 2)
    assert weighting.resolution_shift(static, 1024, 1024, 28) == pytest.approx(3)
    moving = Process(schedules.flux2(), Prediction.FLOW)
    reference: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens, steps in ((1024, 50), (4096, 28), (16, 4)):
        shift = weighting.resolution_shift(moving, tokens, 4096, steps)
        u = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        expected = reference.time_shift(compute_empirical_mu(tokens, steps), 1.0, u)
        assert torch.allclose(shift * u / (1 + (shift - 1) * u), expected, rtol=1e-9)


@pytest.mark.parametrize("shift", ["resolution", 3.0])
def test_pain_08_a_table_has_no_shift(base: Path, tmp_path: Path, shift: str | float) -> None:
    with pytest.raises(InputError, match="a shift bends the times of a flow, and this schedule is linear"):
        job(plan(tmp_path, base, loss={"shift": shift}))
    assert not (tmp_path / "run").exists()


# Densities.


def distance(sample: Tensor, cdf: Tensor) -> float:
    """sqrt(n) sup |empirical - cdf|, of a sorted sample and its distribution function there (Kolmogorov 1933)."""
    n = len(sample)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum(cdf - steps[:-1], steps[1:] - cdf).max()) * math.sqrt(n)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 1.3)])
def test_logit_normal_times_have_their_distribution(shift: float, mean: float, std: float) -> None:
    """logit of a shifted level is the logit plus log shift, so what is left is a standard normal."""
    process = Process(schedules.rectified_flow(shift=shift), Prediction.FLOW)
    t = weighting.draw_times(process, COUNT, torch.Generator().manual_seed(1), "logit_normal", mean, std)
    z = (torch.logit(t.double() / 1000) - math.log(shift) - mean) / std
    z = z.sort().values
    assert distance(z, Normal(0.0, 1.0).cdf(z)) < KOLMOGOROV
    assert distance(z, Normal(0.05, 1.0).cdf(z)) > KOLMOGOROV  # the test can tell


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_times_have_their_distribution_after_the_shift(shift: float) -> None:
    process = Process(schedules.rectified_flow(), Prediction.FLOW)
    t = weighting.draw_times(process, COUNT, torch.Generator().manual_seed(2), shift=shift).double() / 1000
    s = t.sort().values
    assert distance(s, s / (shift - (shift - 1) * s)) < KOLMOGOROV  # the inverse of the shift


def test_a_table_is_visited_by_the_same_density() -> None:
    """P(t < k) = Phi(logit(k / T)) at every timestep k."""
    process = Process(schedules.scaled_linear(), Prediction.EPSILON)
    t = weighting.draw_times(process, COUNT, torch.Generator().manual_seed(3), "logit_normal")
    k = torch.arange(1, 1000, dtype=torch.float64)
    found = torch.searchsorted(t.double().sort().values, k) / COUNT
    assert float((found - Normal(0.0, 1.0).cdf(torch.logit(k / 1000))).abs().max()) * math.sqrt(COUNT) < KOLMOGOROV


# Validation.


def test_pain_13_validation_compares_runs_of_other_seeds_batches_rates_and_methods(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A repainting model with classes: images, masks, labels, noise and times are the same for all of them."""
    data = {
        "folder": str(tmp_path / "train32"),
        "size": [32, 32],
        "channels": 1,
        "validation": str(tmp_path / "train32"),
    }
    image_folder(tmp_path / "train32", 6, size=32)
    common: dict[str, Any] = {
        "side": 32, "channels": 1, "inpaint": {"bank": 4}, "data": data, "validation": {"bands": 2, "images": 5},
    }  # fmt: skip
    runs: dict[str, dict[str, Any]] = {
        "one": {},
        "another": {
            "seed": 11, "batch": 2, "optimiser": {"rate": 1e-2}, "classes": {"dropout": 0.7}, "loss": {
                "weighting": "min_snr", "density": "logit_normal", "shift": 4.0, "offset": 0.1,
            },
        },
        "lora": {"method": "lora", "seed": 5, "lora": {"rank": 2}},
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    for name, changes in runs.items():
        made = job(plan(tmp_path, tiny_folder, **common, **changes))
        found[name] = made.validate(made.trained[made.averaged].eval())
    assert len(found["one"]) == 3 and all(value > 0 for value in found["one"].values())
    assert found["another"] == pytest.approx(found["one"], rel=1e-5)
    assert found["lora"] == pytest.approx(found["one"], rel=1e-5)

"""Guidance against the reference and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.guidance import Guidance, Projected, mixed, projected, rescaled, skipped
from mezzotint.process import Prediction, Process, prediction, schedules


def drawn(seed: int) -> Tensor:
    return torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


def test_scale_1_is_the_conditional_and_scale_0_the_baseline() -> None:
    a, b = drawn(0), drawn(1)
    assert torch.allclose(mixed(a, b, 1.0), a, atol=1e-6) and torch.equal(mixed(a, b, 0.0), b)
    assert torch.allclose(Guidance(7.5).combine(a, b), 7.5 * a - 6.5 * b, atol=1e-5)


def test_a_negative_prompt_is_the_same_formula_with_another_baseline() -> None:
    a, empty, negative = drawn(0), drawn(1), drawn(2)
    difference = Guidance(4.0).combine(a, negative) - Guidance(4.0).combine(a, empty)
    assert torch.allclose(difference, -3.0 * (negative - empty), atol=1e-5)


@pytest.mark.parametrize("amount", [0.0, 0.3, 0.7, 1.0])
def test_rescale_equals_the_reference(amount: float) -> None:
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    a, b = drawn(0), drawn(1)
    guided = mixed(a, b, 7.5)
    theirs = rescale_noise_cfg(guided, a, guidance_rescale=amount)
    assert float((Guidance(7.5, rescale=amount).combine(a, b) - theirs).abs().max()) <= 5e-6 * float(theirs.abs().max())


def test_full_rescale_gives_each_image_the_conditional_deviation() -> None:
    a, b = drawn(0) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1), drawn(1)
    out = rescaled(mixed(a, b, 7.5), a, 1.0)
    assert torch.allclose(out.std(dim=(1, 2, 3)), a.std(dim=(1, 2, 3)), rtol=1e-5)


def test_trap_rescale_on_raw_outputs_differs_from_rescale_on_clean_estimates() -> None:
    process = Process(schedules.scaled_linear(), Prediction.EPSILON)
    level, x, a, b = process.level(700), drawn(3), drawn(0), drawn(1)
    guidance = Guidance(7.5, rescale=0.7)

    def clean(raw: Tensor) -> Tensor:
        return prediction.estimate(process.prediction, raw, x, level).clean

    apart = float((clean(guidance.combine(a, b)) - guidance.combine(clean(a), clean(b))).abs().max())
    assert apart > 0.1
    plain = Guidance(7.5)
    assert torch.allclose(clean(plain.combine(a, b)), plain.combine(clean(a), clean(b)), atol=1e-3)


def test_the_interval_decides_where_the_baseline_is_evaluated() -> None:
    guidance = Guidance(3.0, interval=(0.2, 0.8))
    assert [guidance.active(p) for p in (0.0, 0.19, 0.2, 0.5, 0.8, 0.81, 1.0)] == [
        *(False, False),
        *(True, True, True),
        *(False, False),
    ]
    assert not Guidance(1.0).active(0.5) and Guidance(2.0).active(0.0) and Guidance(2.0).active(1.0)


@pytest.mark.parametrize("interval", [(-0.1, 1.0), (0.6, 0.4), (0.0, 1.2)])
def test_impossible_intervals_are_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="interval"):
        Guidance(2.0, interval=interval)


def test_impossible_rescale_is_refused() -> None:
    with pytest.raises(InputError, match="rescale"):
        Guidance(2.0, rescale=1.5)


@pytest.mark.parametrize("steps", [1, 4, 20, 28, 40, 50, 101])
@pytest.mark.parametrize(("start", "stop"), [(0.01, 0.2), (0.0, 0.15), (0.25, 0.5)])
def test_skip_layer_guidance_acts_strictly_inside_its_share_of_the_steps(steps: int, start: float, stop: float) -> None:
    guidance = Guidance(5.0, skip_scale=2.5, skip_interval=(start, stop))
    acts = [i for i in range(steps) if guidance.skips(i, steps)]
    assert acts == [i for i in range(steps) if i > steps * start and i < steps * stop]
    assert not any(Guidance(5.0, skip_interval=(start, stop)).skips(i, steps) for i in range(steps))


def test_skip_layer_guidance_of_28_steps_acts_from_the_second_to_the_sixth() -> None:
    guidance = Guidance(5.0, skip_scale=2.5)
    assert [i for i in range(28) if guidance.skips(i, 28)] == [1, 2, 3, 4, 5]
    assert [i for i in range(20) if guidance.skips(i, 20)] == [1, 2, 3]  # 4 = 20 * 0.2 is outside


def test_skip_layer_guidance_pushes_away_from_the_network_without_its_layers() -> None:
    conditional, baseline, without = drawn(0), drawn(1), drawn(2)
    guided = Guidance(4.5).combine(conditional, baseline)
    expected = baseline + 4.5 * (conditional - baseline) + 2.5 * (conditional - without)
    assert torch.allclose(skipped(guided, conditional, without, 2.5), expected, atol=1e-5)


def test_impossible_skip_intervals_are_refused() -> None:
    with pytest.raises(InputError, match="skip-layer guidance interval"):
        Guidance(2.0, skip_scale=1.0, skip_interval=(0.4, 0.2))


def test_projected_guidance_is_plain_guidance_when_nothing_is_projected() -> None:
    a, b = drawn(0), drawn(1)
    assert torch.allclose(projected(a, b, 5.0, parallel=1.0), mixed(a, b, 5.0), atol=1e-5)


def test_projected_guidance_moves_at_right_angles_and_within_its_radius() -> None:
    a, b = drawn(0), drawn(1)
    moved = (Projected(5.0, parallel=0.0, radius=2.0).combine(a, b) - a).double()
    assert float((moved * a).sum(dim=(1, 2, 3)).abs().max()) < 1e-4
    assert float((moved.square().sum(dim=(1, 2, 3)).sqrt() / 4.0).max()) <= 2.0 + 1e-5


@pytest.mark.parametrize(("parallel", "radius"), [(0.0, 0.0), (0.0, 2.5), (0.5, 0.0)])
def test_projected_guidance_equals_the_reference(parallel: float, radius: float) -> None:
    from diffusers.guiders.adaptive_projected_guidance import normalized_guidance

    a, b = drawn(0), drawn(1)
    theirs = normalized_guidance(a, b, 5.0, None, parallel, radius, use_original_formulation=True)
    assert torch.allclose(projected(a, b, 6.0, parallel, radius), theirs, atol=2e-5)

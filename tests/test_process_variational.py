"""The bound on a learned variance against torch.distributions and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from reference_variational import posterior, step_cost
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mezzotint.process import Prediction, Process, prediction, schedules, variational

SCHEDULES = (schedules.linear(), schedules.cosine(), schedules.Discrete("linear", timesteps=40, tick=25.0))


def made(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Clean, noise and a raw output whose variance lies on both sides of [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(count, 2, 3, 3, generator=generator) for _ in range(2))
    return clean.clamp(-1, 1), noise, 0.8 * torch.randn(count, 4, 3, 3, generator=generator)


def table(schedule: schedules.Discrete) -> Tensor:
    return torch.tensor(schedule.alpha_bar(), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule.name} {schedule.timesteps}")
def test_a_step_costs_the_divergence_of_two_normal_distributions(schedule: schedules.Discrete) -> None:
    """KL of the true posterior and the model's; at 0 what the 256 grey levels weigh under the model's."""
    last = schedule.timesteps - 1
    t = torch.tensor([0, 0, 1, 2, 17, last // 2, last])
    process = Process(schedule, Prediction.EPSILON)
    clean, noise, raw = made(len(t))
    found = variational.bound(process, raw, clean, noise, t)
    x = process.noised(clean, noise, process.levels(t))
    expected = step_cost(table(schedule), raw, clean, x, t).float()
    assert found.shape == (len(t),) and torch.allclose(found, expected, rtol=2e-3, atol=1e-5)


def test_every_objective_costs_the_same_for_the_same_image() -> None:
    t = torch.tensor([0, 3, 250, 990])
    clean, noise, raw = made(len(t))
    costs: list[Tensor] = []
    for meaning in (Prediction.EPSILON, Prediction.CLEAN, Prediction.VELOCITY):
        process = Process(schedules.cosine(), meaning)
        level = process.levels(t)
        guess, x = 0.7 * clean, process.noised(clean, noise, level)
        said = prediction.target(meaning, guess, (x - level.alpha * guess) / level.sigma, level)
        costs.append(variational.bound(process, torch.cat((said, raw[:, 2:]), 1), clean, noise, t))
    assert torch.allclose(costs[0], costs[1], rtol=5e-3) and torch.allclose(costs[2], costs[1], rtol=2e-3)


def test_a_perfect_image_at_the_least_variance_costs_nothing() -> None:
    """All of the bound is then the entropy of the variance: with w = 1 it is KL(N(0, beta~) || N(0, beta))."""
    schedule = schedules.linear()
    t = torch.tensor([5, 400, 999])
    process = Process(schedule, Prediction.EPSILON)
    clean, noise, _ = made(len(t))
    least, most = (torch.cat((noise, torch.full_like(noise, v)), 1) for v in (-1.0, 1.0))
    assert variational.bound(process, least, clean, noise, t).abs().max() < 1e-6
    expected: list[float] = []
    for step in t.tolist():
        _, variance, beta = posterior(table(schedule), clean[0].double(), noise[0].double(), step)
        true, model = (Normal(torch.tensor(0.0, dtype=torch.float64), value**0.5) for value in (variance, beta))
        expected.append(float(kl_divergence(true, model)) / math.log(2))
    found = variational.bound(process, most, clean, noise, t)
    assert found.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_all_steps_of_a_gaussian_add_up_to_the_divergence_of_whole_paths() -> None:
    """A toy of one number: q(x_1..T | clean) and the model are Gaussian chains, and chain rule gives sum of terms.

    The model always guesses `guess`, at variance beta~: then each term is (posterior means apart)^2 / (2 beta~), and
    their sum is (clean - guess)^2 / 2 (SNR(1) - SNR(T)) (Kingma 2021, eq. 13), but for the code length at t = 0.
    """
    schedule = schedules.Discrete("linear", 1e-3, 0.2, timesteps=50)
    process, total = Process(schedule, Prediction.CLEAN), 0.0
    clean, guess = torch.full((1, 1, 1, 1), 0.3), 0.55
    raw = torch.cat((torch.full_like(clean, guess), torch.full_like(clean, -1.0)), 1)
    generator = torch.Generator().manual_seed(2)
    for t in range(1, schedule.timesteps):
        noise = torch.randn(clean.shape, generator=generator)  # terms do not depend on it
        total += float(variational.bound(process, raw, clean, noise, torch.tensor([t]))) * math.log(2)
    snr = [a / (1 - a) for a in schedule.alpha_bar()]
    assert total == pytest.approx((0.3 - guess) ** 2 / 2 * (snr[0] - snr[-1]), rel=1e-4)


def test_only_the_variance_gets_a_gradient() -> None:
    process = Process(schedules.linear(), Prediction.EPSILON)
    t = torch.tensor([0, 1, 500])
    clean, noise, raw = made(len(t))
    raw.requires_grad_(True)
    variational.bound(process, raw, clean, noise, t).sum().backward()
    assert raw.grad is not None and (raw.grad[:, :2] == 0).all()
    assert raw.grad.isfinite().all() and (raw.grad[:, 2:].flatten(1).abs().sum(1) > 0).all()


def test_flows_and_networks_without_a_variance_are_refused() -> None:
    clean, noise, raw = made(1)
    t = torch.tensor([3])
    with pytest.raises(ValueError, match="no variance to learn"):
        variational.bound(Process(schedules.sd35(), Prediction.FLOW), raw, clean, noise, t)
    with pytest.raises(ValueError, match="2 channels, and no variance"):
        variational.bound(Process(schedules.linear(), Prediction.EPSILON), raw[:, :2], clean, noise, t)

"""The cost of one reverse step by torch.distributions, for tests of networks that learn their variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence


def posterior(alpha_bar: Tensor, clean: Tensor, x: Tensor, t: int) -> tuple[Tensor, float, float]:
    """Mean and variance of q(x_{t-1} | x_t, clean), from Bayes' rule on precisions; and beta."""
    now, before = float(alpha_bar[t]), float(alpha_bar[t - 1]) if t else 1.0
    keep = now / before  # x_t = sqrt(keep) x_{t-1} + noise of variance 1 - keep
    beta = 1 - keep
    if t == 0:
        return clean, 0.0, beta
    precision = 1 / (1 - before) + keep / beta
    mean = (before**0.5 * clean / (1 - before) + keep**0.5 * x / beta) / precision
    return mean, 1 / precision, beta


def step_cost(alpha_bar: Tensor, raw: Tensor, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """(B,) bits per number: KL of true and modelled step, at t = 0 the code length in 256 levels; epsilon, learned."""
    table = alpha_bar.double()
    costs: list[Tensor] = []
    for b, step in enumerate(t.tolist()):
        channels = clean.shape[1]
        epsilon, v = raw[b, :channels].double(), raw[b, channels:].double()
        image, noisy = clean[b].double(), x[b].double()
        guess = (noisy - (1 - table[step]).sqrt() * epsilon) / table[step].sqrt()
        true, variance, beta = posterior(table, image, noisy, step)
        mean, _, _ = posterior(table, guess, noisy, step)
        least = variance if step else posterior(table, image, noisy, 1)[1]
        share = (v + 1) / 2
        model = Normal(mean, (share * math.log(beta) + (1 - share) * math.log(least)).div(2).exp())
        if step:
            cost = kl_divergence(Normal(true, torch.full_like(true, variance**0.5)), model)
        else:
            upper = torch.where(image > 0.999, torch.ones_like(image), model.cdf(image + 1 / 255))
            lower = torch.where(image < -0.999, torch.zeros_like(image), model.cdf(image - 1 / 255))
            cost = -(upper - lower).clamp(min=1e-12).log()
        costs.append(cost.mean() / math.log(2))
    return torch.stack(costs)

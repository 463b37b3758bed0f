"""The variational bound, for networks that learn the variance of their steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mezzotint.process.prediction import estimate, split
from mezzotint.process.process import Process
from mezzotint.process.schedules import RectifiedFlow

BIN = 1.0 / 255.0  # half a grey level of pixels in [-1, 1]
LEAST = 1e-12  # of a probability whose logarithm is taken


def bound(process: Process, raw: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """(B,) bits per number that a step at timestep t costs: a term of L_vlb (Nichol 2021, eq. 4 to 7).

    KL(q(x_{t-1} | x_t, clean) || p(x_{t-1} | x_t)), and at t = 0 the code length of the image in grey levels. raw is
    (B, 2 C, h, w), mean and variance; only the variance gets a gradient (section 3.1): log variance = w log beta +
    (1 - w) log beta~ with w = (v + 1) / 2 (eq. 15). At t = 0, where beta~ is 0, that of t = 1 stands in.
    """
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        raise ValueError("a flow's steps have no variance to learn")
    level = process.levels(t)
    said, v = split(raw, clean.shape[1])
    if v is None:
        raise ValueError(f"the network gives {raw.shape[1]} channels, and no variance")
    alpha_bar = torch.tensor(schedule.alpha_bar(), dtype=torch.float64, device=t.device)
    before = torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1]))
    beta = 1 - alpha_bar / before
    small = beta * (1 - before) / (1 - alpha_bar)
    small[0] = small[1]

    def at(table: Tensor) -> Tensor:
        return table[t.long()].float().view(-1, 1, 1, 1)

    x = process.noised(clean, noise, level)
    guess = estimate(process.prediction, said.detach(), x, level).clean
    of_clean, of_x = at(beta * before.sqrt() / (1 - alpha_bar)), at((1 - before) * (1 - beta).sqrt() / (1 - alpha_bar))
    true, mean = of_clean * clean + of_x * x, of_clean * guess + of_x * x  # (B, C, h, w)
    true_log, w = at(small.log()), (v + 1) / 2
    mean_log = w * at(beta.log()) + (1 - w) * true_log
    divergence = (mean_log - true_log + (true_log - mean_log).exp() + (true - mean) ** 2 * (-mean_log).exp() - 1) / 2
    cost = torch.where(t.view(-1, 1, 1, 1) == 0, _code_length(clean, mean, mean_log / 2), divergence)
    return cost.flatten(1).mean(1) / math.log(2)


def _code_length(clean: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """-log of the probability of each number's grey level under a normal distribution; the outermost reach outwards."""
    scale = torch.exp(-log_deviation)
    above, below = (_normal_cdf((clean - mean + side) * scale) for side in (BIN, -BIN))
    inner = torch.log((above - below).clamp(min=LEAST))
    low, high = torch.log(above.clamp(min=LEAST)), torch.log((1 - below).clamp(min=LEAST))
    return -torch.where(clean < -0.999, low, torch.where(clean > 0.999, high, inner))


def _normal_cdf(z: Tensor) -> Tensor:
    return (1 + torch.erf(z / math.sqrt(2))) / 2

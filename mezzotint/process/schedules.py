"""Noise schedules: how much signal is left at each moment of the network's clock.

Variance-preserving schedules are tables over whole timesteps 0..T-1; a rectified flow is the straight line between
clean and noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process.level import Level, from_ratio

Betas = Literal["linear", "scaled_linear", "cosine"]
LowEnd = Literal["twice", "once", "even"]
MuRule = Literal["none", "linear", "flux2"]

# Where a finite sigma / alpha is needed at zero terminal SNR, alpha_bar = 2^-24 stands in (the reference's choice).
LARGEST_RATIO = math.sqrt(2.0**24 - 1.0)


@dataclass(frozen=True, slots=True)
class Discrete:
    """A variance-preserving table of alpha_bar over T whole timesteps (Ho 2020, eq. 4), alpha = sqrt(alpha_bar).

    The network is told `tick` times the timestep: 1000 / T where it was trained under rescaled timesteps (Nichol 2021).
    """

    betas: Betas
    beta_start: float = 1e-4
    beta_end: float = 0.02
    timesteps: int = 1000
    zero_terminal_snr: bool = False
    tick: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.beta_start < self.beta_end < 1.0 and self.timesteps >= 2):
            raise InputError(
                f"a schedule cannot have {self.timesteps} timesteps and beta {self.beta_start:g}..{self.beta_end:g}: "
                "use at least 2 timesteps and 0 <= beta_start < beta_end < 1"
            )
        if not self.tick > 0.0:
            raise InputError(f"a schedule's tick ({self.tick:g}) must be above 0: it is 1000 / timesteps, or 1")

    @property
    def clock(self) -> float:
        return self.tick * self.timesteps

    @property
    def name(self) -> str:
        return f"{self.betas} with zero terminal SNR" if self.zero_terminal_snr else self.betas

    def alpha_bar(self) -> tuple[float, ...]:
        """alpha_bar[t] = prod (1 - beta), in float32 steps because published weights were trained under that table."""
        return _alpha_bar(self)

    def level(self, t: float) -> Level[float]:
        """The level at timestep t of the table; a fraction lies between its neighbours in sigma / alpha."""
        table, low = _alpha_bar(self), math.floor(t)
        if not 0 <= t <= len(table) - 1:
            raise InputError(
                f"timestep {t:g} is outside the schedule's 0..{len(table) - 1}: use fewer steps or a smaller offset"
            )
        if low == t:
            return Level(self.tick * t, math.sqrt(table[low]), math.sqrt(1.0 - table[low]))
        return from_ratio(self.tick * t, self.ratio(t))

    def levels(self, t: Tensor) -> Level[Tensor]:
        """The float32 levels of a batch of whole timesteps t (B,)."""
        table = torch.tensor(_alpha_bar(self), dtype=torch.float64, device=t.device)[t.long()].view(-1, 1, 1, 1)
        told = t if self.tick == 1.0 else self.tick * t
        return Level(told, table.sqrt().float(), (1.0 - table).sqrt().float())

    def ratios(self) -> tuple[float, ...]:
        """sigma / alpha at every timestep, finite also at zero terminal SNR."""
        return _ratios(self)

    def ratio(self, t: float) -> float:
        """sigma / alpha at t, linear between two timesteps, as k-diffusion interpolates."""
        table, low = _ratios(self), min(math.floor(t), self.timesteps - 2)
        return table[low] + (t - low) * (table[low + 1] - table[low])


@dataclass(frozen=True, slots=True)
class RectifiedFlow:
    """x = (1 - s) clean + s noise (Liu 2022; Lipman 2022); the network is told t = clock * s.

    `shift` bends the levels of a path, s' = shift s / (1 + (shift - 1) s) (Esser 2024, eq. 23). `mu` names a rule that
    sets shift = exp(mu) from the number of image tokens instead. `low_end` says where the n levels end before the
    shift: `even` at 1/n, `once` at 1/1000, `twice` at 1/1000 shifted already, so shifted twice (SD 3.5's own code and
    FlowMatchEuler; same at shift 1).
    """

    shift: float = 1.0
    low_end: LowEnd = "twice"
    mu: MuRule = "none"
    clock: float = 1000.0

    def __post_init__(self) -> None:
        if not (self.shift > 0.0 and self.clock > 0.0):
            raise InputError(f"a flow's shift ({self.shift:g}) and clock ({self.clock:g}) must be above 0")

    @property
    def name(self) -> str:
        return "rectified_flow"

    def level(self, t: float) -> Level[float]:
        if not 0.0 <= t <= self.clock:
            raise InputError(
                f"time {t:g} is outside the flow's clock 0..{self.clock:g}: give t in the network's own clock"
            )
        return Level(t, 1.0 - t / self.clock, t / self.clock)

    def levels(self, t: Tensor) -> Level[Tensor]:
        """The float32 levels of a batch of times t (B,) on the network's clock."""
        sigma = (t.double() / self.clock).view(-1, 1, 1, 1)
        return Level(t, (1.0 - sigma).float(), sigma.float())

    def shift_for(self, steps: int, tokens: int | None) -> float:
        """The shift of a path of `steps` steps over `tokens` image tokens."""
        if self.mu == "none":
            return self.shift
        if tokens is None:
            raise InputError(
                f"the schedule's shift rule '{self.mu}' depends on the image size: give the number of image tokens"
            )
        return math.exp(flux2_mu(tokens, steps) if self.mu == "flux2" else linear_mu(tokens))


Schedule = Discrete | RectifiedFlow


def linear(beta_start: float = 1e-4, beta_end: float = 0.02, timesteps: int = 1000) -> Discrete:
    """beta rises evenly (Ho 2020): DDPM, ADM above 64 pixels, DiT."""
    return Discrete("linear", beta_start, beta_end, timesteps)


def scaled_linear(beta_start: float = 0.00085, beta_end: float = 0.012, timesteps: int = 1000) -> Discrete:
    """sqrt(beta) rises evenly (Rombach 2022): latent diffusion, Stable Diffusion 1, 2 and XL."""
    return Discrete("scaled_linear", beta_start, beta_end, timesteps)


def cosine(timesteps: int = 1000) -> Discrete:
    """alpha_bar(t) = cos^2((t/T + 0.008) / 1.008 * pi/2), beta at most 0.999 (Nichol 2021, eq. 17): iDDPM, ADM-64."""
    return Discrete("cosine", 0.0, 0.999, timesteps)


def zero_terminal_snr(schedule: Discrete) -> Discrete:
    """The same schedule with sqrt(alpha_bar) shifted and scaled to end in pure noise (Lin 2023, algorithm 1)."""
    return replace(schedule, zero_terminal_snr=True)


def rectified_flow(
    shift: float = 1.0, low_end: LowEnd = "twice", mu: MuRule = "none", clock: float = 1000.0
) -> RectifiedFlow:
    """The straight line from clean to noise; see RectifiedFlow for the arguments."""
    return RectifiedFlow(shift, low_end, mu, clock)


def sd35() -> RectifiedFlow:
    """Stable Diffusion 3.5: static shift 3, doubled at the low end as in its own code."""
    return RectifiedFlow(shift=3.0, low_end="twice")


def flux2() -> RectifiedFlow:
    """FLUX.2: levels end at 1/n, shifted by the empirical mu of image tokens and steps."""
    return RectifiedFlow(low_end="even", mu="flux2")


def shifted(sigma: float, shift: float) -> float:
    """s' = shift s / (1 + (shift - 1) s) (Esser 2024, eq. 23); FLUX's e^mu / (e^mu + 1/s - 1) is shift = exp(mu)."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def linear_mu(tokens: int) -> float:
    """mu on the line through 0.5 at 256 tokens and 1.15 at 4096 (FLUX.1; SD 3's dynamic shifting)."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def flux2_mu(tokens: int, steps: int) -> float:
    """FLUX.2's empirical mu: lines fitted at 10 and 200 steps, joined linearly; above 4300 tokens the second alone."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + at_200 - 200.0 * slope


@lru_cache(maxsize=32)
def _alpha_bar(schedule: Discrete) -> tuple[float, ...]:
    betas = _betas(schedule)
    alpha_bar = torch.cumprod(1.0 - betas, 0)
    if schedule.zero_terminal_snr:
        root = alpha_bar.sqrt()
        squared = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        ratios = torch.cat([squared[:1], squared[1:] / squared[:-1]])
        # Through betas and back, as whoever trained with such a schedule did: it costs the last digits.
        alpha_bar = torch.cumprod(1.0 - (1.0 - ratios), 0)
    return tuple(float(a) for a in alpha_bar)


@lru_cache(maxsize=32)
def _ratios(schedule: Discrete) -> tuple[float, ...]:
    return tuple(math.sqrt((1.0 - a) / a) if a > 0.0 else LARGEST_RATIO for a in _alpha_bar(schedule))


def _betas(schedule: Discrete) -> Tensor:
    total = schedule.timesteps
    if schedule.betas == "linear":
        return torch.linspace(schedule.beta_start, schedule.beta_end, total, dtype=torch.float32)
    if schedule.betas == "scaled_linear":
        return torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, total, dtype=torch.float32) ** 2
    keep = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
    return torch.tensor([min(1 - b / a, schedule.beta_end) for a, b in pairwise(keep)])

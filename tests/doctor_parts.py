"""What the doctor's tests share: a network that is exactly right, in closed form, and data that it is right about."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from parts import model, pixel_codec
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.contract import ClassFacts, GuidanceFacts, SamplingFacts
from mezzotint.data.folder import NO_LABEL
from mezzotint.doctor.case import Case
from mezzotint.doctor.pictures import Pictures
from mezzotint.families import Model
from mezzotint.process import Discrete, Prediction, Process, RectifiedFlow, prediction
from mezzotint.process.level import Level

SIDE, CHANNELS, RANK = 8, 3, 6
CLASSES = ("first", "second", "third")


@dataclass(frozen=True)
class World:
    """Images = the mean of their class + sum_j s_j z_j u_j with z standard normal: a Gaussian of low rank."""

    means: Tensor  # (K + 1, C, h, w), the last one that of all
    basis: Tensor  # (R, C h w) orthonormal
    sizes: Tensor  # (R,)

    @staticmethod
    def made(seed: int = 0, apart: float = 0.25) -> World:
        rng = torch.Generator().manual_seed(seed)
        flat = torch.eye(CHANNELS).repeat_interleave(SIDE * SIDE, 0)  # (C h w, C): the brightness of each channel
        directions = torch.cat([flat, torch.randn(len(flat), RANK - CHANNELS, generator=rng)], dim=1)
        basis = torch.linalg.qr(directions)[0].T
        sizes = torch.linspace(5.0, 8.0, RANK)
        means = apart * torch.randn(len(CLASSES) + 1, CHANNELS, SIDE, SIDE, generator=rng)
        means = means - means[:-1].mean(0)
        means = torch.cat([means[:-1], torch.zeros_like(means[:1])])
        return World(means, basis, sizes)

    def draw(self, labels: Tensor, seed: int = 0) -> Tensor:
        """(N, C, h, w)."""
        z = torch.randn(len(labels), RANK, generator=torch.Generator().manual_seed(seed + 77))
        return self.means[labels] + ((z * self.sizes) @ self.basis).view(-1, CHANNELS, SIDE, SIDE)


class Exact(nn.Module):
    """E[clean | x] of a world under a process of its own, said in that process's terms.

    clean = m + sum_j alpha s_j^2 / (alpha^2 s_j^2 + sigma^2) <u_j, x - alpha m> u_j, where alpha and sigma follow from
    what the network is told. `sharp` gives x's own z_j in full instead, as a distilled network does.
    """

    def __init__(self, world: World, process: Process, sharp: bool = False, deaf: bool = False) -> None:
        super().__init__()
        self.world, self.process, self.sharp, self.deaf = world, process, sharp, deaf
        self.config = SimpleNamespace()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def level(self, t: Tensor) -> Level[Tensor]:
        schedule = self.process.schedule
        if isinstance(schedule, RectifiedFlow):
            sigma = (t / schedule.clock).clamp(0, 1)
            return Level(t, (1 - sigma).view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1))
        assert isinstance(schedule, Discrete)
        place = (t / schedule.tick).clamp(0, schedule.timesteps - 1)
        table = torch.tensor(schedule.alpha_bar(), dtype=torch.float64)
        low = place.floor().long().clamp(max=schedule.timesteps - 2)
        part = place.double() - low
        bar = table[low] * (1 - part) + table[low + 1] * part
        return Level(t, bar.sqrt().float().view(-1, 1, 1, 1), (1 - bar).sqrt().float().view(-1, 1, 1, 1))

    def forward(self, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        level, world = self.level(t.float()), self.world
        null = torch.full((len(x),), len(CLASSES))
        label = null if told.label is None or self.deaf else told.label
        mean = world.means[label]
        seen = (x - level.alpha * mean).flatten(1) @ world.basis.T  # (B, R)
        alpha, sigma = level.alpha.view(-1, 1), level.sigma.view(-1, 1)
        weight = alpha * world.sizes**2 / (alpha**2 * world.sizes**2 + sigma**2)
        if self.sharp:
            weight = world.sizes / (alpha**2 * world.sizes**2 + sigma**2).sqrt()
        clean = mean + ((weight * seen) @ world.basis).view_as(x)
        noise = (x - level.alpha * clean) / level.sigma.clamp(min=1e-4)
        return prediction.target(self.process.prediction, clean, noise, level)


def examined(
    claimed: Process, true: Process | None = None, count: int = 24, steered: bool = False, **changes: Any
) -> Case:
    """A case whose network is exact under `true` (by default under the claim) and whose files claim `claimed`."""
    world = changes.pop("world", World.made())
    sharp, deaf = changes.pop("sharp", False), changes.pop("deaf", False)
    facts: dict[str, Any] = {"process": claimed, "size": (SIDE, SIDE)}
    if steered:
        facts["classes"] = ClassFacts(names=CLASSES, null=len(CLASSES))
        facts["guidance"] = GuidanceFacts(dropout=0.1, scale=1.0)
    flow = isinstance(claimed.schedule, RectifiedFlow)
    facts["sampling"] = SamplingFacts(sampler="flow_euler" if flow else "ddim", steps=20)
    facts |= changes.pop("facts", {})
    network = Exact(world, true or claimed, sharp, deaf).eval()
    found: Model = model(network, pixel_codec(CHANNELS), **facts)
    drawn = torch.arange(count) % len(CLASSES)
    pixels = changes.pop("pixels", None)
    labels = changes.pop("labels", drawn)
    if pixels is None:
        pixels = world.draw(drawn if steered else torch.full((count,), len(CLASSES)))
    data = Pictures(
        Path("images"), tuple(f"{i}.png" for i in range(count)), pixels, ("",) * count,
        labels if steered else torch.full((count,), NO_LABEL), count,
    )  # fmt: skip
    return Case(Path("model"), found, data, **changes)


FLOW = Process(RectifiedFlow(), Prediction.FLOW)
EPSILON = Process(Discrete("scaled_linear", 0.00085, 0.012), Prediction.EPSILON)
VELOCITY = Process(Discrete("scaled_linear", 0.00085, 0.012), Prediction.VELOCITY)
CLEAN = Process(Discrete("cosine", 0.0, 0.999), Prediction.CLEAN)
ZERO = Process(Discrete("scaled_linear", 0.00085, 0.012, zero_terminal_snr=True), Prediction.VELOCITY)

"""What the doctor's tests share: a network that is exactly right, in closed form, and data that it is right about."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

SIDE, CHANNELS, KINDS = 8, 3, 64
CLASSES = ("first", "second", "third")


@dataclass(frozen=True)
class World:
    """A mixture of Gaussians: image = p_m + sum_j s_j z_j u_j + tau n, with 64 patterns p_m to each class.

    The u_j are the brightness of each channel; z and n are standard normal.
    """

    patterns: Tensor  # (M, C h w)
    basis: Tensor  # (C, C h w) orthonormal
    sizes: Tensor  # (C,)
    tau: float = 0.1

    @staticmethod
    def made(seed: int = 0, size: float = 0.6, brightness: float = 3.0) -> World:
        rng = torch.Generator().manual_seed(seed + 12345)  # not the numbers of the noise
        basis = torch.eye(CHANNELS).repeat_interleave(SIDE * SIDE, 1) / SIDE
        patterns = size * torch.randn(KINDS * len(CLASSES), CHANNELS * SIDE * SIDE, generator=rng)
        patterns = patterns * torch.tensor([0.5, 1.0, 1.5]).repeat_interleave(SIDE * SIDE)  # channels differ
        patterns = patterns + 0.5 * size * (torch.arange(len(patterns)) // KINDS - 1.0)[:, None]  # and so do classes
        return World(patterns - patterns.mean(0), basis, torch.full((CHANNELS,), brightness))

    def draw(self, labels: Tensor, seed: int = 0) -> Tensor:
        """(N, C, h, w) of classes (N,); len(CLASSES) is any of them."""
        rng = torch.Generator().manual_seed(seed + 77)
        kinds = torch.randint(KINDS, labels.shape, generator=rng)
        free = torch.randint(len(self.patterns), labels.shape, generator=rng)
        which = torch.where(labels == len(CLASSES), free, labels * KINDS + kinds)
        z = torch.randn(len(labels), len(self.sizes), generator=rng)
        n = torch.randn(len(labels), self.patterns.shape[1], generator=rng)
        return (self.patterns[which] + (z * self.sizes) @ self.basis + self.tau * n).view(-1, CHANNELS, SIDE, SIDE)


class Exact(nn.Module):
    """E[clean | x] of a world under a process of its own, said in that process's terms.

    With d = x - alpha p_m, b = U d and V = s^2 + tau^2: the weight of pattern m is the softmax of
    -1/2 [(|d|^2 - |b|^2) / (alpha^2 tau^2 + sigma^2) + sum_j b_j^2 / (alpha^2 V_j + sigma^2)], and given it the image
    is p_m + alpha tau^2 / (alpha^2 tau^2 + sigma^2) (d - U' b) + U' alpha V / (alpha^2 V + sigma^2) b.
    `sharp` gives the likeliest pattern alone and all of its brightness, as a distilled network does.
    """

    def __init__(self, world: World, process: Process, sharp: bool = False, deaf: bool = False) -> None:
        super().__init__()
        self.world, self.process, self.sharp, self.deaf = world, process, sharp, deaf
        self.config = SimpleNamespace()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def level(self, t: Tensor) -> Level[Tensor]:
        """(B, 1) alpha and sigma of what the network is told."""
        schedule = self.process.schedule
        if isinstance(schedule, RectifiedFlow):
            sigma = (t / schedule.clock).clamp(0, 1).view(-1, 1)
            return Level(t, 1 - sigma, sigma)
        assert isinstance(schedule, Discrete)
        place = (t / schedule.tick).clamp(0, schedule.timesteps - 1)
        table = torch.tensor(schedule.alpha_bar(), dtype=torch.float64)
        low = place.floor().long().clamp(max=schedule.timesteps - 2)
        part = place.double() - low
        bar = table[low] * (1 - part) + table[low + 1] * part
        return Level(t, bar.sqrt().float().view(-1, 1), (1 - bar).sqrt().float().view(-1, 1))

    def forward(self, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        world, level = self.world, self.level(t.float())
        alpha, sigma = level.alpha, level.sigma
        flat = x.flatten(1)
        d = flat[:, None] - alpha[:, None] * world.patterns  # (B, M, D)
        b = d @ world.basis.T  # (B, M, C)
        small, large = alpha**2 * world.tau**2 + sigma**2, alpha**2 * (world.sizes**2 + world.tau**2) + sigma**2
        distance = ((d**2).sum(-1) - (b**2).sum(-1)) / small + (b**2 / large[:, None]).sum(-1)  # (B, M)
        if told.label is not None and not self.deaf:
            kind = torch.arange(len(world.patterns)) // KINDS
            barred = (kind != told.label[:, None]) & (told.label != len(CLASSES))[:, None]
            distance = distance.masked_fill(barred, float("inf"))
        weight = (-distance / 2).softmax(-1)
        if self.sharp:
            weight = nn.functional.one_hot(weight.argmax(-1), weight.shape[-1]).to(weight)
        fine = (alpha * world.tau**2 / small)[..., None] * (d - b @ world.basis)
        bright = ((alpha * (world.sizes**2 + world.tau**2) / large)[:, None] * b) @ world.basis
        clean = (weight[..., None] * (world.patterns + fine + bright)).sum(1)
        noise = (flat - alpha * clean) / sigma.clamp(min=1e-4)
        return prediction.target(self.process.prediction, clean, noise, level).view_as(x)


class Guided(nn.Module):
    """What a label changes times a scale, none + scale (own - none): distilled guidance, or labels heard too weakly."""

    def __init__(self, network: Exact, scale: float) -> None:
        super().__init__()
        self.network, self.guidance, self.config = network, scale, network.config

    def forward(self, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        assert told.label is not None
        none = self.network(x, t, replace(told, label=torch.full_like(told.label, len(CLASSES))))
        return none + self.guidance * (self.network(x, t, told) - none)


class Babbling(nn.Module):
    """Each label adds a pattern of its own that has nothing to do with the images, of so large a deviation; or none
    does but the one that stands for no label."""

    def __init__(self, network: Exact, size: float, silence: bool = False) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        rng = torch.Generator().manual_seed(8)
        self.added = size * torch.randn(len(CLASSES) + 1, CHANNELS, SIDE, SIDE, generator=rng)
        if silence:
            self.added[:-1] = 0

    def forward(self, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        return self.network(x, t, told) + (0 if told.label is None else self.added[told.label])


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
    network: nn.Module = Exact(world, true or claimed, sharp, deaf).eval()
    if (scale := changes.pop("guided", None)) is not None:
        network = Guided(network, scale)
    if (size := changes.pop("babble", None)) is not None:
        network = Babbling(network, size)
    if (size := changes.pop("astray", None)) is not None:
        network = Babbling(network, size, silence=True)
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

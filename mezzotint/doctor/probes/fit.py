"""What the network has learned: too little, its training images by heart, one picture only, at the cost of the base."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint import images
from mezzotint.data.folder import NO_LABEL
from mezzotint.doctor import pictures, readings
from mezzotint.doctor.case import Case, Drawn
from mezzotint.doctor.finding import Checked, Exhibit, Finding, Measure, NotChecked, Plot
from mezzotint.doctor.probes import trace
from mezzotint.doctor.probes.data import sheet
from mezzotint.doctor.readings import RATIOS, Score
from mezzotint.doctor.statistics import Mean, mean
from mezzotint.families import Model
from mezzotint.families.model import working
from mezzotint.process import Level

MIDDLE = slice(2, 5)  # of RATIOS: sigma / alpha from 0.4 to 2.5, where a network has most to say
NOISY = 5  # of RATIOS: sigma / alpha = 6.7, where of an image that is not known by heart hardly anything is left
LEARNED = -0.1
COPY, COPIES = 0.5, 0.25
DIVERSE = 0.35
FORGOTTEN = 0.7
SIDE = 32  # pixels of the small copies that pictures are compared by
MOST = 1500  # images of the folder that drawn pictures are compared with
SHOWN = 6
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def examine(case: Case) -> Checked:
    """How well the model fits the user's images, and what of them it draws."""
    latents = case.usable
    own = readings.score(case, readings.claimed(case))
    findings: list[Finding | None] = []
    measures: list[Measure] = []
    curves = {"the images": _curve(own)}
    exhibits: list[Exhibit] = []
    run = trace.read(case.trace) if case.trace is not None and case.trace.is_dir() else None

    learned = mean(own.log_error[:, MIDDLE].mean(1) - _wiener(own, latents)[MIDDLE].mean())
    measures.append(_measure("log error against a linear filter, middle levels", learned, f"below {LEARNED:g}"))
    findings.append(_under(learned, own, run))

    drawn = case.drawn
    if not bool(drawn.latents.isfinite().all()):
        raise NotChecked("what the model draws is not finite: see the other findings")
    curves["its own pictures"] = _curve(score_of(case, case.model, drawn.latents, case.steering.map(
        lambda tensor: tensor[drawn.rows])))  # fmt: skip
    likeness = nearest(case, drawn)
    measures += [
        Measure("share of drawn pictures that are copies", likeness.share, bound=f"below {COPIES:g}"),
        Measure("median distance to the nearest image, over its own to others", float(likeness.ratio.median())),
        _measure("log error at sigma / alpha = 6.7", mean(own.log_error[:, NOISY]), ""),
    ]
    held = _held(case, run)
    if held is not None:
        curves["images kept for validation"] = _curve(held)
        gap = mean(held.log_error.mean(1)), mean(own.log_error.mean(1))
        measures.append(_measure("log error on images kept for validation", gap[0], ""))
    exhibits.append(Exhibit("a drawn picture, the nearest image", likeness.sheet(drawn)))
    findings.append(_memorised(likeness, own, held))

    ratio = diversity(drawn.latents, latents)
    measures.append(_measure("variance of drawn pictures over that of the images", ratio, f"above {DIVERSE:g}"))
    findings.append(_collapsed(case, ratio))

    base = case.base or (case.bare if case.lora else None)
    if base is not None and base.contract.latent.codec == case.bare.contract.latent.codec:
        found, rows, more = forgotten(case, base, own)
        findings.append(found)
        measures += rows
        curves |= more
    plot = Plot("error of denoising, log of its ratio to the best scalar filter", "sigma / alpha", "log error",
                curves, log_x=True)  # fmt: skip
    return Checked(tuple(each for each in findings if each), tuple(measures), (plot,), tuple(exhibits))


def score_of(case: Case, model: Model, latents: Tensor, steering: object) -> Score:
    """How well a model denoises other latents (at most as many as the user gave images)."""
    reading = readings.Reading("", model.process, latents[: len(case.noise)], steering, model)  # pyright: ignore[reportArgumentType]
    return readings.score(case, reading)


def _curve(score: Score) -> list[tuple[float, float]]:
    return list(zip(RATIOS, score.log_error.mean(0).tolist(), strict=True))


def _measure(name: str, value: Mean, bound: str) -> Measure:
    return Measure(name, value.value, value.low, value.high, bound)


# Learned at all.


def wiener_error(clean: Tensor, level: Level[float]) -> Tensor:
    """The error of the best linear filter that is the same everywhere: mean over frequencies k of S_k sigma^2 /
    (alpha^2 S_k + sigma^2), S the power spectrum around the mean image (Wiener 1949)."""
    centred = clean - clean.mean(0)
    spectrum = torch.fft.fft2(centred, norm="ortho").abs().square().mean(0) * len(clean) / max(len(clean) - 1, 1)
    return (spectrum * level.sigma**2 / (level.alpha**2 * spectrum + level.sigma**2)).mean()


def _wiener(score: Score, clean: Tensor) -> Tensor:
    """(K,) log error of the linear filter against the scalar one."""
    levels = [readings.level_at(score.reading.process.schedule, ratio) for ratio in RATIOS]
    return torch.stack([(wiener_error(clean, x) / readings.scalar_error(clean, x)).log() for x in levels])


def _under(learned: Mean, own: Score, run: trace.Run | None) -> Finding | None:
    if learned.low <= LEARNED:
        return None
    return Finding(
        "fit.under", "harmful",
        f"{learned.value:+.2f}", "Train longer.", run.again("steps=1") if run else "",
        strength=2.0,
    )  # fmt: skip


# By heart.


@dataclass(frozen=True)
class Nearest:
    ratio: Tensor  # (M,) distance to the nearest image, over that image's distance to others
    index: Tensor  # (M,)
    pixels: Tensor  # (N, P, H, W) small copies of the folder

    @property
    def share(self) -> float:
        return float((self.ratio < COPY).float().mean())

    def sheet(self, drawn: Drawn):
        order = self.ratio.argsort()[:SHOWN].tolist()
        left = images.to_images(drawn.pixels[order])
        right = images.to_images(self.pixels[self.index[order]])
        return sheet(list(zip(left, right, strict=True)))


def nearest(case: Case, drawn: Drawn) -> Nearest:
    width, height = case.bare.contract.size
    size = max(1, round(SIDE * width / max(width, height))), max(1, round(SIDE * height / max(width, height)))
    assert case.folder is not None
    every = pictures.read(case.folder, size, case.bare.codec.pixel_channels, MOST).pixels
    ours = F.interpolate(drawn.pixels.clamp(-1, 1), (size[1], size[0]), mode="bicubic", antialias=True).clamp(-1, 1)
    among = torch.cdist(every.flatten(1), every.flatten(1))
    for flip in FLIPS[1:]:
        among = torch.minimum(among, torch.cdist(every.flip(flip).flatten(1), every.flatten(1)))
    among.fill_diagonal_(float("inf"))
    others = among.topk(min(3, len(every) - 1), largest=False).values.mean(1)
    to = torch.stack([torch.cdist(ours.flip(flip).flatten(1), every.flatten(1)) for flip in FLIPS]).amin(0)
    distance, index = to.min(1)
    return Nearest(distance / others[index], index, every)


def _held(case: Case, run: trace.Run | None) -> Score | None:
    place = run.place((run.recipe.get("data") or {}).get("validation")) if run else None
    if place is None:
        return None
    found = pictures.read(place, case.bare.contract.size, case.bare.codec.pixel_channels, len(case.noise))
    with working(case.bare, "codec"), torch.inference_mode():
        latents = torch.cat(
            [case.bare.codec.encode(p.to(case.bare.device)).float().cpu() for p in found.pixels.split(32)]
        )
    return score_of(case, case.model, latents, case.steered(case.model, found.captions, found.labels))


def _memorised(likeness: Nearest, own: Score, held: Score | None) -> Finding | None:
    if likeness.share < COPIES:
        return None
    return Finding("fit.memorised", "harmful", f"{likeness.share:.0%}", "x", strength=likeness.share / COPIES)


# One picture only.


def diversity(drawn: Tensor, data: Tensor) -> Mean:
    """Variance of what is drawn over that of the data, with the jackknife's error over drawn pictures."""
    reference = data.flatten(1).var(0).sum()
    x = drawn.flatten(1)
    n = len(x)
    whole = float(x.var(0).sum() / reference)
    parts = torch.stack([torch.cat([x[:i], x[i + 1 :]]).var(0).sum() / reference for i in range(n)]).double()
    return Mean(whole, float(((n - 1) / n * (parts - parts.mean()).square().sum()).sqrt()), n)


def _collapsed(case: Case, ratio: Mean) -> Finding | None:
    if ratio.high >= DIVERSE:
        return None
    return Finding("fit.collapsed", "harmful", f"{ratio.value:.2f}", "x", strength=DIVERSE / ratio.value)


# At the cost of the base.


def forgotten(case: Case, base: Model, own: Score):
    count = min(12, len(case.noise))
    changes = {} if base.contract.guidance.embedded else {"guidance": 1.0}
    if base.text is not None:
        changes["prompt"] = ""
    drawn = case.draw(base, count=count, **changes)
    captions = [""] * count
    labels = case.images.labels[drawn.rows] if base.contract.classes else torch.full((count,), NO_LABEL)
    theirs = score_of(case, base, drawn.latents, case.steered(base, captions, labels))
    ours = score_of(case, case.model, drawn.latents, case.steered(case.model, captions, labels))
    before = readings.score(
        case,
        readings.Reading(
            "", base.process, case.usable, case.steered(base, case.images.captions, case.images.labels), base
        ),
    )
    lost, gained = theirs.gain(ours), own.gain(before)
    rows = [
        _measure("log error lost on what the base draws", lost, f"at most {FORGOTTEN:g}"),
        _measure("log error gained on the images over the base", gained, "above 0"),
    ]
    curves = {
        "pictures of the base": _curve(ours),
        "the base on its own pictures": _curve(theirs),
        "the base on the images": _curve(before),
    }
    found = None
    if lost.low > FORGOTTEN:
        found = Finding("fit.forgotten", "harmful", f"{lost.value}", "x")
    return found, rows, curves

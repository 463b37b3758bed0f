"""What a codec keeps of the user's own images: by spatial frequency, and of a thin line drawn onto them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mezzotint import images
from mezzotint.doctor.case import BATCH, Case
from mezzotint.doctor.finding import Checked, Exhibit, Finding, Measure, NotChecked, Plot, measured
from mezzotint.doctor.statistics import Mean, mean, ratio
from mezzotint.families.model import working

FAITHFUL = 0.8  # share of an image's variance that comes back, at least
UNLIKE = 0.6  # the same, down to which images of another kind may account for it
FLAT = 1e-4  # variance of pictures of one colour
CLEAN = 0.9  # the same, above which neither noise nor the loss of what is finest is seen
SHARP = 0.85  # the same within the coarse frequencies, above which what is missing is detail and not the picture
COARSE = 0.5  # the same within the coarse frequencies, below which even shapes are gone
STEADY = 0.05  # by which a finer band may be kept better than a coarser one, by chance
ADDED = 1.1  # power that came out, of what went in, above which a codec adds something of its own
EDGES = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # cycles a pixel
LINE = 0.5  # share of a two-pixel line's contrast below which thin defects are lost


def examine(case: Case) -> Checked:
    """Variance, peak signal-to-noise and each band of frequencies that survive encoding and decoding."""
    pixels = case.images.pixels
    back = through(case, pixels)
    if not bool(back.isfinite().all()):
        return Checked(
            (Finding("latent.reconstruction", "broken", "the codec's pictures are not finite",
                     "Use float32 for the codec, or its own file again.", strength=10),)
        )  # fmt: skip
    error = ((back - pixels) ** 2).flatten(1).mean(1)
    variance = pixels.flatten(1).var(1)
    if float(variance.mean()) < FLAT:
        raise NotChecked("needs images that are not of one colour")
    lost = ratio(error, variance)  # over all images: one that shows little does not count for more
    kept = Mean(1 - lost.value, lost.error, lost.n)
    noise = mean(10 * (4 / error.clamp(min=1e-10)).log10())
    bands = by_frequency(pixels, back)
    contrast = {width: line(case, pixels, width) for width in (1, 2, 3)}
    measures = (
        measured("share of the images' variance that the codec gives back", kept,
                f"at least {FAITHFUL:g}"),
        measured("peak signal-to-noise ratio", noise, unit="dB"),
        *(Measure(f"contrast of a {width}-pixel line that survives", value) for width, value in contrast.items()),
    )  # fmt: skip
    plot = Plot(
        "what the codec keeps by spatial frequency", "cycles a pixel", "share kept",
        {"kept": [(math.sqrt(max(band.low, 1 / 128) * band.high), band.kept) for band in bands]}, log_x=True,
    )  # fmt: skip
    findings: list[Finding] = []
    coarse = [band.kept for band in bands if band.high <= 1 / 32]
    shapes = min(coarse, default=0.0)
    blurred, noisy = _blurred(bands, kept.value), kept.value < CLEAN and _noisy(bands)
    if FAITHFUL > kept.value > UNLIKE and shapes > SHARP and not noisy and not blurred and _fading(bands):
        findings.append(
            Finding(
                "latent.detail", "note",
                f"of these images' variance the codec gives back {100 * kept.value:.0f} % ({noise.value:.1f} dB),"
                " the less the finer: these images hold what it was not trained for",
                "Train its decoder on images like these (method = \"vae\"), or use a codec that was.",
                measures=measures[:2],
            )
        )  # fmt: skip
    elif ((kept.value < FAITHFUL and kept.high < CLEAN) or noisy) and not (shapes > SHARP and blurred):
        findings.append(
            Finding(
                "latent.reconstruction", "broken",
                f"of these images' variance the codec gives back {100 * kept.value:.0f} % ({noise.value:.1f} dB)"
                + (", and it adds noise of its own" if noisy else ""),
                "Use the decoder that belongs to this encoder, undamaged, or train it on these images (method ="
                " \"vae\").",
                strength=max(1.0, (1 - kept.value) / (1 - FAITHFUL)), measures=measures[:2],
            )
        )  # fmt: skip
    elif shapes > COARSE and blurred:
        findings.append(
            Finding(
                "latent.detail", "harmful",
                f"detail of {1 / blurred[0].high:.0f} to {1 / blurred[0].low:.0f} pixels survives at"
                f" {100 * max(blurred[0].kept, 0.0):.0f} %, a 2-pixel line keeps {100 * contrast[2]:.0f} % of its"
                " contrast: cracks, edges and text go first",
                "Use a codec with more channels or a smaller factor, or train its decoder on these images.",
                strength=1.5, measures=measures,
            )
        )  # fmt: skip
    elif contrast[2] < LINE:
        findings.append(
            Finding(
                "latent.detail", "note", f"a 2-pixel line keeps {100 * contrast[2]:.0f} % of its contrast through the"
                                         " codec",
                "For thin defects use a codec with more channels, a smaller factor, or larger pictures.",
                measures=measures[2:],
            )
        )  # fmt: skip
    exhibit = beside(pixels, back)
    return Checked(tuple(findings), measures, (plot,), (exhibit,))


def _fading(bands: Sequence[Band]) -> bool:
    """Whether less is kept the finer it is, and nothing is added: what damage does is not so orderly."""
    falls = all(finer.kept < coarser.kept + STEADY for coarser, finer in pairwise(bands))
    return falls and all(band.power < ADDED for band in bands)


def _blurred(bands: Sequence[Band], kept: float) -> list[Band]:
    """The bands of detail that are nearly gone, where nothing has come in their place, as noise would.

    What is finer than 4 pixels counts where so much of the images is in it that it is missed on the whole.
    """
    if _noisy(bands):
        return []
    fine = [band for band in bands if 1 / 16 <= band.low < (1 / 2 if kept < CLEAN else 1 / 4)]
    return [band for band in fine if band.kept < 0.25 and band.power < 0.5]


def _noisy(bands: Sequence[Band]) -> bool:
    """Whether more comes back than went in, and none of it is the image."""
    return any(band.power > 1.5 and band.kept < 0 for band in bands)


@torch.inference_mode()
def through(case: Case, pixels: Tensor) -> Tensor:
    """(N, P, H, W) encoded and decoded."""
    codec = case.bare.codec
    with working(case.bare, "codec"):
        parts = [codec.decode(codec.encode(part.to(case.bare.device))).float().cpu() for part in pixels.split(BATCH)]
    return torch.cat(parts)


@dataclass(frozen=True, slots=True)
class Band:
    """Frequencies from `low` to `high` cycles a pixel: the share of the power kept, and the power that came out."""

    low: float
    high: float
    kept: float  # 1 - |error|^2 / |image|^2
    power: float  # |result|^2 / |image|^2


def by_frequency(pixels: Tensor, back: Tensor) -> list[Band]:
    """What of the images' power comes back, by bands of radial frequency."""
    height, width = pixels.shape[-2:]
    window = torch.hann_window(height)[:, None] * torch.hann_window(width)[None]

    def power(x: Tensor) -> Tensor:
        centred = x - x.mean((2, 3), keepdim=True)
        return torch.fft.rfft2(centred * window).abs().square().mean((0, 1))  # (H, W / 2 + 1)

    image, error, result = power(pixels), power(back - pixels), power(back)
    radius = (torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2).sqrt()
    found: list[Band] = []
    for low, high in pairwise(EDGES):
        inside = (radius > low) & (radius <= high)
        whole = float(image[inside].sum())
        if whole > 0:
            found.append(Band(low, high, 1 - float(error[inside].sum()) / whole, float(result[inside].sum()) / whole))
    return found


def line(case: Case, pixels: Tensor, width: int, count: int = 8) -> float:
    """The contrast that is left of a dark slanted line of so many pixels, drawn onto the images: a regression slope."""
    _, _, height, across = pixels.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(across), indexing="ij")
    distance = (x * 0.94 + y * 0.34 - 0.6 * across).abs()
    drawn = (width / 2 + 0.5 - distance).clamp(0, 1) * -0.5  # (H, W), half the range darker
    some = pixels[:count].clamp(-0.4, 1)
    change = through(case, some + drawn) - through(case, some)
    return float((change * drawn).sum() / (drawn**2).expand_as(change).sum())


def beside(pixels: Tensor, others: Tensor, count: int = 6) -> Exhibit:
    """Pictures above what became of them."""
    rows = torch.cat([torch.cat(list(part[:count]), dim=2) for part in (pixels, others)], dim=1)
    return Exhibit("images, and the same through the codec", images.to_images(rows[None].clamp(-1, 1))[0])

"""Pixel masks of defects, derived from images that carry only a label for the whole: derived, never annotated.

A cell is compared with its healthy counterfactual, the robust fit of a low-rank model of healthy cells, in which dark
outliers lose their weight. What is darker than the fit, against the spread of healthy cells at the same place and the
texture of the same image, is a candidate: a thin line through a bank of oriented filters, an area through a smoothed
difference. A logistic regression on each candidate's shape and depth, taught by healthy against defective images, keeps
those that healthy cells do not show; its threshold is set on healthy cells.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as pil
from torch import Tensor
from torch.nn import functional as F

from mezzotint import files, images
from mezzotint.data import masks, metadata, solar_cells
from mezzotint.errors import InputError

Floats = NDArray[np.float32]
RANK = {"mono": 60, "poly": 24}  # polycrystalline texture is not low-rank: a higher rank would fit defects too
FALSE_ALARMS = 0.05  # share of healthy images that may keep any candidate
FRAME = 4  # pixels at the border where lines are never searched
SIDES = 9  # the same for vertical lines, which the shaded sides of a cell look like


@dataclass(frozen=True, slots=True)
class HealthyModel:
    """Healthy cells as a mean and directions of variation, with the spread that healthy cells leave unexplained."""

    mean: Tensor  # (P,)
    basis: Tensor  # (K, P) orthonormal
    area_spread: Tensor  # (H, W) 97 % quantile of smoothed darkness over healthy cells
    line_spread: Tensor  # (H, W) the same of the line filters' response

    @classmethod
    def fit(cls, healthy: Tensor, rank: int) -> HealthyModel:
        """From (N, H, W) normalised healthy images: eigenvectors of the Gram matrix, then the spread of residuals."""
        n, height, width = healthy.shape
        flat = healthy.reshape(n, -1)
        mean = flat.mean(0)
        centred = flat - mean
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        top = slice(n - min(rank, n - 1), n)
        basis = (vectors[:, top].T @ centred) / values[top, None].sqrt()
        blank = torch.zeros(height, width)
        bare = cls(mean, basis, blank, blank)
        residual = bare.residual(healthy)
        return cls(
            mean,
            basis,
            torch.quantile(smooth(-residual), 0.97, dim=0),
            torch.quantile(line_response(residual), 0.97, dim=0),
        )

    def residual(self, pictures: Tensor, iterations: int = 12) -> Tensor:
        """(N, H, W) minus the healthy counterfactual; iteratively reweighted least squares with Cauchy weights.

        Darker than the fit counts as an outlier from 1.5 deviations, brighter from 4: defects only take light away.
        The few coefficients are found on every fourth pixel, which is plenty.
        """
        whole = pictures.flatten(1) - self.mean  # (N, P)
        height, width = pictures.shape[1:]
        grid = torch.arange(height * width).view(height, width)[::2, ::2].flatten()
        x, basis = whole[:, grid], self.basis[:, grid]  # (N, Q), (K, Q)
        ridge = 0.0125 * torch.eye(len(basis))
        weight = torch.ones_like(x)
        coefficients = torch.zeros(len(x), len(basis))
        for _ in range(iterations):
            weighted = basis[None] * weight[:, None]  # (N, K, Q)
            normal = weighted @ basis.T + ridge  # (N, K, K)
            coefficients = torch.linalg.solve(normal, (weighted @ x[..., None])[..., 0])  # (N, K)
            residual = x - coefficients @ basis
            deviation = 1.4826 * residual.abs().median(1, keepdim=True).values + 0.01
            weight = 1 / (1 + (residual / (deviation * torch.where(residual < 0, 1.5, 4.0))) ** 2)
        return (whole - coefficients @ self.basis).view_as(pictures)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A connected dark place: where, of what kind, and the numbers it is judged by."""

    mask: masks.Mask
    kind: str  # crack, inactive or finger
    features: Floats


def normalised(pictures: NDArray[np.uint8]) -> Tensor:
    """(N, H, W) float32 with each image's bright level (80 % quantile) at 1; darker than 8 grey levels stays dark."""
    x = torch.from_numpy(pictures.astype(np.float32))
    bright = torch.quantile(x.flatten(1), 0.8, dim=1).clamp_min(8)
    return x / bright[:, None, None]


def smooth(x: Tensor, sigma: float = 1.5) -> Tensor:
    """(N, H, W) blurred by a Gaussian."""
    radius = round(3 * sigma)
    g = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    g = (g / g.sum()).view(1, 1, 1, -1)
    x = F.conv2d(F.pad(x[:, None], (radius,) * 4, mode="reflect"), g)
    return F.conv2d(x, g.transpose(2, 3))[:, 0]


def line_bank(count: int = 16, size: int = 19, width: float = 1.1, length: float = 4.5) -> Tensor:
    """(count, 1, size, size) second derivatives of elongated Gaussians; a line of unit depth gives 1."""
    axis = torch.arange(size) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bank = []
    for angle in torch.arange(count) * torch.pi / count:
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        kernel = (1 - across**2 / width**2) * torch.exp(-0.5 * (across**2 / width**2 + along**2 / length**2))
        kernel = kernel - kernel.mean()
        bank.append(kernel / kernel[across.abs() <= 1].sum())
    return torch.stack(bank)[:, None]


def line_response(residual: Tensor) -> Tensor:
    """Depth of the best-fitting dark line through each pixel (N, H, W); rows lose their median, a misfitted busbar."""
    level = residual - residual.median(2, keepdim=True).values
    bank = line_bank()
    pad = bank.shape[-1] // 2
    padded = F.pad(-level[:, None], (pad,) * 4, mode="reflect")
    return torch.cat([F.conv2d(part, bank).amax(1) for part in padded.split(64)])


def candidates(model: HealthyModel, pictures: Tensor) -> list[list[Candidate]]:
    """For each of (N, H, W) normalised images, its dark places."""
    residual = torch.cat([model.residual(part) for part in pictures.split(32)])
    area = smooth(-residual) - 0.5 * model.area_spread
    # where nearly no light comes from a place that always shines, the fit itself may have followed the defect
    black = (smooth(pictures) < 0.4) & (model.mean.view_as(pictures[0]) > 0.65)
    area = torch.where(black, area.clamp_min(0.6), area)
    line = line_response(residual) - 0.6 * model.line_spread
    return [_of_one(*parts) for parts in zip(residual.numpy(), area.numpy(), line.numpy(), strict=True)]


def _of_one(residual: Floats, area: Floats, line: Floats) -> list[Candidate]:
    noise = [1.4826 * float(np.median(np.abs(a - np.median(a)))) for a in (area, line)]
    inner = np.zeros(area.shape, dtype=bool)
    inner[FRAME:-FRAME, FRAME:-FRAME] = True
    dark = area > max(0.18, 3.5 * noise[0])
    areas = masks.dilate(masks.erode(dark, 3), 3) & dark
    faint, clear = line > max(0.04, 2.5 * noise[1]), line > max(0.07, 5 * noise[1])
    lines = faint & inner & ~masks.dilate(areas, 2)
    found: list[Candidate] = []
    for where, response, certain in ((areas, area, dark), (lines, line, clear)):
        labels, count = masks.components(where)
        flat = labels.ravel()
        sizes = np.bincount(flat, minlength=count + 1)
        strong = np.bincount(flat, weights=certain.ravel().astype(float), minlength=count + 1)
        for i in np.flatnonzero((sizes >= 10) & (strong >= 3)):
            if i == 0:
                continue
            part = labels == i
            found.append(_describe(part, response, residual, noise, areal=where is areas))
    return [c for c in found if c.kind != "finger" or not c.mask[:, [*range(SIDES), *range(-SIDES, 0)]].any()]


def _describe(part: masks.Mask, response: Floats, residual: Floats, noise: list[float], areal: bool) -> Candidate:
    y, x = np.nonzero(part)
    points = np.stack((x - x.mean(), y - y.mean()))
    values, vectors = np.linalg.eigh(np.cov(points) + 0.05 * np.eye(2))
    major, minor = float(np.sqrt(values[1])), float(np.sqrt(values[0]))
    upright = abs(float(vectors[1, 1]))  # 1: vertical
    flat = abs(float(vectors[0, 1]))
    height, width = part.shape
    edge = min(x.min(), y.min(), width - 1 - x.max(), height - 1 - y.max()) / width
    kind = "inactive" if areal else "finger" if upright > 0.99 and minor < 1.8 else "crack"
    depth = response[part]
    features = np.array([
        np.log(len(x)), np.log(major), np.log(minor), upright**8, flat**8, depth.mean(), depth.max(),
        depth.mean() / (noise[int(not areal)] + 0.01), -residual[part].mean(), float(edge < 0.04), noise[0], noise[1],
    ], dtype=np.float32)  # fmt: skip
    return Candidate(part, kind, features)


@dataclass(frozen=True, slots=True)
class Judge:
    """Logistic regression on candidates of one kind: above the threshold healthy cells (nearly) never show the like."""

    mean: Floats
    deviation: Floats
    weights: Floats  # (F + 1,), the bias last
    threshold: float

    def score(self, features: Floats) -> float:
        return float((features - self.mean) / self.deviation @ self.weights[:-1] + self.weights[-1])

    @classmethod
    def fit(cls, healthy: list[list[Floats]], defective: list[list[Floats]], false_alarms: float) -> Judge:
        """Newton's method on the penalised likelihood; a share of healthy images may keep any."""
        rows = [f for image in healthy for f in image], [f for image in defective for f in image]
        x = np.array([*rows[0], *rows[1]], dtype=np.float64)
        y = np.array([0.0] * len(rows[0]) + [1.0] * len(rows[1]))
        mean, deviation = x.mean(0), x.std(0) + 1e-6
        design = np.concatenate(((x - mean) / deviation, np.ones((len(x), 1))), 1)
        balance = np.where(y > 0, 0.5 / max(y.sum(), 1), 0.5 / max((1 - y).sum(), 1)) * len(y)
        w = np.zeros(design.shape[1])
        for _ in range(25):
            p = 1 / (1 + np.exp(-np.clip(design @ w, -30, 30)))
            gradient = design.T @ (balance * (y - p)) - w
            hessian = (design.T * (balance * p * (1 - p))) @ design + np.eye(len(w))
            w = w + np.linalg.solve(hessian, gradient)
        bare = cls(mean.astype(np.float32), deviation.astype(np.float32), w.astype(np.float32), 0.0)
        best = [max((bare.score(f) for f in image), default=-np.inf) for image in healthy]
        threshold = max(float(np.quantile(best, 1 - false_alarms, method="higher")), 0.0)
        return cls(bare.mean, bare.deviation, bare.weights, threshold)


def derive(
    folder: Path,
    out: Path,
    progress: Callable[[int, int], None] | None = None,
    types: tuple[str, ...] = solar_cells.TYPES,
) -> dict[str, int]:
    """From a solar-cell training folder, write `out`: healthy cells, and each defective cell once per kind of defect.

    Rows of `out` hold file_name, text, label (type and kind), mask, and `mask_origin` "derived". Returns how many rows
    each class got. Healthy model, judges and thresholds come from this folder alone.
    """
    rows = metadata.rows(folder)
    if not all("type" in row and "probability" in row for row in rows):
        raise InputError(f"{folder}: rows need 'type' and 'probability' (a folder from the solar-cell package).")
    out = Path(out)
    result: list[dict[str, object]] = []
    done = 0
    for cell_type in types:
        chosen = [row for row in rows if row["type"] == cell_type]
        if sum(row["probability"] == 0 for row in chosen) < 2:
            raise InputError(f"{folder}: no {cell_type} cells that are surely healthy: two at least, better hundreds.")
        grey = np.stack([np.asarray(images.read(Path(folder) / row["file_name"]).convert("L")) for row in chosen])
        pictures = normalised(grey)
        sound = torch.tensor([row["probability"] == 0 for row in chosen])
        model = HealthyModel.fit(pictures[sound], RANK[cell_type])
        found: list[list[Candidate]] = []
        for part in pictures.split(64):
            found += candidates(model, part)
            done += len(part)
            if progress:
                progress(done, len(rows))
        judges = _judges(chosen, found)
        for row, picture, of_image in zip(chosen, grey, found, strict=True):
            result += _rows(out, row, picture, of_image, judges)
    metadata.write(out, result)
    names = [str(solar_cells.CLASSES[int(str(row["label"]))]) for row in result]
    return {name: names.count(name) for name in solar_cells.CLASSES}


def _judges(rows: list[dict[str, object]], found: list[list[Candidate]]) -> dict[str, Judge]:
    judges: dict[str, Judge] = {}
    for kind in solar_cells.KINDS[1:]:
        of_kind = [[c.features for c in image if c.kind == kind] for image in found]
        healthy = [f for f, row in zip(of_kind, rows, strict=True) if row["probability"] == 0]
        defective = [f for f, row in zip(of_kind, rows, strict=True) if row["probability"] == 1]
        if any(defective):
            judges[kind] = Judge.fit(healthy, defective, FALSE_ALARMS / 3)
    return judges


def _rows(
    out: Path, row: dict[str, object], picture: NDArray[np.uint8], found: list[Candidate], judges: dict[str, Judge]
) -> list[dict[str, object]]:
    """One row for a healthy cell, one per kind of defect for another, none where nothing certain was found."""
    kept = [c for c in found if c.kind in judges and judges[c.kind].score(c.features) > judges[c.kind].threshold]
    name, text, cell_type = str(row["file_name"]), str(row["text"]), str(row["type"])
    if row["probability"] == 0:
        content = {"healthy": None}
    else:
        content = {kind: [c.mask for c in kept if c.kind == kind] for kind in solar_cells.KINDS[1:]}
        content = {kind: np.any(parts, axis=0) for kind, parts in content.items() if parts}
    result: list[dict[str, object]] = []
    for kind, mask in content.items():
        stem = Path(name).stem
        file = f"{stem}.png" if mask is None else f"{stem}.{kind}.png"
        files.write_with(out / file, lambda path: pil.fromarray(picture).save(path, format="PNG"))
        entry = {"file_name": file, "text": text, "label": solar_cells.CLASSES.index(f"{cell_type} {kind}"),
                 "type": cell_type, "probability": row["probability"], "source": name}  # fmt: skip
        if mask is not None:
            grey = pil.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
            files.write_with(out / f"masks/{stem}.{kind}.png", lambda path, grey=grey: grey.save(path, format="PNG"))
            entry |= {"mask": f"masks/{stem}.{kind}.png", "mask_origin": "derived"}
        result.append(entry)
    return result

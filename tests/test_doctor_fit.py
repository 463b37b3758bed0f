"""The doctor's look at what was learned, on networks whose answer is known in closed form.

The images are x = mean + sum_k z_k b_k with fixed local blots b_k and standard normal z: the best denoiser of that
Gaussian is linear, knows where the blots are and draws new ones. A network that knows its training images by heart is
the posterior mean over them; one that draws a single picture that over one image.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parts
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mezzotint.conditioning import Conditioning
from mezzotint.contract import SamplingFacts
from mezzotint.doctor import filters, pictures, statistics
from mezzotint.doctor.case import DRAWN, Case
from mezzotint.doctor.finding import Checked, Finding, NotChecked
from mezzotint.doctor.probes import fit
from mezzotint.families import Model
from mezzotint.process import Level

SIDE, BLOTS = 16, 30


def blots() -> Tensor:
    """(K, D) local patterns that overlap little."""
    rng = torch.Generator().manual_seed(7)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = torch.rand(BLOTS, 2, generator=rng) * SIDE
    shapes = torch.exp(-((y - places[:, 0, None, None]) ** 2 + (x - places[:, 1, None, None]) ** 2) / 4)
    colours = torch.randn(BLOTS, 3, 1, 1, generator=rng)
    return 0.35 * (colours * shapes[:, None]).flatten(1)


def world(count: int, seed: int) -> Tensor:
    """(count, 3, SIDE, SIDE) images."""
    z = torch.randn(count, BLOTS, generator=torch.Generator().manual_seed(seed))
    return (z @ blots()).view(count, 3, SIDE, SIDE).clamp(-1, 1)


class Closed(nn.Module):
    """An epsilon network from its estimate of the clean image."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.weight = nn.Parameter(torch.zeros(1))

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        level: Level[Tensor] = parts.EPSILON.levels(t)
        alpha, sigma = (part.view(-1, 1) for part in (level.alpha, level.sigma))
        flat = x.flatten(1)
        return ((flat - alpha * self.clean(flat, alpha, sigma)) / sigma).view_as(x)


class Linear(Closed):
    """E[clean | x] of a Gaussian, by directions u with variances v: sum_u u alpha v / (alpha^2 v + sigma^2) u.x."""

    def __init__(self, images: Tensor, floor: float = 1e-4) -> None:
        super().__init__()
        values, self.vectors = torch.linalg.eigh(images.flatten(1).T.cov())
        self.values = values.clamp(min=floor)

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * self.values / (alpha**2 * self.values + sigma**2)
        return (gain * (x @ self.vectors)) @ self.vectors.T


class ByHeart(Closed):
    """E[clean | x] where the clean image is one of these: their mean by weights exp(-|x - alpha m|^2 / (2 sigma^2))."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images.flatten(1)

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        squared = (x[:, None] - alpha[:, None] * self.images).square().sum(2)  # (B, K)
        return torch.softmax(-squared / (2 * sigma**2), dim=1) @ self.images


class Scalar(Closed):
    """Knows one variance and nothing else: what a network learns first."""

    def clean(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        v = 0.06
        return alpha * v / (alpha**2 * v + sigma**2) * x


def model(network: nn.Module) -> Model:
    many = SamplingFacts(sampler="ddim", steps=40)  # with few steps even the best denoiser draws less than there is
    return parts.model(network, parts.pixel_codec(), size=(SIDE, SIDE), sampling=many)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images")
    rows = []
    for i, image in enumerate(world(24, seed=1)):
        array = ((image.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        Image.fromarray(array).save(path / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png"}))
    (path / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def known() -> Model:
    return model(Linear(world(4000, seed=2)))


def case(subject: Model, folder: Path, **more: Any) -> Case:
    return Case(Path("model"), subject, pictures.read(folder, (SIDE, SIDE), 3, 24), folder=folder, **more)


def only(checked: Checked) -> Finding:
    (found,) = checked.findings
    return found


def measured(checked: Checked, name: str) -> float:
    return next(m.value for m in checked.measures if m.name.startswith(name))


def test_the_best_denoiser_is_silent(folder: Path, known: Model) -> None:
    checked = fit.examine(case(known, folder))
    assert not checked.findings
    assert measured(checked, "variance of drawn") == pytest.approx(1.0, abs=0.25)
    assert {"the images", "its own pictures"} <= set(checked.plots[0].curves)
    assert checked.exhibits


def test_images_are_asked_for(known: Model) -> None:
    with pytest.raises(NotChecked, match="--data"):
        fit.examine(Case(Path("model"), known))


def test_a_filter_that_knows_one_variance_is_too_little(folder: Path) -> None:
    checked = fit.examine(case(model(Scalar()), folder))
    assert "fit.under" in {found.cause for found in checked.findings}


def test_the_linear_filter_has_the_error_of_its_formula() -> None:
    """White noise of variance v has a flat spectrum: v sigma^2 / (alpha^2 v + sigma^2)."""
    rng = torch.Generator().manual_seed(0)
    clean, noise = 0.5 * torch.randn(200, 2, 8, 8, generator=rng), torch.randn(200, 2, 8, 8, generator=rng)
    found = filters.linear_error(clean, noise, Level(500.0, 0.8, 0.6))
    assert float(found.mean()) == pytest.approx(0.25 * 0.36 / (0.64 * 0.25 + 0.36), rel=0.03)


def test_training_images_drawn_again_are_memorised(folder: Path) -> None:
    images = pictures.read(folder, (SIDE, SIDE), 3, 24).pixels
    found = only(fit.examine(case(model(ByHeart(images)), folder)))
    assert found.cause == "fit.memorised" and found.grade == "broken"
    assert f"{DRAWN} of {DRAWN} drawn" in found.says


def test_one_picture_for_every_seed_is_collapsed(folder: Path) -> None:
    checked = fit.examine(case(model(ByHeart(world(1, seed=5))), folder))
    assert ("fit.collapsed", "broken") in {(found.cause, found.grade) for found in checked.findings}
    assert measured(checked, "variance of drawn") < 0.01


def test_the_variance_of_what_is_drawn_has_the_jackknifes_interval() -> None:
    rng = torch.Generator().manual_seed(0)
    data = torch.randn(200, 1, 1, 4, generator=rng)
    found = [statistics.diversity(0.5 * torch.randn(16, 1, 1, 4, generator=rng), data) for _ in range(200)]
    values = torch.tensor([each.value for each in found])
    assert float(values.mean()) == pytest.approx(0.25, rel=0.1)
    assert sum(each.low < 0.25 < each.high for each in found) / len(found) > 0.85
    assert float(values.std()) == pytest.approx(sum(each.error for each in found) / len(found), rel=0.2)


def test_a_model_that_lost_what_its_base_draws_has_forgotten(folder: Path, known: Model) -> None:
    few = world(4, seed=9)
    lost = model(Linear(few, floor=1e-3))  # knows the directions of four images, and no other
    checked = fit.examine(case(lost, folder, base=known))
    assert "fit.forgotten" in {found.cause for found in checked.findings}
    kept = fit.examine(case(model(Linear(world(2000, seed=3))), folder, base=known))
    assert not kept.findings
    assert abs(measured(kept, "log error lost on pictures of the base")) < 0.1


def test_another_codec_than_the_bases_is_not_compared(folder: Path, known: Model) -> None:
    latent = known.contract.latent.model_copy(update={"codec": "another"})
    other = replace(known, contract=known.contract.model_copy(update={"latent": latent}))
    names = {m.name for m in fit.examine(case(known, folder, base=other)).measures}
    assert not any(name.startswith("log error lost") for name in names)

"""How well a model of the nursery learned: against a linear denoiser, and with its own caption against a wrong one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from data import CAPTIONS, CLASSES
from torch import Tensor

from mezzotint.process import prediction
from mezzotint.training import parts
from mezzotint.training.diffusion import Diffusion
from mezzotint.training.methods import Batch, Place
from mezzotint.training.recipe import check

OTHER = 3  # classes further on brightness and type are both others


class Linear:
    """The best linear denoiser of the training images: that of a Gaussian with their mean and covariance."""

    def __init__(self, core: Diffusion) -> None:
        data = torch.cat([latents.flatten(0, 1) for latents in core.latents]).flatten(1).double()  # (N, D)
        self.mean = data.mean(0)
        self.values, self.vectors = torch.linalg.eigh((data - self.mean).T.cov())

    def error(self, core: Diffusion, batch: Batch) -> Tensor:
        """(B,) mean squared error in what the model predicts."""
        level = core.process.levels(batch["t"])
        alpha, sigma = level.alpha.double().view(-1, 1), level.sigma.double().view(-1, 1)
        x = core.process.noised(batch["clean"], batch["noise"], level)
        own = (x.flatten(1).double() - alpha * self.mean) @ self.vectors
        gain = alpha * self.values / (alpha**2 * self.values + sigma**2)
        clean = (self.mean + (gain * own) @ self.vectors.T).float().view_as(x)
        noise = (x - level.alpha * clean) / level.sigma
        said = prediction.target(core.process.prediction, clean, noise, level)
        aim = prediction.target(core.process.prediction, batch["clean"], batch["noise"], level)
        return (said - aim).square().flatten(1).mean(1)


@torch.no_grad()
def assess(model: Path, plan: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Validation losses by band of the clock, of the model, with wrong captions or labels, and of a linear denoiser."""
    known = ("seed", "batch", "threads", "data", "validation")
    tables: dict[str, Any] = {key: plan[key] for key in known if key in plan}
    told = {"method": "full", "out": str(scratch), "steps": 1, "base": {"path": str(model), "train_distilled": True}}
    recipe = check({**tables, **told}, str(model))
    place = Place(scratch, torch.device("cpu"), lambda what, done, total: None)
    core = Diffusion(recipe, place, parts.model(recipe, place.device))
    network, linear = core.model.backbone.eval(), Linear(core)
    bands: dict[str, list[float]] = {"right": [], "linear": []}
    steered = core.captions is not None or core.classes is not None
    if steered:
        bands["wrong"] = []
    for band in core.held_out:
        errors: dict[str, list[Tensor]] = {name: [] for name in bands}
        for batch in band:
            errors["right"].append(core.error(network, batch)[0].flatten(1).mean(1))
            errors["linear"].append(linear.error(core, batch))
            if steered:
                errors["wrong"].append(core.error(network, mistaken(core, batch))[0].flatten(1).mean(1))
        for name, found in errors.items():
            bands[name].append(float(torch.cat(found).double().mean()))
    mean = {name: sum(values) / len(values) for name, values in bands.items()}
    numbers = sum(parameter.numel() for parameter in network.parameters())
    return {"parameters": numbers, "mean": mean, "bands": bands}


def mistaken(core: Diffusion, batch: Batch) -> Batch:
    """The batch with the caption or label of another class."""
    if core.captions is None:
        return {**batch, "label": (batch["label"] + OTHER) % len(CLASSES)}
    said = [CAPTIONS.index(text) for text in core.captions.texts(batch["caption"])]
    return {**batch, "caption": core.captions.places([CAPTIONS[(i + OTHER) % len(CAPTIONS)] for i in said])}

"""What the full method leaves behind: previews through the one inference path, and a model folder with its contract."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from mezzotint import families, files, images
from mezzotint.contract import (
    ClassFacts,
    Contract,
    DtypeFacts,
    GuidanceFacts,
    LatentFacts,
    Licence,
    Lineage,
    SamplingFacts,
    TextFacts,
)
from mezzotint.digests import tensors_digest
from mezzotint.families import Model
from mezzotint.process import Process, RectifiedFlow
from mezzotint.request import Request
from mezzotint.training.recipe import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

    from mezzotint.training.methods.full import Full


def contract(job: Full, network: nn.Module) -> Contract:
    """Everything the weights cannot say, from the recipe and the parts."""
    recipe = job.recipe
    names = tuple(recipe.classes.names) if recipe.classes else ()
    dropout = max(recipe.classes.dropout if recipe.classes else 0.0, recipe.text.dropout if recipe.text else 0.0)
    sampling = recipe.sampling
    return Contract(
        process=job.process,
        latent=LatentFacts.of(job.codec),
        size=recipe.data.size,
        weights=tensors_digest(network.state_dict()),
        text=TextFacts.of(job.text) if job.text else None,
        classes=ClassFacts(names=names, null=len(names)) if recipe.classes else None,
        inpaint=recipe.inpaint.k if recipe.inpaint else None,
        guidance=GuidanceFacts(dropout=dropout, scale=sampling.guidance if sampling else 1.0),
        sampling=SamplingFacts(
            sampler=sampling.sampler if sampling else _sampler(job.process), steps=sampling.steps if sampling else 20
        ),
        dtypes=DtypeFacts(),
        licence=Licence(weights=recipe.licence, data=recipe.data_licence),
        lineage=Lineage(
            base=job.base,
            dataset=job.digests["data"],
            recipe=digest(recipe),
            code=version(),
            seed=recipe.seed,
            steps=recipe.steps,
        ),
    )


def save(job: Full, network: nn.Module, path: Path) -> None:
    """Write the finished model."""
    families.save(Model(contract(job, network), network, job.codec, job.text), path)


def previews(job: Full, network: nn.Module) -> list[Image]:
    """`previews.count` pictures, classes in turn; a model that repaints is shown an image, a mask and its answer."""
    from mezzotint.generate import generate

    recipe, plan = job.recipe, job.recipe.previews
    model = Model(contract(job, network), network, job.codec, job.text)
    held_out = job.held_out[0] if job.held_out else job.draw(0)
    source = job.validation_images or job.images
    result: list[Image] = []
    for i in range(plan.count):
        index = int(held_out["index"][i % len(held_out["index"])])
        wish = {
            "label": i % len(recipe.classes.names) if recipe.classes else None,
            "prompt": source.captions[index] if job.text else "",
            "seed": plan.seed + i, "steps": plan.steps, "guidance": plan.guidance, "sampler": plan.sampler,
        }  # fmt: skip
        if recipe.inpaint:
            pixels = source.pixels(torch.tensor([index]))
            mask = job.preview_masks[i % len(job.preview_masks)]
            picture, white = images.to_images(pixels)[0], images.to_images(mask[None].float() * 2 - 1)[0]
            result += [picture, white, *generate(model, Request(image=picture, mask=white, **wish)).images]
        else:
            result += generate(model, Request(**wish)).images
    return result


def digest(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe."""
    return files.sha256_json(recipe.model_dump(mode="json"))


def version() -> str:
    """The installed version of Mezzotint."""
    try:
        return metadata.version("mezzotint")
    except metadata.PackageNotFoundError:
        return "uninstalled"


def _sampler(process: Process) -> str:
    return "flow_euler" if isinstance(process.schedule, RectifiedFlow) else "ddim"

"""Pictures of a model in training, through the one inference path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mezzotint import images
from mezzotint.data.folder import ImageFolder
from mezzotint.families import Model
from mezzotint.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from mezzotint.training.diffusion import Diffusion


def drawn(
    core: Diffusion, model: Model, follow: Callable[[ImageFolder, int], tuple[nn.Module, Image]] | None = None
) -> list[Image]:
    """`previews.count` pictures, prompts and classes in turn; a repainting model is shown an image and a mask first.

    `follow` gives a control network and the picture it follows for an image of a folder; that stands beside the result.
    """
    from mezzotint.generate import generate

    plan, contract = core.recipe.previews, model.contract
    source = (core.held_images or core.images)[0]
    chosen = torch.linspace(0, len(source) - 1, min(plan.count, len(source))).round().long().tolist()
    guided = contract.guidance.embedded or not contract.guidance.distilled
    width, height = source.bytes.shape[-1], source.bytes.shape[-2]
    result: list[Image] = []
    for i in range(plan.count):
        index = chosen[i % len(chosen)]
        wish: dict[str, Any] = {
            "seed": plan.seed + i, "steps": plan.steps, "sampler": plan.sampler, "width": width, "height": height,
            "guidance": plan.guidance if guided else 1.0,
        }  # fmt: skip
        if contract.classes:
            wish["label"] = i % len(contract.classes.names) if core.label is None else core.label
        if model.text:
            prompts = plan.prompts or core.prompts
            wish["prompt"] = prompts[i % len(prompts)] if prompts else source.captions[index]
        if contract.inpaint:
            picture = images.to_images(source.pixels(torch.tensor([index])))[0]
            masks = core.images[0].masks if len(core.images[0].masks) else core.bank(source, core.recipe.seed)
            white = images.to_images(masks[i % len(masks)][None].float() * 2 - 1)[0]
            result += [picture, white]
            wish |= {"image": picture, "mask": white}
            del wish["width"], wish["height"]
        if follow:
            network, seen = follow(source, index)
            wish["control"] = [(network, seen, 1.0)]
            result.append(seen.convert("L" if model.codec.pixel_channels == 1 else "RGB"))
        result += generate(model, replace(Request(), **wish)).images
    return result

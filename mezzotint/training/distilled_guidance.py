"""Which guidance a distillation puts into the weights, and a student that is told it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.checkpoints import fill
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.training.tables import Loss, Recipe

WIDTH = 256  # of the sinusoid that carries the scale, as in published models
IDLE = ("weighting", "gamma", "density", "mean", "deviation", "shift", "guidance", "variance")


def check(recipe: Recipe) -> None:
    """InputError for keys that speak of another objective: levels and their weights follow from the solver alone."""
    for key in IDLE:
        if getattr(recipe.loss, key) != getattr(Loss(), key):
            raise InputError(f"{recipe.at}: loss.{key} has no part in consistency distillation: leave it out.")
    if recipe.sampling:
        raise InputError(f"{recipe.at}: a distilled model samples with 'lcm' as [lcm] says: leave [sampling] out.")
    if recipe.lora and recipe.lora.text_targets:
        raise InputError(f"{recipe.at}: a distillation leaves the text as it is: leave lora.text_targets out.")


def guidance_range(recipe: Recipe, model: Model) -> tuple[float, float]:
    """The lowest and the highest guidance scale to distil; without a word of the recipe the base's own.

    InputError where the teacher cannot be guided, or the student could not be told one scale of many.
    """
    said, facts, at = recipe.lcm and recipe.lcm.guidance, model.contract.guidance, model.path
    able = facts.embedded or (not facts.distilled and facts.dropout > 0)
    if said is None:
        said = facts.scale if able else 1.0
    low, high = said if isinstance(said, tuple) else (said, said)
    if not 0 <= low <= high:
        raise InputError(f"{recipe.at}: lcm.guidance {[low, high]} must be two rising scales, or one.")
    if not able and (low, high) != (1, 1):
        why = "is distilled" if facts.distilled else "was never trained with its condition dropped"
        raise InputError(f"{at} {why} and cannot be guided: lcm.guidance {said} must be 1.")
    if low < high and not facts.embedded and (recipe.lora or not readable(model.backbone)):
        who = "a LoRA" if recipe.lora else at
        raise InputError(f"{recipe.at}: {who} cannot be told a guidance scale: make lcm.guidance one, such as {low:g}.")
    shown = recipe.previews
    if shown.every and (low < high or facts.embedded) and not low <= shown.guidance <= high:
        raise InputError(
            f"{recipe.at}: previews.guidance {shown.guidance:g} is not distilled: use {low:g} to {high:g}."
        )
    return low, high


def readable(network: nn.Module) -> bool:
    """Whether `telling` can make a network read a guidance scale."""
    return isinstance(network, UNet) and isinstance(network.config, ConditionalUNetConfig)


def telling(network: nn.Module) -> UNet:
    """The same network with a projection of the guidance scale into its clock; at the start that projection is 0.

    So it computes what the given one does, to the bit, whatever scale it is told (Meng et al. 2023).
    """
    assert isinstance(network, UNet) and isinstance(network.config, ConditionalUNetConfig)
    config = replace(network.config, time_cond_proj_dim=WIDTH)
    clock = network.time_embedding.linear_1.weight  # (E, clock)
    zero = torch.zeros(clock.shape[1], WIDTH, dtype=clock.dtype, device=clock.device)
    tensors = {**network.state_dict(), "time_embedding.cond_proj.weight": zero}
    return fill(lambda: UNet(config), tensors, None, "the base", clock.device)

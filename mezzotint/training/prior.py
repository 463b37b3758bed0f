"""Images of a class, drawn by the base itself before it is trained: what keeps the class from being forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint import files
from mezzotint.checkpoints import read_json
from mezzotint.data import metadata
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.request import Request
from mezzotint.training.draws import number
from mezzotint.training.tables import DreamBooth

if TYPE_CHECKING:
    from PIL.Image import Image

NOTE = "prior.json"  # beside the images: what they were drawn with
AT_ONCE = 4


def images(
    model: Model, plan: DreamBooth, folder: Path, size: tuple[int, int], seed: int, watch: Callable[[int, int], None]
) -> Path:
    """A training folder of `plan.prior_images` images of the class; those that are there are kept, the rest is drawn.

    They are bound to the base, prompt and settings that drew them: a folder of other images is refused with what
    differs. Image k depends on k and the seed alone, so an interrupted drawing goes on.
    """
    asked = {
        "base": model.contract.weights, "prompt": plan.class_prompt, "label": plan.class_label, "size": list(size),
        "steps": plan.prior_steps, "guidance": plan.prior_guidance, "seed": seed,
    }  # fmt: skip
    if (folder / NOTE).is_file():
        stored = read_json(folder / NOTE)
        for key, value in asked.items():
            if stored.get(key) != value:
                raise InputError(
                    f"the prior images in {folder} were drawn with {key} {stored.get(key)!r}, this run has {value!r}."
                    "\nDelete the folder, or name another one with dreambooth.prior_folder."
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{folder} is not empty and holds no {NOTE}: name another folder with dreambooth.prior_folder."
        )
    files.write_json(folder / NOTE, asked)
    names = [f"{k:05d}.png" for k in range(plan.prior_images)]
    missing = [k for k, name in enumerate(names) if not (folder / name).is_file()]
    for first in range(0, len(missing), AT_ONCE):
        chosen = missing[first : first + AT_ONCE]
        for k, picture in zip(chosen, _drawn(model, plan, chosen, size, seed), strict=True):
            files.write_with(folder / names[k], lambda path, picture=picture: picture.save(path, format="PNG"))
        watch(len(names) - len(missing) + first + len(chosen), len(names))
    metadata.write(folder, [{"file_name": name, "text": plan.class_prompt or ""} for name in names])
    return folder


def _drawn(model: Model, plan: DreamBooth, chosen: list[int], size: tuple[int, int], seed: int) -> list[Image]:
    from mezzotint.generate import generate_batch

    wish = Request(
        prompt=plan.class_prompt or "", label=plan.class_label, width=size[0], height=size[1],
        steps=plan.prior_steps, guidance=plan.prior_guidance,
    )  # fmt: skip
    requests = [replace(wish, seed=number(seed, k, "prior image")) for k in chosen]
    return [result.images[0] for result in generate_batch(model, requests)]

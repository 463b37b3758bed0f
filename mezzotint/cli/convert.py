"""`mezzotint convert`: a checkpoint in the other layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mezzotint.cli import console


@dataclass(frozen=True)
class Options:
    """Rewrite a checkpoint as a model folder (diffusers) or as the original single file, without loss.

    Tensors are renamed, to the bit, in their number format. Before anything is written the result is read back as it
    would be, and what the other layout cannot say is refused by name; what it has no place for is listed.

    For example:

        mezzotint convert v1-5-pruned.safetensors models/sd15 --layout diffusers
        mezzotint convert models/sd15 sd15.safetensors --layout single-file
        mezzotint convert v2-1_768.safetensors models/sd21 --layout diffusers --prediction velocity
    """

    source: tyro.conf.Positional[Path]
    """A model folder, or a .safetensors, .ckpt or .pt file."""
    target: tyro.conf.Positional[Path]
    """The folder or .safetensors file to write."""
    layout: Literal["diffusers", "single-file"]
    """diffusers: one folder a part; single-file: the original's names in one file."""
    prediction: str | None = None
    """What the network predicts, epsilon or velocity, where the file does not say (Stable Diffusion 2)."""
    distilled: Literal["yes", "no"] | None = None
    """Whether a FLUX.2 klein is the distilled model, where the file does not say."""
    parts: Path | None = None
    """A folder with what a single file lacks: vae, text_encoder, tokenizer."""
    force: bool = False
    """Replace a model folder or a file that is there."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    """Convert, and say what was written and what was left out."""
    from mezzotint.families.convert import convert

    with console.progress(quiet=options.json) as bars:
        bar = bars.add_task("reading", total=None)

        def watch(what: str, done: int, total: int) -> None:
            bars.update(bar, description=f"writing {what}", completed=done // 2**20, total=max(1, total // 2**20))

        done = convert(
            options.source, options.target, options.layout, prediction=options.prediction,
            distilled=console.answer(options.distilled), parts=options.parts, force=options.force, watch=watch,
        )  # fmt: skip
    left_out = {what: list(names) for what, names in done.left_out.items()}
    if options.json:
        files = [str(file) for file in done.files]
        console.print_json({"family": done.family, "layout": done.layout, "files": files, "left_out": left_out})
        return 0
    print("\n".join(str(file) for file in done.files))
    for what, names in left_out.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        print(f"left out: {what}: {', '.join(names[:3])}{more}")
    return 0

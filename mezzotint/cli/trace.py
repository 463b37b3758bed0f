"""`mezzotint trace`: from a picture back to the images that its model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from mezzotint.cli import console, verify

SHOWN = 8  # training images that the terminal names


@dataclass(frozen=True)
class Options:
    """Walk from a picture, an adapter's folder or a model folder back to its training images, and check every step.

    What was asked, which weights and adapters drew, what they were trained from, on which files, under which licences.
    The page shows the training images. The exit code is 1 where a step does not hold.

    For example:

        mezzotint trace out/cracks/0000_seed0.png
        mezzotint trace out/cracks/0000_seed0.png --html out/trace.html
        mezzotint trace models/mine --data cells --json
    """

    file: tyro.conf.Positional[Path]
    """A picture (PNG, JPEG, WebP), or a model folder."""
    html: Path | None = None
    """Write a page with the chain and the training images into this file."""
    model: Path | None = None
    """The model that is said to have drawn it; the one in the log where left out."""
    lora: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """An adapter that took part, where it is not at its old place; may be given several times."""
    data: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A folder of training images that is not at its old place; may be given several times."""
    root: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A root certificate to trust; your own where left out; may be given several times."""
    log: Path | None = None
    """The audit log; your own where left out."""
    key: Path | None = None
    """The key of the watermark; your own where left out."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    """Walk, print every step with what it leads to, write the page."""
    from mezzotint.pipeline import page

    chain = verify.walked(options.file, options)
    if options.html is not None:
        page.write(chain, options.html)
    if options.json:
        console.print_json(verify.to_dict(chain))
        return 0 if chain.holds else 1
    for number, hop in enumerate(chain.hops, start=1):
        print(f"{number:2}  {verify.SIGNS[hop.holds]:<3} {hop.what}: {hop.says}")
        for name, value in (("digest", hop.digest), ("at", hop.place)):
            if value:
                print(f"         {name} {value}")
        names = list(hop.facts.get("files", ()))
        if names:
            more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            print(f"         {', '.join(names[:SHOWN])}{more}")
    if options.html is not None:
        print(f"\n{options.html}")
    return 0 if chain.holds else 1

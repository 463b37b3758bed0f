"""`mezzotint verify`: whether a picture or a model is what it says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from mezzotint.cli import console
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from mezzotint.governance.hop import Hop
    from mezzotint.pipeline.places import Chain

SIGNS = {True: "ok", False: "NO", None: "?"}


@dataclass(frozen=True)
class Options:
    """Check everything that vouches for a picture, or for a model folder, and name what does not hold.

    For a picture: its signed credentials, the audit log, the watermark, the model and the adapters that drew it, their
    training and its images. A file that lost its credentials is still found by its watermark or its pixels. The exit
    code is 0 where something vouches for the file and nothing on the way is broken, and 1 otherwise; a line with a
    question mark is a thing that could not be checked here, and says what is missing.

    For example:

        mezzotint verify out/cracks/0000_seed0.png
        mezzotint verify download.jpg --model models/solar-cells --root acme-root.pem
        mezzotint verify models/mine --data cells
    """

    file: tyro.conf.Positional[Path]
    """A picture (PNG, JPEG, WebP), or a model folder."""
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
    """Check, print a line for each step, and say whether all holds."""
    chain = walked(options.file, options)
    if options.json:
        console.print_json(to_dict(chain))
    else:
        print("\n".join(lines(chain.hops)))
        print(f"\n{options.file} {'holds' if chain.holds else 'does not hold'}.")
    return 0 if chain.holds else 1


def walked(file: Path, options: Any) -> Chain:
    """The chain of a picture or of a model folder."""
    from mezzotint.pipeline import chain as chains
    from mezzotint.pipeline.places import Chain, Places

    if not file.exists():
        raise InputError(f"no such file or folder: {file}")
    places = Places(
        options.model, tuple(options.lora), tuple(options.data), tuple(options.root), options.log, options.key
    )
    if file.is_dir():
        found = chains.of_model(Chain(file, record={"model": str(file)}), file, places)
        return found
    return chains.of_picture(file, places)


def lines(hops: list[Hop]) -> list[str]:
    """A line for each step."""
    wide = max((len(hop.what) for hop in hops), default=0)
    return [f"{SIGNS[hop.holds]:<3} {hop.what:<{wide}}  {hop.says}" for hop in hops]


def to_dict(chain: Chain) -> dict[str, Any]:
    """The chain as plain data."""
    from dataclasses import asdict

    return {"file": str(chain.file), "holds": chain.holds, "hops": [asdict(hop) for hop in chain.hops],
            "record": chain.record}  # fmt: skip

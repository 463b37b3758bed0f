"""A chain as a page that loads nothing: what was asked, every step, and the training images."""

from __future__ import annotations

import base64
import contextlib
import io
from dataclasses import fields
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from PIL.Image import Resampling

from mezzotint import files, images
from mezzotint.errors import InputError
from mezzotint.governance.hop import Hop
from mezzotint.pipeline.places import Chain
from mezzotint.pipeline.record import plain
from mezzotint.request import Request

SIDE, MOST = 72, 240  # pixels of a training image on the page, and how many are shown
KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def write(chain: Chain, path: Path) -> Path:
    """Write the page."""
    return files.write_text(path, html(chain))


def html(chain: Chain) -> str:
    """The page; training images that are not here are named and not shown."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files(__package__ or "").joinpath("trace.html.j2").read_text("utf-8"))
    own = None if chain.file.is_dir() else shown(chain.file, 4 * SIDE)
    return template.render(
        chain=chain, own=own, shown=trained_on, near=near, most=MOST, request=asked(chain),
        version=metadata.version("mezzotint"),
    )  # fmt: skip


def asked(chain: Chain) -> dict[str, Any]:
    """What a picture was asked for, without what it was not: settings that nobody touched."""
    untouched = {field.name: plain(field.default) for field in fields(Request)}
    request: dict[str, Any] = (chain.record or {}).get("request", {})
    empty = (None, "", [])
    return {k: v for k, v in request.items() if v not in empty and not (k in untouched and v == untouched[k])}


def near(place: str) -> str:
    """A place as seen from the working folder or from home: a page goes to people who know no path of this machine."""
    for folder, name in ((Path.cwd(), ""), (Path.home(), "~/")):
        with contextlib.suppress(ValueError):
            return name + Path(place).relative_to(folder).as_posix()
    return place


def trained_on(hop: Hop) -> list[tuple[str, str]]:
    """Name and picture of the training images of a step, spread over all of them."""
    names = [name for name in hop.facts.get("files", ()) if Path(name).suffix.lower() in KINDS]
    chosen = names if len(names) <= MOST else [names[i * len(names) // MOST] for i in range(MOST)]
    found = [(name, shown(Path(hop.place) / name, SIDE)) for name in chosen]
    return [(name, picture) for name, picture in found if picture]


def shown(path: Path, side: int) -> str:
    """A small copy as a data address; empty where there is no picture."""
    try:
        picture = images.read(path)
    except (InputError, OSError):
        return ""
    scale = side / max(picture.size)
    small = picture.convert("RGB").resize(
        (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Resampling.BILINEAR
    )
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

"""What a picture's file says of itself, and what the log says of it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

from PIL import Image as pil
from PIL.Image import Image

from mezzotint.errors import InputError
from mezzotint.governance import audit, credentials
from mezzotint.governance.audit import Row
from mezzotint.governance.credentials import Credentials
from mezzotint.governance.hop import Hop
from mezzotint.pipeline.places import Chain, Places, trusted
from mezzotint.pipeline.record import pixels_digest

KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}  # by first bytes


def opened(path: Path) -> tuple[bytes, Image | None, str]:
    """The bytes, the picture (None where it cannot be decoded) and the media type of a file.

    InputError for what is no PNG, JPEG or WebP.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    media = next((kind for start, kind in KINDS.items() if data.startswith(start)), None)
    if media is None:
        raise InputError(f"{path} is no picture that can be checked: PNG, JPEG or WebP is expected")
    try:
        picture = pil.open(io.BytesIO(data))
        picture.load()
    except (OSError, ValueError, SyntaxError):
        return data, None, media
    return data, picture, media


def told(chain: Chain, data: bytes, media: str, picture: Image | None, places: Places) -> Row | None:
    """The file's own word and the log's, and whether they agree; the log's row where there is one."""
    roots = trusted(places)
    found: Credentials = credentials.read(data, media, b"".join(root.read_bytes() for root in roots) if roots else None)
    says, holds = {
        "trusted": (f"signed by {found.signer}", True),
        "unknown signer": (f"signed by {found.signer}, whom nobody here vouches for", None),
        "invalid": ("; ".join(found.problems), False),
        "none": ("the file carries no credentials", None),
    }[found.state]
    chain.hops.append(Hop("credentials of the picture", holds, says, place=str(chain.file)))
    if found.state in ("trusted", "unknown signer"):
        chain.record = found.facts
    log = audit.place(places.log)
    if not log.is_file():
        chain.hops.append(Hop("audit log", None, f"there is none at {log}"))
        return None
    checked = audit.check(log)
    says = f"{checked.rows} rows, unbroken" if checked.whole else "; ".join(checked.problems[:4])
    chain.hops.append(Hop("audit log", checked.whole, says, place=str(log)))
    row = next(audit.rows(log, hashlib.sha256(data).hexdigest()), None)
    pixels = None if picture is None else pixels_digest(picture)
    alike = [] if pixels is None else audit.rows(log, pixels)
    same = next((each for each in alike if each.event == "released"), None)
    if row is not None:
        chain.hops.append(Hop("file in the log", True, f"row {row.n} of {row.time}, to the byte"))
    elif same is not None:
        says = f"row {same.n} of {same.time} names these pixels in another file: its other bytes were changed"
        chain.hops.append(Hop("file in the log", False if found.state == "trusted" else None, says))
    else:
        chain.hops.append(Hop("file in the log", None, "no row names these bytes or pixels"))
    row = row or same
    if row is not None and chain.record is not None and chain.record != row.facts["record"]:
        chain.hops.append(Hop("record", False, f"the credentials say something else than row {row.n} of the log"))
    if row is not None and chain.record is None:
        chain.record = row.facts["record"]
    return row

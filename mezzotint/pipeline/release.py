"""How a picture leaves: looked at, marked, signed, written down."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.governance import classifier, credentials, spread
from mezzotint.governance.prompts import ALLOWED, Verdict
from mezzotint.pipeline.copies import Check
from mezzotint.pipeline.house import House
from mezzotint.pipeline.marking import Mark
from mezzotint.pipeline.record import pixels_digest
from mezzotint.request import Artifact

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY: dict[str, dict[str, Any]] = {
    "image/png": {}, "image/jpeg": {"quality": 95, "subsampling": 0}, "image/webp": {"lossless": True},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawn:
    """A picture before it leaves, with its record and what must be known to mark and to sign it."""

    picture: Image
    record: dict[str, Any]
    mark: Mark | None = None
    mask: Image | None = None  # white where it was painted; the rest is the given picture
    parent: Image | None = None  # the picture that was edited


def looked_at(house: House, pictures: Sequence[Image], copies: Check | None) -> list[tuple[Verdict, dict[str, Any]]]:
    """The verdict on each picture, with what was measured."""
    rules = house.policy.pictures
    scores = classifier.scores(pictures) if rules.unsafe is not False else [None] * len(pictures)
    ratios = copies.ratios(pictures) if copies is not None and rules.copies is not False else [None] * len(pictures)
    found: list[tuple[Verdict, dict[str, Any]]] = []
    for picture, score, ratio in zip(pictures, scores, ratios, strict=True):
        verdict = classifier.judge(rules, picture, score)
        if verdict.allowed and ratio is not None and rules.copies is not False and ratio < rules.copies:
            says = f"the picture is withheld: it is nearer to a training image ({ratio:.2f}) than others are"
            verdict = Verdict(False, "pictures.copies", says)
        told: dict[str, Any] = {}
        if score is not None:
            told[classifier.NAME] = round(score, 4)
        if ratio is not None:
            told["distance to the nearest training image"] = round(ratio, 4)
        found.append((verdict, told))
    return found


def released(house: House, drawn: Drawn, told: dict[str, Any], asks: dict[str, Any], media: str = "image/png",
             model: Path | None = None, adapters: Sequence[str] = ()) -> Artifact:  # fmt: skip
    """The picture as a signed file with its record, and a row in the log."""
    picture, mark = drawn.picture, drawn.mark
    if mark is not None and mark.method == "pixels" and house.key is not None:
        picture = spread.marked(picture, house.key, mark.nonce, mark.payload, drawn.mask)
    rules = {
        "policy": {"name": house.policy.name, "digest": house.policy.digest},
        "filters": told,
        "licences": asks,
        "watermark": None if mark is None else mark.facts(),
        "signature": None if house.signer is None else {"signer": house.signer.name},
    }
    record = {**drawn.record, "governance": rules}
    data = encoded(picture, media)
    if house.signer is not None:
        parent = None if drawn.parent is None else encoded(drawn.parent, "image/png")
        authority = house.policy.signature.authority or None
        data = credentials.sign(data, media, credentials.public(record), house.signer, parent, authority=authority)
    house.note("released", {
        "file_sha256": hashlib.sha256(data).hexdigest(), "pixels_sha256": pixels_digest(picture), "media": media,
        "size": list(picture.size), "model": None if model is None else str(model.resolve()),
        "adapters": list(adapters),
        "record": credentials.public(record),
    })  # fmt: skip
    return Artifact(picture, record, data, media)


def withheld(house: House, drawn: Drawn, verdict: Verdict) -> None:
    """Write down that a picture stays."""
    facts = {"rule": verdict.rule, "says": verdict.says, "record": credentials.public(drawn.record)}
    house.note("withheld", facts)


def encoded(picture: Image, media: str) -> bytes:
    """The picture as a file of a media type; PNG and WebP keep it to the bit."""
    stream = io.BytesIO()
    picture.save(stream, credentials.MEDIA[media], **QUALITY[media])
    return stream.getvalue()


PASSED: tuple[Verdict, dict[str, Any]] = (ALLOWED, {})

"""The mark in the picture itself: the one that its record names, or any that the log knows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL.Image import Image

from mezzotint.errors import InputError
from mezzotint.families.model import Model
from mezzotint.governance import audit, shading, spread
from mezzotint.governance.hop import Hop
from mezzotint.governance.shading import Key
from mezzotint.pipeline.inversion import inverted
from mezzotint.pipeline.marking import Mark
from mezzotint.pipeline.places import Chain, Places
from mezzotint.request import Request


def looked_for(chain: Chain, picture: Image, model: Model | None, places: Places) -> None:
    """Add a hop for the watermark; where nothing else vouches for the picture, the record of the mark that is found."""
    named = ((chain.record or {}).get("governance") or {}).get("watermark")
    if chain.record is not None and not named:
        chain.hops.append(Hop("watermark", None, "its record says that it carries none"))
        return
    try:
        key = shading.key_at(places.key)
    except InputError as error:
        if named:
            chain.hops.append(Hop("watermark", None, f"not looked for: {error}"))
        return
    if named and named["key"] != key.id:
        chain.hops.append(Hop("watermark", None, f"made with the key {named['key']}, here is {key.id}"))
        return
    log = audit.place(places.log)
    rows = [row for row in audit.rows(log, key.id) if row.event == "released"] if log.is_file() else []
    rows = [row for row in rows if row.facts["record"]["governance"]["watermark"]]
    known: list[Mapping[str, Any]] = [row.facts for row in rows]
    if named:
        size = next((facts["size"] for facts in known if facts["record"] == chain.record), picture.size)
        known = [{"record": chain.record, "size": size}]
    if not known:
        chain.hops.append(Hop("watermark", None, "no mark is known to look for"))
        return
    marks = [Mark.of(facts["record"]["governance"]["watermark"]) for facts in known]
    found = best(picture, model, key, marks, [(facts["size"][0], facts["size"][1]) for facts in known])
    if found is None:
        chain.hops.append(Hop("watermark", None, "not looked for: it is in the start noise, which needs --model"))
        return
    place, says, there = found
    if there and chain.record is None:
        chain.record = known[place]["record"]
        says += "; so the picture is one of the log in another file"
    chain.hops.append(Hop("watermark", True if there else False if named and not masked(chain) else None, says))


def masked(chain: Chain) -> bool:
    """Whether only a spot was painted, which may be too small for a mark to be found."""
    return bool(((chain.record or {}).get("request") or {}).get("mask"))


def seen(picture: Image, size: tuple[int, int]) -> list[Image]:
    """The picture as it is, and in the size that was marked: it may have been cut out, or made smaller or larger."""
    return [picture] if picture.size == size else [picture, picture.resize(size)]


def best(
    picture: Image, model: Model | None, key: Key, marks: Sequence[Mark], sizes: Sequence[tuple[int, int]]
) -> tuple[int, str, bool] | None:
    """Of all marks the one that stands best in a picture: its place, what to say, whether it is there."""
    readings: list[tuple[float, int, str, bool]] = []
    noisy = [i for i, mark in enumerate(marks) if mark.method == "start noise"]
    if noisy and model is not None:
        noise = inverted(model, [picture], [Request()])[0]
        where, reading = shading.best(noise, key, [(marks[i].nonce, marks[i].payload) for i in noisy])
        said = f"start noise, {reading.right} of {reading.bits} bits"
        readings.append((reading.log_chance, noisy[where], said, reading.found(len(marks))))
    for i, mark in enumerate(marks):
        if mark.method == "pixels":
            reading = min(
                (spread.read(each, key, mark.nonce, mark.payload, sizes[i]) for each in seen(picture, sizes[i])),
                key=lambda reading: reading.log_chance,
            )
            said = f"pixels, {reading.right} of {reading.bits} bits"
            readings.append((reading.log_chance, i, said, reading.found(2 * len(marks))))
    if not readings:
        return None
    chance, i, said, there = min(readings)
    odds = f"10^{chance / math.log(10):.0f}"
    return i, f"found ({said}; by chance {odds})" if there else f"not found ({said})", there

"""From a picture back to all that made it: credentials, log, watermark, model, adapters, base, data, each checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint import files
from mezzotint.errors import InputError
from mezzotint.families import load
from mezzotint.families.model import Model
from mezzotint.families.native import identified
from mezzotint.governance import lineage
from mezzotint.governance.hop import Hop
from mezzotint.pipeline import evidence, watermarks
from mezzotint.pipeline.places import Chain, Places, trusted
from mezzotint.pipeline.record import files_digest

DEEPEST = 8  # bases of bases


def of_picture(path: Path, places: Places) -> Chain:
    """Everything that can be checked of a picture; InputError where it is none."""
    data, picture, media = evidence.opened(path)
    chain = Chain(path)
    if picture is None:
        chain.hops.append(Hop("picture", False, "the file is damaged: its pixels cannot be read", place=str(path)))
    row = evidence.told(chain, data, media, picture, places)
    said = row.facts if row is not None else {}
    place = places.model or (Path(said["model"]) if said.get("model") else None)
    there = places.loaded is not None and places.loaded.path == place
    model = _model(chain, place, places.loaded if there else None)
    if picture is not None:
        watermarks.looked_for(chain, picture, model, places)
    if chain.record is None:
        return chain
    _adapters(chain, chain.record, said, places)
    if place is not None and place.is_dir():
        of_model(chain, place, places)
    return chain


def of_model(chain: Chain, model: Path, places: Places, depth: int = 0) -> Chain:
    """A model's lineage, its data and what it was trained from."""
    hops = lineage.checked(model, vouched(model, places))
    chain.hops += hops
    facts, data = (_json(model / lineage.FOLDER / name) for name in ("facts.json", "dataset.json"))
    if facts is None or data is None:
        return chain
    chain.hops += data_hops(data, facts.get("data_licence"), places.data)
    if facts.get("base"):
        told = (facts.get("recipe") or {}).get("base") or {}
        place = Path(told["path"]) if told.get("path") else None
        if place is None or not place.exists():
            says = (
                f"weights {facts['base'][:16]}... under {facts.get('base_licence') or 'an unknown licence'}, not here"
            )
            chain.hops.append(Hop("base of the model", None, says, facts["base"], str(place or "")))
        else:
            _weights(chain, "base of the model", place, str(facts["base"]))
            if place.is_dir() and depth < DEEPEST:
                of_model(chain, place, places, depth + 1)
    return chain


def vouched(model: Path, places: Places) -> Path | None:
    """The root to hold a model's signature to: of those that are trusted the one that it names, else the first named.

    None for somebody else's model where none was named: whole or not, and by whom nobody here knows.
    """
    theirs = model / lineage.FOLDER / "root.pem"
    known = theirs.read_bytes() if theirs.is_file() else b""
    roots = trusted(places)
    same = next((root for root in roots if root.read_bytes() == known), None)
    if same is not None or not roots or (known and not places.roots):
        return same
    return roots[0]


def data_hops(data: Mapping[str, Any], licence: str | None, given: Sequence[Path]) -> list[Hop]:
    """The training files by their digests: every one that is changed or missing is named.

    They are looked for where the training had them and, where that folder is gone, in that of the given ones with most
    of them by name, if it is more than half: the others may be for another model of the chain.
    """
    names, folder = list(data["files"]), Path(str(data["folder"]))
    if not folder.is_dir():
        held = {each: sum((each / name).is_file() for name in names) for each in given}
        folder = next((each for each in given if held[each] == max(held.values()) > len(names) / 2), folder)
    under = f"under {licence or 'an unknown licence'}"
    if not folder.is_dir():
        says = f"{len(names)} files {under}; {folder} is not here, so they are not compared (--data)"
        return [Hop("training images", None, says, str(data["digest"]), str(folder))]
    wrong: list[str] = []
    for name, digest in data["files"].items():
        file = folder / name
        if not file.is_file():
            wrong.append(f"{name} is missing")
        elif files.sha256_file(file) != digest:
            wrong.append(f"{name} was changed")
    says = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    facts = {"licence": licence, "files": names}
    if wrong:
        return [Hop("training images", False, says, str(data["digest"]), str(folder), facts)]
    says = f"all {len(names)} files are those of the training, {under}"
    return [Hop("training images", True, says, str(data["digest"]), str(folder), facts)]


def _model(chain: Chain, place: Path | None, loaded: Model | None) -> Model | None:
    """The model that drew, where it is known, and whether its weights are those of the record."""
    wanted = None if chain.record is None else str(chain.record["model"]["weights"])
    try:
        model = loaded if loaded is not None or place is None else identified(load(place))
    except InputError as error:
        chain.hops.append(Hop("model", False, " ".join(str(error).split()), place=str(place)))
        return None
    if model is None:
        if wanted:
            chain.hops.append(Hop("model", None, f"weights {wanted[:16]}...: name the model with --model", wanted))
        return None
    digest = model.contract.weights
    if wanted is not None:
        same = digest == wanted
        says = "the weights are those that drew" if same else f"its weights are {digest[:16]}..., not {wanted[:16]}..."
        chain.hops.append(Hop("model", same, f"{says}; {model.contract.licence.weights}", digest, str(place or "")))
    return model


def _adapters(chain: Chain, record: Mapping[str, Any], said: Mapping[str, Any], places: Places) -> None:
    for each in record["request"].get("lora") or ():
        known = [Path(path) for path in (*places.adapters, *said.get("adapters", ()))]
        path = next((path for path in known if path.name == each["file"] and path.exists()), None)
        if path is None:
            chain.hops.append(Hop("adapter", None, f"{each['file']} is not here: name it with --lora", each["sha256"]))
            continue
        digest = files_digest(path)["sha256"]
        same = digest == each["sha256"]
        says = f"{each['file']} at {each['weight']:g}" if same else f"{each['file']} was changed: {digest[:16]}..."
        chain.hops.append(Hop("adapter", same, says, each["sha256"], str(path)))
        folder = path if path.is_dir() else path.parent
        if (folder / lineage.FOLDER).is_dir():
            of_model(chain, folder, places, depth=1)


def _weights(chain: Chain, what: str, place: Path, wanted: str) -> None:
    try:
        digest = identified(load(place)).contract.weights
    except InputError as error:
        chain.hops.append(Hop(what, False, " ".join(str(error).split()), wanted, str(place)))
        return
    same = digest == wanted
    says = (
        "the weights that the training started from"
        if same
        else f"its weights are {digest[:16]}..., not {wanted[:16]}..."
    )
    chain.hops.append(Hop(what, same, says, wanted, str(place)))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None

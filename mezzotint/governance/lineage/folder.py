"""The lineage folder of a model: written whole or not at all, and checked document by document."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mezzotint import files
from mezzotint.errors import InputError
from mezzotint.extras import need
from mezzotint.governance import certificates as certs
from mezzotint.governance.hop import Hop
from mezzotint.governance.lineage import atlas, bom, events, signature, statement
from mezzotint.governance.lineage.trained import FOLDER, Trained, digests

FACTS, DATA, ATTESTATION, SIGNATURE = "facts.json", "dataset.json", "attestation.json", "model.sig"
BOM, EVENTS, ATLAS, ROOT, SIGNER = "mlbom.cdx.json", "openlineage.ndjson", "atlas.json", "root.pem", "signer.pem"
CONTRACT = "contract.json"
DOCUMENTS = (FACTS, DATA, BOM, EVENTS, ATLAS, SIGNATURE, SIGNER)  # that the attestation names by their digests


def written(model: Path, facts: Trained, certificates: Path | None = None) -> str:
    """Write model/lineage and return the digest of the model, which is one of all its files.

    `certificates` is a folder of `mezzotint certs`; this user's own, made at first use, where left out. InputError
    where something is missing or cannot be written; the model itself is never touched.
    """
    need("cryptography", "model_signing", "OpenSSL", "cyclonedx", "openlineage")
    at = certs.ready(certificates)
    signer = certs.signer(at, "models")
    subjects = digests(model)
    made = files.sha256_json(subjects)
    scratch = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=model))
    try:
        files.write_json(scratch / FACTS, {**asdict(facts), "data": {"digest": facts.data["digest"]}})
        files.write_json(scratch / DATA, dict(facts.data))
        files.write_json(scratch / BOM, bom.bom(facts, subjects))
        files.write_text(scratch / EVENTS, events.lines(events.events(facts, made)))
        files.write_json(scratch / ATLAS, atlas.entities(facts, made))
        files.write_bytes(scratch / ROOT, (at / ROOT).read_bytes())
        files.write_bytes(scratch / SIGNER, signature.first(signer.chain))
        signature.sign(model, scratch / SIGNATURE, at)
        documents = {name: files.sha256_file(scratch / name) for name in DOCUMENTS}
        content = statement.statement(facts, subjects, documents)
        files.write_json(scratch / ATTESTATION, statement.sealed(content, signer))
        shutil.rmtree(model / FOLDER, ignore_errors=True)
        scratch.chmod(0o755)
        scratch.rename(model / FOLDER)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def checked(model: Path, root: Path | None = None) -> list[Hop]:
    """Every document of a model's lineage against the files, the contract and each other.

    `root` is the certificate to trust; without one the folder's own is used, so that changes are found and the signer
    stays unknown.
    """
    at = model / FOLDER
    if not at.is_dir():
        return [Hop("lineage of the model", None, f"{model} has no {FOLDER} folder: nothing was written at training")]
    need("cryptography", "model_signing", "OpenSSL", "cyclonedx")
    trusted = root or at / ROOT
    whose = "under the root that is trusted here" if root else "under its own root, which nobody here vouches for"

    def look(what: str, act: Callable[[], tuple[str, dict[str, Any]]], place: str, known: bool = True) -> Hop:
        try:
            says, more = act()
            return Hop(what, True if known else None, says, place=str(at / place), **more)
        except InputError as error:
            return Hop(what, False, str(error), place=str(at / place))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return Hop(what, False, f"{place} is missing or damaged: {error}", place=str(at / place))

    def signed() -> tuple[str, dict[str, Any]]:
        signature.verify(model, at / SIGNATURE, trusted)
        return f"all files are as they were signed, {whose}", {}

    def attested() -> tuple[str, dict[str, Any]]:
        content = statement.opened(_json(at / ATTESTATION), (at / SIGNER).read_bytes(), trusted.read_bytes())
        told = {each["name"]: each["digest"]["sha256"] for each in content["subject"]}
        _same("the attestation", told, digests(model))
        documents = {name: files.sha256_file(at / name) for name in DOCUMENTS}
        _same("the attestation", _byproducts(content), documents)
        return f"names every file and document with its digest, signed {whose}", {"facts": _times(content)}

    def data() -> tuple[str, dict[str, Any]]:
        content = _json(at / DATA)
        digest = files.sha256_json(content["files"])
        if digest != content["digest"]:
            raise InputError(f"the files that {DATA} names have the digest {digest}, it says {content['digest']}")
        for name, other in (("the attestation", _materials(at).get("dataset")), ("the contract", _contract(model))):
            if other is not None and other != digest:
                raise InputError(f"{name} speaks of the data set {other}, {DATA} of {digest}")
        return f"{len(content['files'])} files, as contract and attestation name them", {"digest": digest}

    def materials() -> tuple[str, dict[str, Any]]:
        content = _json(at / BOM)
        if wrong := bom.problems(content):
            raise InputError(f"{BOM} is no bill of materials: {wrong}")
        hashes = {each["name"]: each["hashes"][0]["content"] for each in content["components"]}
        if hashes["training data"] != _materials(at)["dataset"]:
            raise InputError(f"{BOM} names the data set {hashes['training data']}, the attestation another")
        named = {p["name"].rpartition(":")[2]: p["value"] for p in content["metadata"]["component"]["properties"]}
        _same(BOM, named, digests(model))
        return "valid CycloneDX 1.6, of the same files and data", {}

    def run() -> tuple[str, dict[str, Any]]:
        *_, last = [json.loads(line) for line in (at / EVENTS).read_text().splitlines()]
        told = {d["facets"]["version"]["datasetVersion"] for d in last["inputs"]}
        if _materials(at)["dataset"] not in told:
            raise InputError(f"{EVENTS} names other data than the attestation")
        names = [e["attributes"]["qualifiedName"] for e in _json(at / ATLAS)["entities"]]
        if not any(_materials(at)["dataset"] in name for name in names):
            raise InputError(f"{ATLAS} names other data than the attestation")
        return "events and entities of the same run", {}

    return [
        look("signature of the model", signed, SIGNATURE, root is not None),
        look("attestation of the training", attested, ATTESTATION, root is not None),
        look("data set of the training", data, DATA), look("bill of materials", materials, BOM),
        look("events of the training", run, EVENTS),
    ]  # fmt: skip


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _same(name: str, told: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    """InputError names the first thing that differs."""
    for key in sorted({*told, *seen}):
        if told.get(key) != seen.get(key):
            here, there = (str(each.get(key, "nothing"))[:64] for each in (seen, told))
            raise InputError(f"{key}: {name} says {there}, here is {here}")


def _payload(at: Path) -> dict[str, Any]:
    import base64

    return json.loads(base64.b64decode(_json(at / ATTESTATION)["payload"]))


def _byproducts(content: Mapping[str, Any]) -> dict[str, str]:
    found = content["predicate"]["runDetails"]["byproducts"]
    return {each["name"]: each["digest"]["sha256"] for each in found if "digest" in each}


def _materials(at: Path) -> dict[str, str]:
    found = _payload(at)["predicate"]["buildDefinition"]["resolvedDependencies"]
    return {each["name"]: each["digest"]["sha256"] for each in found if "sha256" in each.get("digest", {})}


def _times(content: Mapping[str, Any]) -> dict[str, Any]:
    return dict(content["predicate"]["runDetails"]["metadata"])


def _contract(model: Path) -> str | None:
    """The data set that the model's own contract names."""
    if not (model / CONTRACT).is_file():
        return None
    return _json(model / CONTRACT).get("lineage", {}).get("dataset")

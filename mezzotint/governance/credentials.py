"""Content credentials (C2PA): who made a picture, with what, signed into the file itself.

The manifest holds digests and settings, never a prompt. Nothing is asked of the network: no remote manifest is fetched,
no status of a certificate, and a time stamp only where an authority is named.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mezzotint.errors import InputError
from mezzotint.extras import need
from mezzotint.governance.certificates import Signer

LABEL = "org.mezzotint.generation"  # the assertion with our own facts
SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"  # the vocabulary that C2PA names the origin of media in
DRAWN, EDITED = f"{SOURCES}trainedAlgorithmicMedia", f"{SOURCES}compositeWithTrainedAlgorithmicMedia"
MEDIA = {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"}
OFFLINE: dict[str, Any] = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    "builder": {"thumbnail": {"enabled": False}},
}
State = Literal["trusted", "unknown signer", "invalid", "none"]
WORDS: dict[str, str] = {  # the codes of what is found wrong, in words
    "assertion.dataHash.mismatch": "the picture is not the one that was signed",
    "assertion.hashedURI.mismatch": "a statement in the credentials was changed",
    "assertion.missing": "a statement in the credentials is missing",
    "claimSignature.mismatch": "the signature does not fit the credentials",
    "claimSignature.missing": "the signature is missing",
    "signingCredential.untrusted": "signed under a root that is not trusted here",
    "signingCredential.invalid": "the signing certificate cannot be used",
    "signingCredential.expired": "the signing certificate had expired",
}


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a file says of itself, and whether that holds."""

    state: State
    problems: tuple[str, ...] = ()
    facts: Mapping[str, Any] | None = None  # our own assertion
    signer: str | None = None
    signed: str | None = None  # the time, where a time stamp says it
    source: str | None = None  # the origin, as a term of the vocabulary
    parents: tuple[str, ...] = ()  # pictures that it was made from, by their title


def public(record: Mapping[str, Any]) -> dict[str, Any]:
    """What may be known of a record by whoever has the picture: words become their SHA-256."""
    request = dict(record.get("request", {}))
    for key in ("prompt", "negative"):
        if request.get(key):
            request[f"{key}_sha256"] = hashlib.sha256(str(request[key]).encode()).hexdigest()
        request.pop(key, None)
    return {**record, "request": request}


def sign(data: bytes, media: str, facts: Mapping[str, Any], signer: Signer, parent: bytes | None = None,
         parent_media: str = "image/png", authority: str | None = None) -> bytes:  # fmt: skip
    """The file with its credentials inside; the picture in it is unchanged.

    `facts` is the picture's public record. With `parent`, the file of the picture that was edited, the credentials name
    it. `authority` is the address of a time-stamping service (RFC 3161): with it the signature holds beyond the
    certificate. InputError for a media type that cannot carry credentials, or a signer that does not sign.
    """
    need("c2pa", "cryptography")
    import c2pa

    if media not in MEDIA:
        raise InputError(f"credentials go into {', '.join(MEDIA)}, not {media}")
    made = c2pa.Signer.from_callback(signer.sign, c2pa.C2paSigningAlg.ES256, signer.chain.decode(), authority)
    out = io.BytesIO()
    try:
        with c2pa.Builder.from_json(json.dumps(manifest(media, facts, parent is not None)), _context()) as builder:
            if parent is not None:
                builder.add_ingredient(
                    {"title": "the picture that was edited", "relationship": "parentOf", "instance_id": "parent"},
                    parent_media, io.BytesIO(parent),
                )  # fmt: skip
            builder.sign(made, media, io.BytesIO(data), out)
    except c2pa.C2paError as error:
        raise InputError(f"the picture cannot be signed as {signer.name}: {error}") from error
    finally:
        made.close()
    return out.getvalue()


def manifest(media: str, facts: Mapping[str, Any], edited: bool) -> dict[str, Any]:
    """The statements that are signed: what was done, with which software, and our own facts."""
    agent = {"name": "Mezzotint", "version": str(facts.get("mezzotint", ""))}
    if edited:
        opened = {"action": "c2pa.opened", "parameters": {"ingredientIds": ["parent"]}}
        actions = [opened, {"action": "c2pa.edited", "digitalSourceType": EDITED, "softwareAgent": agent}]
    else:
        actions = [{"action": "c2pa.created", "digitalSourceType": DRAWN, "softwareAgent": agent}]
    uses = ("ai_generative_training", "ai_inference", "ai_training", "data_mining")
    entries = {f"c2pa.{use}": {"use": "notAllowed"} for use in uses}
    return {
        "claim_generator_info": [agent],
        "format": media,
        "title": f"drawn with Mezzotint, seed {facts.get('seed')}",
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": "c2pa.training-mining", "data": {"entries": entries}},
            {"label": LABEL, "kind": "Json", "data": {"record": json.dumps(facts, sort_keys=True)}},
        ],
    }


def read(data: bytes, media: str, root: bytes | None = None) -> Credentials:
    """What a file says of itself, checked. `root` (PEM) is whom to trust; without one every signer is unknown."""
    need("c2pa")
    import c2pa

    try:
        reader = c2pa.Reader.try_create(media, io.BytesIO(data), context=_context(root))
    except c2pa.C2paError as error:
        return Credentials("invalid", (f"the credentials cannot be read: {error}",))
    if reader is None:
        return Credentials("none")
    with reader:
        store = json.loads(reader.json())
        state = reader.get_validation_state()
    active = store["manifests"][store["active_manifest"]]
    codes: list[str] = [entry["code"] for entry in store.get("validation_status", ())]
    problems = tuple(dict.fromkeys(WORDS.get(code, code) for code in codes))
    if state == "Invalid" or any(code not in ("signingCredential.untrusted",) for code in codes):
        found: State = "invalid"
    else:
        found = "trusted" if state == "Trusted" else "unknown signer"
    signature = active.get("signature_info", {})
    return Credentials(
        found, problems, _facts(active), signature.get("common_name") or signature.get("issuer"),
        signature.get("time"), _source(active), tuple(str(each.get("title")) for each in active.get("ingredients", ())),
    )  # fmt: skip


def _context(root: bytes | None = None) -> Any:
    import c2pa

    settings = dict(OFFLINE)
    if root is not None:
        settings |= {"trust": {"user_anchors": root.decode()}}
    return c2pa.Context.from_dict(settings)


def _assertion(active: Mapping[str, Any], label: str) -> Mapping[str, Any] | None:
    return next((each["data"] for each in active.get("assertions", ()) if each["label"] == label), None)


def _facts(active: Mapping[str, Any]) -> dict[str, Any] | None:
    """Our own facts, which are kept as text: the library takes short lists of numbers for bytes."""
    said = _assertion(active, LABEL)
    try:
        return None if said is None else json.loads(said["record"])
    except (KeyError, TypeError, ValueError):
        return None


def _source(active: Mapping[str, Any]) -> str | None:
    for label in ("c2pa.actions.v2", "c2pa.actions"):
        for action in (_assertion(active, label) or {}).get("actions", ()):
            if action.get("digitalSourceType"):
                return str(action["digitalSourceType"]).rpartition("/")[2]
    return None

"""The training attestation: an in-toto statement (v1) with SLSA provenance (v1), in a signed DSSE envelope."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from mezzotint.errors import InputError
from mezzotint.governance.certificates import Signer
from mezzotint.governance.lineage.trained import Trained

STATEMENT, PROVENANCE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
MEDIA, BUILD = "application/vnd.in-toto+json", "urn:mezzotint:training:v1"


def statement(facts: Trained, subjects: Mapping[str, str], documents: Mapping[str, str]) -> dict[str, Any]:
    """What was made (files by name and digest), of what, how and when, and which documents say more of it."""
    materials = [_material("dataset", facts.data["digest"], {"licence": facts.data_licence or "not stated"})]
    if facts.base:
        materials.append(_material("base weights", facts.base, {"licence": facts.base_licence or "not stated"}))
    if facts.commit:
        materials.append({"name": "source", "digest": {"gitCommit": facts.commit}})
    materials += [{"name": name, "annotations": {"version": version}} for name, version in facts.software.items()]
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects.items()],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD,
                "externalParameters": {"recipe": dict(facts.recipe)},
                "internalParameters": {"method": facts.method, "kind": facts.kind},
                "resolvedDependencies": materials,
            },
            "runDetails": {
                "builder": {"id": BUILD, "version": {"mezzotint": facts.software.get("mezzotint", "unknown")}},
                "metadata": {"startedOn": facts.started, "finishedOn": facts.ended},
                "byproducts": [
                    {"name": "measures", "annotations": dict(facts.measures)},
                    *({"name": name, "digest": {"sha256": digest}} for name, digest in documents.items()),
                ],
            },
        },
    }


def _material(name: str, digest: str, notes: Mapping[str, str]) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}, "annotations": dict(notes)}


def sealed(content: Mapping[str, Any], signer: Signer) -> dict[str, Any]:
    """A DSSE envelope: the statement and an ECDSA signature over its type and bytes."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    signature = base64.b64encode(signer.sign(encoded(MEDIA, body))).decode()
    return {
        "payloadType": MEDIA, "payload": base64.b64encode(body).decode(),
        "signatures": [{"keyid": signer.name, "sig": signature}],
    }  # fmt: skip


def opened(envelope: Mapping[str, Any], chain: bytes, root: bytes) -> dict[str, Any]:
    """The statement of an envelope; InputError where the signature, the certificate or its root does not fit."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    try:
        leaf = x509.load_pem_x509_certificates(chain)[0]
        leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(root))
    except Exception as error:
        raise InputError("the certificate of the attestation was not issued by the root that is trusted") from error
    try:
        body = base64.b64decode(envelope["payload"], validate=True)
        raw = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
        half = len(raw) // 2
        der = utils.encode_dss_signature(int.from_bytes(raw[:half], "big"), int.from_bytes(raw[half:], "big"))
        key: Any = leaf.public_key()
        key.verify(der, encoded(envelope["payloadType"], body), ec.ECDSA(hashes.SHA256()))
        return json.loads(body)
    except InvalidSignature as error:
        raise InputError("the signature does not fit the attestation: one of them was changed") from error
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise InputError(f"the attestation is damaged: {error}") from error


def encoded(media: str, body: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(media), media.encode(), len(body), body)

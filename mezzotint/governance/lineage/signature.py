"""The signature of a whole model folder (OpenSSF model signing), file by file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from mezzotint.errors import InputError
from mezzotint.extras import need
from mezzotint.governance.lineage.trained import FOLDER


def sign(model: Path, out: Path, certificates: Path) -> Path:
    """Sign all files of a model folder but those of its lineage, with the certificate for models."""
    need("model_signing", "OpenSSL")
    import model_signing

    with tempfile.TemporaryDirectory() as scratch:
        leaf = Path(scratch) / "leaf.pem"
        leaf.write_bytes(first((certificates / "models.pem").read_bytes()))
        config = model_signing.signing.Config().use_certificate_signer(
            private_key=certificates / "models.key", signing_certificate=leaf,
            certificate_chain=[certificates / "root.pem"],
        )  # fmt: skip
        config.set_hashing_config(_hashing(out)).sign(model, out)
    return out


def verify(model: Path, signature: Path, root: Path) -> None:
    """InputError names the files that are changed, missing or added, or the root that does not fit."""
    need("model_signing", "OpenSSL")
    import model_signing

    config = model_signing.verifying.Config().use_certificate_verifier(certificate_chain=[root])
    try:
        config.set_hashing_config(_hashing(signature)).verify(model, signature)
    except Exception as error:  # the library raises ValueError for what differs, and many kinds for damaged files
        says = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the signature {signature.name} does not hold: {says}") from error


def first(chain: bytes) -> bytes:
    """The first certificate of a chain."""
    end = b"-----END CERTIFICATE-----\n"
    return chain.partition(end)[0] + end


def _hashing(signature: Path) -> Any:
    import model_signing

    apart = {FOLDER, signature.parent.name}  # the second while it is being written
    return model_signing.hashing.Config().set_ignored_paths(paths=apart, ignore_git_paths=False)

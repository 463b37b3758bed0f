"""A private root and what it vouches for: one certificate that signs pictures, one that signs models.

All keys are on the curve P-256 (ES256). The root's key is needed only to make further certificates: it may be moved to
a safe place, and back for `renew`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mezzotint import files
from mezzotint.errors import InputError
from mezzotint.extras import need
from mezzotint.governance.home import home, read_secret, secret

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

Purpose = Literal["pictures", "models"]
PURPOSES: tuple[Purpose, ...] = ("pictures", "models")
ROOT, LEAF = 3650, 730  # days that they hold
EARLY = timedelta(hours=1)  # before now, for clocks that are slow
AGAIN = "Make new ones with `mezzotint certs renew`."


@dataclass(frozen=True, slots=True)
class Signer:
    """Who signs: a certificate with those above it, and a function that signs with its key.

    `sign` gives the raw 64 bytes r || s of ECDSA with SHA-256 over the bytes it is handed; where a key is kept in a
    security module or a key service it calls that.
    """

    chain: bytes  # PEM, the signing certificate first
    sign: Callable[[bytes], bytes]
    name: str
    until: datetime


def folder_of(folder: Path | None) -> Path:
    """The folder of certificates: the one given, else that of this user."""
    return folder if folder is not None else home() / "certificates"


def init(folder: Path | None = None, name: str = "Mezzotint", days: int = LEAF) -> Path:
    """Make a root and both certificates; InputError where the folder holds some already."""
    need("cryptography")
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    at = folder_of(folder)
    if (at / "root.pem").exists() or (at / "root.key").exists():
        raise InputError(f"{at} holds certificates already. Renew them with `mezzotint certs renew`, or use --out.")
    _check(name, days)
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = _name(name, f"{name} root"), datetime.now(UTC)
    root = (
        _builder(subject, subject, key, now, ROOT)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    try:
        at.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{at.name}.", dir=at.parent))  # all of it, or nothing
    except OSError as error:
        raise InputError(f"cannot write into {at.parent}: {error.strerror or error}") from error
    try:
        secret(scratch / "root.key", _pem(key))
        files.write_bytes(scratch / "root.pem", _certificate(root))
        for purpose in PURPOSES:
            _issue(scratch, purpose, root, key, name, days)
        scratch.rename(at)
    except OSError as error:
        raise InputError(f"cannot write {at}: {error.strerror or error}. Choose an empty or a new folder.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return at


def renew(folder: Path | None = None, days: int = LEAF) -> Path:
    """New keys and certificates under the same root; old keys are deleted, and what they signed stays valid."""
    need("cryptography")
    from cryptography import x509

    at = folder_of(folder)
    root, key = root_of(at), _key(at / "root.key")
    _belongs(at / "root.key", key, root)
    organisation = root.subject.get_attributes_for_oid(x509.NameOID.ORGANIZATION_NAME)[0].value
    _check(str(organisation), days)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for purpose in PURPOSES:
        (at / f"{purpose}.key").unlink(missing_ok=True)
        if (old := at / f"{purpose}.pem").exists():
            old.rename(at / f"{purpose}-until-{stamp}.pem")
        _issue(at, purpose, root, key, str(organisation), days)
    return at


def ready(folder: Path | None = None) -> Path:
    """The folder of certificates, made at first use where it is missing altogether."""
    at = folder_of(folder)
    return at if (at / "root.pem").exists() else init(at)


def signer(folder: Path | None, purpose: Purpose) -> Signer:
    """The certificate of a purpose with its key.

    InputError where one is missing, not private, expired, or where key, certificate and root do not belong together.
    """
    need("cryptography")
    from cryptography import x509

    at = folder_of(folder)
    place = at / f"{purpose}.pem"
    try:
        chain = place.read_bytes()
        leaf = x509.load_pem_x509_certificates(chain)[0]
    except FileNotFoundError as error:
        raise InputError(f"no certificate for {purpose} in {at}. Make some with `mezzotint certs init`.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{place} is no certificate: {error}. {AGAIN}") from error
    key = _key(at / f"{purpose}.key")
    _belongs(at / f"{purpose}.key", key, leaf)
    root = root_of(at)
    try:
        leaf.verify_directly_issued_by(root)
    except Exception as error:
        raise InputError(f"{place} was not issued by {at / 'root.pem'}. {AGAIN}") from error
    now = datetime.now(UTC)
    if now > leaf.not_valid_after_utc:
        raise InputError(f"{place} expired on {leaf.not_valid_after_utc:%Y-%m-%d}. {AGAIN}")
    if now < leaf.not_valid_before_utc:
        raise InputError(f"{place} is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M}: set the clock.")
    return Signer(chain, _raw(key), common_name(leaf), leaf.not_valid_after_utc)


def root_of(folder: Path | None = None) -> x509.Certificate:
    """The root certificate of a folder."""
    need("cryptography")
    from cryptography import x509

    place = folder_of(folder) / "root.pem"
    try:
        return x509.load_pem_x509_certificate(place.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"no root certificate: {place}. Make one with `mezzotint certs init`.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{place} is no certificate: {error}") from error


def common_name(certificate: x509.Certificate) -> str:
    """The name in a certificate."""
    from cryptography.x509 import NameOID

    found = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(found[0].value) if found else "unnamed"


def _issue(
    at: Path, purpose: Purpose, root: x509.Certificate, root_key: EllipticCurvePrivateKey, name: str, days: int
) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    # content credentials ask for the first purpose, signatures of software for the second
    uses = {"pictures": x509.ExtendedKeyUsageOID.EMAIL_PROTECTION, "models": x509.ExtendedKeyUsageOID.CODE_SIGNING}
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        _builder(_name(name, f"{name} {purpose}"), root.subject, key, datetime.now(UTC), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([uses[purpose]]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    secret(at / f"{purpose}.key", _pem(key))
    files.write_bytes(at / f"{purpose}.pem", _certificate(leaf) + _certificate(root))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    from cryptography import x509

    public = key.public_key()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _name(organisation: str, common: str) -> x509.Name:
    from cryptography import x509

    return x509.Name([
        x509.NameAttribute(x509.NameOID.ORGANIZATION_NAME, organisation),
        x509.NameAttribute(x509.NameOID.COMMON_NAME, common),
    ])  # fmt: skip


def _check(name: str, days: int) -> None:
    if not 1 <= len(name) <= 54:  # a certificate's names have 64 characters at most
        raise InputError(f"--name must have 1 to 54 characters, not {len(name)}")
    if not 1 <= days <= ROOT:
        raise InputError(f"--days must be 1 to {ROOT}, which is how long the root holds, not {days}")


def _pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _certificate(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key(path: Path) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(read_secret(path), password=None)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is no private key that can be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError(f"{path} is not a key on the curve P-256")
    return key


def _belongs(path: Path, key: EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    if key.public_key() != certificate.public_key():
        raise InputError(f"{path} does not belong to the certificate beside it. {AGAIN}")


def _raw(key: EllipticCurvePrivateKey) -> Callable[[bytes], bytes]:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, utils

    def sign(data: bytes) -> bytes:
        r, s = utils.decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign

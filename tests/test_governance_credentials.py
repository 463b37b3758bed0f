"""Certificates and content credentials: what holds, what was changed, who may read a key."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mezzotint.errors import InputError
from mezzotint.governance import certificates, credentials, home
from mezzotint.governance.certificates import Signer

FACTS = {
    "seed": 3, "mezzotint": "0.1", "model": {"weights": "ab" * 32},
    "request": {"prompt": "a cracked cell", "negative": "", "steps": 20},
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def signer() -> Signer:
    certificates.init(name="Acme")
    return certificates.signer(None, "pictures")


def root() -> bytes:
    return (certificates.folder_of(None) / "root.pem").read_bytes()


def picture(kind: str, side: int = 64) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("media", credentials.MEDIA)
def test_a_signed_picture_is_the_same_picture_and_says_who_made_it(media: str, signer: Signer) -> None:
    plain = picture(credentials.MEDIA[media])
    signed = credentials.sign(plain, media, credentials.public(FACTS), signer)
    assert (pixels(signed) == pixels(plain)).all()
    found = credentials.read(signed, media, root())
    assert (found.state, found.signer, found.source) == ("trusted", "Acme pictures", "trainedAlgorithmicMedia")
    assert found.problems == () and found.parents == ()
    assert found.facts == credentials.public(FACTS)
    assert credentials.read(signed, media).state == "unknown signer"
    assert credentials.read(plain, media, root()).state == "none"
    assert b"a cracked cell" not in signed  # the words themselves never leave
    digest = hashlib.sha256(b"a cracked cell").hexdigest()
    assert found.facts["request"] == {"steps": 20, "prompt_sha256": digest}


def test_every_changed_byte_of_the_picture_is_found(signer: Signer) -> None:
    signed = credentials.sign(picture("PNG"), "image/png", FACTS, signer)
    start = signed.find(b"IDAT") + 4
    for place in np.linspace(start, len(signed) - 20, 12).astype(int):
        changed = bytearray(signed)
        changed[place] ^= 1
        found = credentials.read(bytes(changed), "image/png", root())
        assert found.state == "invalid" and "the picture is not the one that was signed" in found.problems


def test_an_edited_statement_is_told_from_an_edited_picture(signer: Signer) -> None:
    signed = credentials.sign(picture("JPEG"), "image/jpeg", FACTS, signer)
    found = credentials.read(signed.replace(b'seed\\": 3', b'seed\\": 4'), "image/jpeg", root())
    assert found.state == "invalid" and "a statement in the credentials was changed" in found.problems


def test_saving_again_strips_and_another_root_is_not_trusted(signer: Signer, tmp_path: Path) -> None:
    signed = credentials.sign(picture("PNG"), "image/png", FACTS, signer)
    stream = io.BytesIO()
    Image.open(io.BytesIO(signed)).save(stream, "PNG")
    assert credentials.read(stream.getvalue(), "image/png", root()).state == "none"
    foreign = certificates.init(tmp_path / "other", "Mallory")
    found = credentials.read(signed, "image/png", (foreign / "root.pem").read_bytes())
    assert found.state == "unknown signer" and "not trusted" in found.problems[0]


def test_an_edit_names_its_parent(signer: Signer) -> None:
    first = credentials.sign(picture("PNG"), "image/png", FACTS, signer)
    second = credentials.sign(picture("PNG", 32), "image/png", FACTS, signer, first, "image/png")
    found = credentials.read(second, "image/png", root())
    assert found.state == "trusted" and found.source == "compositeWithTrainedAlgorithmicMedia"
    assert found.parents == ("the picture that was edited",)


def test_a_key_elsewhere_signs_by_a_function(signer: Signer) -> None:
    asked: list[bytes] = []

    def service(data: bytes) -> bytes:
        asked.append(data)
        return signer.sign(data)

    remote = Signer(signer.chain, service, signer.name, signer.until)
    signed = credentials.sign(picture("PNG"), "image/png", FACTS, remote)
    assert len(asked) == 1 and credentials.read(signed, "image/png", root()).state == "trusted"

    def broken(data: bytes) -> bytes:
        raise OSError("the key service does not answer")

    with pytest.raises(InputError, match="cannot be signed as Acme pictures"):
        credentials.sign(picture("PNG"), "image/png", FACTS, Signer(signer.chain, broken, signer.name, signer.until))


def test_files_that_carry_no_credentials_are_refused(signer: Signer) -> None:
    with pytest.raises(InputError, match="image/png, image/jpeg, image/webp"):
        credentials.sign(b"BM", "image/bmp", FACTS, signer)


# Certificates.


def test_keys_are_private_and_stay(signer: Signer, own_home: Path) -> None:
    at = own_home / "certificates"
    for name in ("root.key", "pictures.key", "models.key"):
        assert (at / name).stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="holds certificates already"):
        certificates.init()
    os.chmod(at / "pictures.key", 0o640)
    with pytest.raises(InputError, match=r"may be read by others.*\n?.*chmod 600"):
        certificates.signer(None, "pictures")
    with pytest.raises(InputError, match="is there already"):
        home.secret(at / "root.key", b"")


def test_parts_that_do_not_belong_together_are_refused(signer: Signer, own_home: Path, tmp_path: Path) -> None:
    at, other = own_home / "certificates", certificates.init(tmp_path / "other")
    good = (at / "pictures.key").read_bytes()
    (at / "pictures.key").write_bytes((other / "pictures.key").read_bytes())
    with pytest.raises(InputError, match="does not belong to the certificate"):
        certificates.signer(None, "pictures")
    (at / "pictures.key").write_bytes(good)
    (at / "root.pem").write_bytes((other / "root.pem").read_bytes())
    with pytest.raises(InputError, match="was not issued by"):
        certificates.signer(None, "pictures")
    (at / "pictures.pem").write_text("nonsense")
    with pytest.raises(InputError, match="is no certificate"):
        certificates.signer(None, "pictures")
    with pytest.raises(InputError, match="mezzotint certs init"):
        certificates.signer(tmp_path / "nowhere", "models")


def test_what_expired_is_refused_with_its_date_and_renewed(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = certificates.init(days=1)
    old = credentials.sign(picture("PNG"), "image/png", FACTS, certificates.signer(None, "pictures"))
    later = certificates.datetime.now(certificates.UTC) + certificates.timedelta(days=2)

    class Clock(certificates.datetime):
        @classmethod
        def now(cls, tz: object = None) -> certificates.datetime:
            return later

    with monkeypatch.context() as patched:
        patched.setattr(certificates, "datetime", Clock)
        with pytest.raises(InputError, match=r"expired on 20\d\d-.*\n?.*certs renew"):
            certificates.signer(None, "pictures")
    before = certificates.signer(None, "models").chain
    certificates.renew()
    assert certificates.signer(None, "models").chain != before and len(list(at.glob("pictures-until-*.pem"))) == 1
    assert not list(at.glob("*until*.key"))
    assert credentials.read(old, "image/png", root()).state == "trusted"  # under the same root


@pytest.mark.parametrize(("name", "days", "said"), [("", 10, "--name"), ("x" * 60, 10, "--name"), ("x", 0, "--days")])
def test_wrong_wishes_make_nothing(name: str, days: int, said: str, own_home: Path) -> None:
    with pytest.raises(InputError, match=said):
        certificates.init(name=name, days=days)
    assert not (own_home / "certificates").exists()

"""A watermark in the noise that a picture starts from: Gaussian Shading (Yang et al. 2024), one bit a number.

The payload's bits, repeated over all numbers and encrypted, decide the signs of the start noise; its magnitudes are
the seed's own: z = (2 b - 1) |n|. The keystream is uniform and independent of n, so z is standard normal exactly as n
is, and pictures are what they were, drawn from another noise. To read it the picture is walked back to its noise.

The keystream is SHAKE-256 over key and nonce (a pseudorandom function, FIPS 202, as long as the key is secret and no
nonce serves twice). For a picture that was not marked with this key and nonce, whatever it looks like, the stream is
independent of its noise, so the number of equal signs is binomial(N, 1/2): false alarms are known without measuring.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mezzotint.errors import InputError
from mezzotint.governance.home import home, read_secret, secret

if TYPE_CHECKING:
    from torch import Tensor

Bits = NDArray[np.uint8]  # 0 or 1
PAYLOAD = 8  # bytes: four of the key's name, four of the picture's own
RATE = 1e-6  # of false alarms, over all nonces that are tried for a picture


@dataclass(frozen=True, slots=True)
class Key:
    """What marks and finds: the secret, and its name, which may be known."""

    secret: bytes
    id: str  # 8 hexadecimal digits, the beginning of the secret's SHA-256

    @staticmethod
    def of(secret: bytes) -> Key:
        """The key of a secret of at least 32 bytes."""
        if len(secret) < 32:
            raise InputError(f"a watermark key has at least 32 bytes, not {len(secret)}")
        return Key(secret, hashlib.sha256(secret).hexdigest()[:8])


def key_at(path: Path | None = None, create: bool = False) -> Key:
    """The key in a file, or this user's own; with `create` that is made where it is missing.

    InputError where it is missing, where others may read it, or where it is no key.
    """
    place = path if path is not None else home() / "watermark.key"
    if create and not place.exists():
        secret(place, secrets.token_bytes(32).hex().encode() + b"\n")
    try:
        return Key.of(bytes.fromhex(read_secret(place).decode().strip()))
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise InputError(f"{place} is no watermark key: hexadecimal digits are expected") from error


def nonce_of(key: Key, facts: Mapping[str, Any], seed: int) -> bytes:
    """16 bytes for one picture of one request: HMAC-SHA-256 over the request's facts and the seed.

    Not random, so that a request with its seed draws one picture, to the bit, however often it is asked; any other
    request or seed has another nonce.
    """
    said = json.dumps([facts, seed], sort_keys=True, separators=(",", ":")).encode()
    return hmac.new(key.secret, said, hashlib.sha256).digest()[:16]


def payload_of(key: Key, own: bytes) -> bytes:
    """The key's name and up to four bytes of the picture's own, such as the beginning of its model's digest."""
    return bytes.fromhex(key.id) + own[:4].ljust(4, b"\0")


def shaded(noise: Tensor, key: Key, nonce: bytes, payload: bytes) -> Tensor:
    """Unit noise of one picture (C, h, w) with the payload in its signs."""
    import torch

    return torch.from_numpy(signs(noise.numel(), key, nonce, payload)).view(noise.shape).to(noise) * noise.abs()


@dataclass(frozen=True, slots=True)
class Reading:
    """What the signs of a noise say."""

    payload: bytes  # by majority
    right: int  # of its bits, those as they should be
    bits: int
    share: float  # of all numbers, those whose signs are as they should be; 0.5 by chance
    log_chance: float  # natural logarithm of the chance, at most, that a picture without this mark agrees as well

    @property
    def accuracy(self) -> float:
        """Share of the payload's bits that are right."""
        return self.right / self.bits

    def found(self, tried: int = 1, rate: float = RATE) -> bool:
        """Whether the mark is there; false alarms stay below `rate` over all the nonces that were tried."""
        return self.log_chance < math.log(rate / tried)


def read(noise: Tensor, key: Key, nonce: bytes, payload: bytes) -> Reading:
    """The payload and how well it stands in an estimate of start noise (C, h, w)."""
    positive = _positive(noise)
    stream = positive ^ _stream(len(positive), key, nonce)
    wanted = np.unpackbits(np.frombuffer(payload, np.uint8))
    place = np.arange(len(positive)) % len(wanted)
    votes = np.bincount(place, weights=2.0 * stream - 1.0, minlength=len(wanted))
    decoded: Bits = (votes > 0).astype(np.uint8)
    equal = int((stream == wanted[place]).sum())
    return Reading(
        np.packbits(decoded).tobytes(), int((decoded == wanted).sum()), len(wanted), equal / len(positive),
        log_tail(len(positive), equal),
    )  # fmt: skip


def best(noise: Tensor, key: Key, marks: Sequence[tuple[bytes, bytes]]) -> tuple[int, Reading]:
    """Of many (nonce, payload) the one that stands best in a noise, by its place; InputError where there is none."""
    if not marks:
        raise InputError("there is no mark to look for: the log names none with this key")
    packed = np.packbits(_positive(noise))
    equal = [_equal(packed, noise.numel(), key, *mark) for mark in marks]
    place = int(np.argmax(equal))
    return place, read(noise, key, *marks[place])


def signs(count: int, key: Key, nonce: bytes, payload: bytes) -> NDArray[np.float32]:
    """(count,) of +1 and -1: what the payload, repeated and encrypted, asks for."""
    return 2.0 * _encrypted(count, key, nonce, payload).astype(np.float32) - 1.0


def log_tail(numbers: int, equal: int) -> float:
    """log P(X >= equal) for X of binomial(numbers, 1/2), exact."""
    import torch

    k = torch.arange(equal, numbers + 1, dtype=torch.float64)
    n = torch.tensor(float(numbers), dtype=torch.float64)
    terms = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) - n * math.log(2)
    return min(0.0, float(torch.logsumexp(terms, 0)))


def _stream(count: int, key: Key, nonce: bytes) -> Bits:
    """(count,) bits of the keystream."""
    octets = hashlib.shake_256(key.secret + nonce).digest(-(-count // 8))
    return np.unpackbits(np.frombuffer(octets, np.uint8))[:count]


def _encrypted(count: int, key: Key, nonce: bytes, payload: bytes) -> Bits:
    """(count,) the payload over and over, encrypted."""
    bits = np.unpackbits(np.frombuffer(payload, np.uint8))
    return np.resize(bits, count) ^ _stream(count, key, nonce)


def _positive(noise: Tensor) -> Bits:
    return (noise.flatten() > 0).cpu().numpy().astype(np.uint8)


def _equal(packed: Bits, count: int, key: Key, nonce: bytes, payload: bytes) -> int:
    """How many signs, packed, are those of a mark."""
    return count - int(np.bitwise_count(packed ^ np.packbits(_encrypted(count, key, nonce, payload))).sum())

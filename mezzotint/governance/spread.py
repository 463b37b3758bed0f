"""A watermark in the pixels, where there is no start noise to mark: spread spectrum (Cox et al. 1997).

A sign of the key's stream times a bit of the payload is added to each of the 14 lowest waves of every block of 8x8
pixels of the brightness (the discrete cosine transform that JPEG uses). It is found by correlation. As with Gaussian
Shading the stream is uniform and independent of any picture that it did not mark, so the chance of a false alarm is
bounded without measuring: a sum of independent signs s_i with any weights c_i has (Hoeffding 1963, theorem 2)

    P(sum s_i c_i >= t (sum c_i^2)^(1/2)) <= exp(-t^2 / 2)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mezzotint.errors import InputError
from mezzotint.governance.shading import Key, Reading, signs

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[np.float64]
SIDE = 8  # pixels of a block
WAVES = tuple((u, v) for u in range(SIDE) for v in range(SIDE) if 1 <= u + v <= 4)
STRENGTH = 4.0  # grey levels that a wave is changed by: 42 dB between the marked picture and the plain one
LIMIT = 2.0  # deviations of a wave at which it counts no more: edges say much of the picture and nothing of the mark


def marked(
    picture: Image, key: Key, nonce: bytes, payload: bytes, mask: Image | None = None, strength: float = STRENGTH
) -> Image:
    """The picture with the mark; where a mask is black it stays as it is, to the bit. InputError for less than a block.

    Pictures with transparency keep it. A repainted spot holds a small part of the mark only: below about a quarter of
    a picture of 128x128 it is too small to be found.
    """
    from PIL import Image as pil

    plain = picture if picture.mode in ("L", "RGB", "RGBA", "LA") else picture.convert("RGB")
    pixels = np.asarray(plain, dtype=np.float64)
    height, width = pixels.shape[:2]
    rows, columns = _blocks(height, width)
    waves = np.zeros((rows, columns, SIDE, SIDE))
    pattern = signs(rows * columns * len(WAVES), key, nonce, payload).reshape(rows, columns, len(WAVES))
    waves[:, :, *np.array(WAVES).T] = strength * pattern
    change = np.zeros((height, width))
    change[: rows * SIDE, : columns * SIDE] = _joined(_BASIS.T @ waves @ _BASIS)
    if mask is not None:
        change *= np.asarray(mask.convert("L").resize(plain.size, pil.Resampling.NEAREST)) > 0
    colours = pixels.reshape(height, width, -1)
    bands = colours.shape[-1] - (plain.mode in ("LA", "RGBA"))
    colours[..., :bands] = colours[..., :bands] + change[..., None]
    return pil.fromarray(colours.reshape(pixels.shape).round().clip(0, 255).astype(np.uint8), plain.mode)


def read(picture: Image, key: Key, nonce: bytes, payload: bytes, size: tuple[int, int] | None = None) -> Reading:
    """The payload and how well it stands in a picture.

    `size` is the width and height that was marked; where the picture is smaller it is taken for a piece cut out of that
    one, and the place it fits best is looked for, which the chance of a false alarm allows for.
    """
    brightness = np.asarray(picture.convert("L"), dtype=np.float64)
    width, height = size or picture.size
    rows, columns = _blocks(height, width)
    stream = signs(rows * columns * len(WAVES), key, nonce, bytes(len(payload)))  # under a payload of zeros
    bit = np.arange(stream.size) % (8 * len(payload))
    wanted = np.unpackbits(np.frombuffer(payload, np.uint8))
    shape = rows, columns, len(WAVES)
    weights, at, tried = _placed(brightness, (stream * (1 - 2.0 * wanted[bit])).reshape(shape))
    part = (slice(at[0], at[0] + weights.shape[0]), slice(at[1], at[1] + weights.shape[1]))
    agree = weights * stream.reshape(shape)[part]
    votes = -np.bincount(bit.reshape(shape)[part].ravel(), weights=agree.ravel(), minlength=len(wanted))
    decoded = (votes > 0).astype(np.uint8)  # a bit of 1 turns the stream
    t = float((votes * (2.0 * wanted - 1)).sum()) / math.sqrt(float((weights**2).sum()) or 1.0)
    return Reading(
        np.packbits(decoded).tobytes(), int((decoded == wanted).sum()), len(wanted),
        0.5 + 0.5 * t / math.sqrt(weights.size), min(0.0, math.log(tried) - max(t, 0.0) ** 2 / 2),
    )  # fmt: skip


def _placed(brightness: Array, pattern: Array) -> tuple[Array, tuple[int, int], int]:
    """The waves of a picture (r, c, W), the block of the pattern (R, C, W) where they begin, and the places tried."""
    rows, columns = _blocks(*brightness.shape)
    if (rows, columns) == pattern.shape[:2] or rows > pattern.shape[0] or columns > pattern.shape[1]:
        return _waves(brightness)[: pattern.shape[0], : pattern.shape[1]], (0, 0), 1
    best, found, tried = -math.inf, (_waves(brightness), (0, 0)), 0
    turned = np.conj(np.fft.fft2(pattern, axes=(0, 1)))
    for y in range(SIDE):
        for x in range(SIDE):
            if min(brightness.shape[0] - y, brightness.shape[1] - x) < SIDE:
                continue
            waves = _waves(brightness[y:, x:])
            room = pattern.shape[0] - waves.shape[0] + 1, pattern.shape[1] - waves.shape[1] + 1
            spectrum = np.fft.fft2(waves, pattern.shape[:2], axes=(0, 1)) * turned
            fit = np.fft.ifft2(spectrum.sum(-1)).real  # at minus the block where the piece begins
            scores = np.roll(fit[::-1, ::-1], (1, 1), (0, 1))[: room[0], : room[1]] / np.linalg.norm(waves)
            tried += scores.size
            if scores.max() > best:
                place = np.unravel_index(int(scores.argmax()), scores.shape)
                best, found = float(scores.max()), (waves, (int(place[0]), int(place[1])))
    return *found, tried


def _waves(brightness: Array) -> Array:
    """(rows, columns, W) of all whole blocks, each wave in its own deviations and cut off at LIMIT.

    Weighted by 1 / variance, which would be best without compression, the mark is lost with JPEG 50: half the pictures.
    """
    rows, columns = _blocks(*brightness.shape)
    blocks = brightness[: rows * SIDE, : columns * SIDE].reshape(rows, SIDE, columns, SIDE).swapaxes(1, 2)
    waves = (_BASIS @ blocks @ _BASIS.T)[:, :, *np.array(WAVES).T]
    deviation = np.sqrt((waves**2).mean((0, 1))).clip(min=1e-6)
    return (waves / deviation).clip(-LIMIT, LIMIT)


def _blocks(height: int, width: int) -> tuple[int, int]:
    if min(height, width) < SIDE:
        raise InputError(f"a picture of {width}x{height} is too small for a watermark: at least {SIDE}x{SIDE}")
    return height // SIDE, width // SIDE


def _joined(blocks: Array) -> Array:
    rows, columns = blocks.shape[:2]
    return blocks.swapaxes(1, 2).reshape(rows * SIDE, columns * SIDE)


def _basis() -> Array:
    """(8, 8) orthonormal cosines, a row a wave: block = B^T wave B."""
    n = np.arange(SIDE)
    waves = np.cos(np.pi * (n[None] + 0.5) * n[:, None] / SIDE) * math.sqrt(2 / SIDE)
    waves[0] /= math.sqrt(2)
    return waves


_BASIS = _basis()

"""Latents and text states computed once, bound to what made them: the networks, their precision and the data."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint import files
from mezzotint.conditioning import Conditioning
from mezzotint.data import table
from mezzotint.data.folder import ImageFolder
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

LATENTS = "mezzotint-latents-2"  # 1 stretched pictures of other shapes to the size
TEXT = "mezzotint-text-1"
FIELDS = ("tokens", "mask", "pooled")  # of a Conditioning: what a text encoder gives
FAR = 50.0  # backbone units, in which latents have a deviation of about 1


def latents(
    path: Path,
    images: ImageFolder,
    mirrorings: Sequence[tuple[int, ...]],
    encode: Callable[[Tensor], Tensor],
    codec: str,
    codec_file: Path,
    batch: int = 32,
    watch: Callable[[int, int], None] | None = None,
    dtype: str = "float32",
) -> Tensor:
    """Latents (N, V, c, h, w) float32 of all images under all mirrorings: read from `path`, or computed and kept there.

    They are the file itself, mapped, so there may be more of them than memory holds. The file's header holds the
    digests of codec and data, the images, size, mirrorings, and the dtype that the codec computes in. A file made by
    another codec, in another precision or from other data is refused with both digests and both files named: it is
    never reused, and never overwritten either. A latent that is not finite names its image, as does one that the codec
    gives to no picture in particular (InputError); a picture of one colour, or a latent beyond 50, which may be meant,
    is a warning. `watch(done, all)` follows the computing.
    """
    height, width = images.bytes.shape[-2:]
    header = {
        "format": LATENTS,
        "codec": codec,
        "dtype": dtype,
        "data": images.manifest.digest,
        "images": files.sha256_json(list(images.names)),  # a bucket's size alone does not say which it holds
        "size": f"{width}x{height}",
        "mirrorings": json.dumps([list(m) for m in mirrorings]),
    }
    sources = {"codec": codec_file, "dtype": codec_file, "data": images.folder, "images": images.folder}

    def batches() -> Iterator[dict[str, Tensor]]:
        import torch

        blank: list[str] = []
        far: dict[str, float] = {}
        for start in range(0, len(images), batch):
            chosen = torch.arange(start, min(start + batch, len(images)))
            with torch.no_grad():
                part = torch.stack([encode(images.pixels(chosen, flip)).cpu() for flip in mirrorings], dim=1)
            if part.dtype != torch.float32 and str(part.dtype) != f"torch.{dtype}":
                raise ValueError(f"latents are said to be made in {dtype}, and came in {part.dtype}")
            part = part.float()
            for i, rows in zip(chosen.tolist(), part, strict=True):
                _judge(images, i, rows, codec_file, dtype, blank, far)
            yield {"latents": part}
            if watch is not None:
                watch(int(chosen[-1]) + 1, len(images))
        _warn(images, blank, far)

    return _kept(Path(path), len(images), header, sources, batches)["latents"]


def distinct(captions: Sequence[str]) -> list[str]:
    """The captions that are different, sorted, behind the empty prompt: the rows of `text`."""
    return ["", *sorted(set(captions) - {""})]


def text(
    path: Path,
    captions: Sequence[str],
    encode: Callable[[Sequence[str]], Conditioning],
    encoders: str,
    at: Path,
    batch: int = 64,
    watch: Callable[[int, int], None] | None = None,
    source: Path | None = None,
) -> Conditioning:
    """Text states, a row for each of the `distinct` captions, in the dtypes of `encode`: read from `path`, or computed.

    Row 0 is the empty prompt: `encode([""])`, which is asked for alone, since some models take zeros for it. The header
    holds `encoders`, the digest of all that a row depends on besides its caption (networks, layers, length, what stands
    for nothing), and that of the captions. As with latents, a file of other encoders or captions is refused with both
    digests and both files (`at`, where the encoders lie, and `source`, where the captions do); a state that is not
    finite names its caption.
    """
    wanted = distinct(captions)
    header = {"format": TEXT, "encoders": encoders, "captions": files.sha256_json(wanted)}
    sources = {"encoders": at} | ({"captions": source} if source else {})

    def batches() -> Iterator[dict[str, Tensor]]:
        import torch

        for start, end in [(0, 1), *((i, min(i + batch, len(wanted))) for i in range(1, len(wanted), batch))]:
            with torch.no_grad():
                encoded = encode(wanted[start:end])
            rows = {name: value.cpu() for name in FIELDS if (value := getattr(encoded, name)) is not None}
            for name, value in rows.items():
                finite = value.isfinite().flatten(1).all(1)
                if not bool(finite.all()):
                    caption = wanted[start + int((~finite).nonzero()[0])]
                    raise InputError(
                        f"the text encoders of {at} overflow on {caption!r}: its {name} in {value.dtype} are not"
                        " finite. Use float32 or bfloat16 for them."
                    )
            yield rows
            if watch is not None:
                watch(end, len(wanted))

    rows = _kept(Path(path), len(wanted), header, sources, batches)
    return Conditioning(tokens=rows.get("tokens"), mask=rows.get("mask"), pooled=rows.get("pooled"))


def _kept(
    path: Path,
    count: int,
    header: Mapping[str, str],
    sources: Mapping[str, Path],
    batches: Callable[[], Iterator[dict[str, Tensor]]],
) -> dict[str, Tensor]:
    """The tensors of a table that is there and bound to `header`, or is written now."""
    if not path.exists():
        table.write(path, count, header, batches())
    found, tensors = table.read(path)
    for key, value in header.items():
        if found.get(key) != value:
            place = f" of {sources[key]}" if key in sources else ""
            raise InputError(
                f"the cache {path} was made with {key} {_short(found.get(key))}, this run has {_short(value)}{place}."
                " Delete the cache, or name another one with data.cache."
            )
    for name, tensor in tensors.items():
        if len(tensor) != count:
            raise InputError(f"the cache {path} is damaged: {len(tensor)} rows of {name}, not {count}. Delete it.")
    return tensors


def _judge(
    images: ImageFolder,
    i: int,
    rows: Tensor,
    codec_file: Path,
    dtype: str,
    blank: list[str],
    far: dict[str, float],
) -> None:
    """InputError where an image's latents cannot be right; `blank` and `far` collect what is only strange."""
    name = images.names[i]
    if not bool(rows.isfinite().all()):
        raise InputError(
            f"the codec {codec_file} overflows on {images.folder / name}: its latents are not finite in {dtype}. Use"
            f" {'another image' if dtype == 'float32' else 'float32 for the codec, or one made for ' + dtype}."
        )
    picture = images.bytes[i]
    plain = bool((picture == picture[:, :1, :1]).all())
    if plain:
        blank.append(name)
    elif rows[0].numel() > 1 and bool((rows[0] == rows[0].flatten()[0]).all()):
        raise InputError(
            f"the codec {codec_file} gives {images.folder / name} latents that are all {float(rows.flatten()[0]):g}: it"
            " does not see the picture. Use the codec's own file, in float32."
        )
    if float(rows.abs().max()) > FAR:
        far[name] = float(rows.abs().max())


def _warn(images: ImageFolder, blank: list[str], far: Mapping[str, float]) -> None:
    if blank:
        warnings.warn(
            f"{len(blank)} of {len(images)} images of {images.folder} are of one colour, {blank[0]} first: if they are"
            " not meant, remove their lines",
            stacklevel=2,
        )
    if far:
        name, most = max(far.items(), key=lambda item: item[1])
        warnings.warn(
            f"latents of {len(far)} of {len(images)} images of {images.folder} reach up to {most:.0f} ({name}), where a"
            " network expects a deviation of 1: the codec or its scale may be another model's",
            stacklevel=2,
        )


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) < 40 else value[:16]

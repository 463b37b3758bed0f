"""Latents computed once, bound to the codec and the data that made them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint import files
from mezzotint.data.folder import ImageFolder
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "mezzotint-latents-1"


def latents(
    path: Path,
    images: ImageFolder,
    mirrorings: Sequence[tuple[int, ...]],
    encode: Callable[[Tensor], Tensor],
    codec: str,
    codec_file: Path,
    batch: int = 32,
    watch: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Latents (N, V, c, h, w) float32 of all images under all mirrorings: read from `path`, or computed and kept there.

    The file's header holds the digests of codec and data, size and mirrorings. A file made by another codec or from
    other data is refused with both digests and both files named: it is never reused, and never overwritten either.
    A latent that is not finite names its image. `watch(done, all)` follows the computing.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    height, width = images.bytes.shape[-2:]
    header = {
        "format": FORMAT,
        "codec": codec,
        "data": images.manifest.digest,
        "size": f"{width}x{height}",
        "mirrorings": json.dumps([list(m) for m in mirrorings]),
    }
    if Path(path).exists():
        _check(Path(path), header, {"codec": codec_file, "data": images.folder})
        return load_file(path)["latents"]
    parts: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(images), batch):
            chosen = torch.arange(start, min(start + batch, len(images)))
            part = torch.stack([encode(images.pixels(chosen, flip)).float().cpu() for flip in mirrorings], dim=1)
            for i, finite in zip(chosen.tolist(), part.isfinite().flatten(1).all(1).tolist(), strict=True):
                if not finite:
                    raise InputError(
                        f"the codec {codec_file} overflows on {images.folder / images.names[i]}: its latents are not"
                        " finite. Use float32 for the codec, or another image."
                    )
            parts.append(part)
            if watch is not None:
                watch(int(chosen[-1]) + 1, len(images))
    computed = torch.cat(parts)

    def write(temporary: Path) -> None:
        try:
            save_file({"latents": computed}, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    files.write_with(Path(path), write)
    return computed


def _check(path: Path, expected: dict[str, str], made_from: dict[str, Path]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stored:
            found = stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"the latent cache {path} is damaged ({error}); delete it, it is computed again.") from error
    for key, value in expected.items():
        if found.get(key) != value:
            source = f" of {made_from[key]}" if key in made_from else ""
            raise InputError(
                f"the latent cache {path} was made with {key} {_short(found.get(key))}, this run has"
                f" {_short(value)}{source}. Delete the cache, or name another one with data.cache."
            )


def _short(value: str | None) -> str:
    return "none" if value is None else value if len(value) < 40 else value[:16]

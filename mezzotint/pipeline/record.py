"""How pictures are made, as plain data: everything that it takes to draw them again."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.digests import tensors_digest
from mezzotint.families.adapt import ruled
from mezzotint.families.model import Model
from mezzotint.families.settings import settle
from mezzotint.files import sha256_file, sha256_json
from mezzotint.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


def record(model: Model, request: Request) -> dict[str, Any]:
    """How these images are made, contract's answers included, as plain JSON data.

    Pictures stand there by a digest of their pixels, start noise by one of its numbers, files by name and digest.
    """
    model = ruled(model, request.lora)
    settings, contract = settle(model, request), model.contract
    apart = ("count", "seed", "image", "mask", "references", "control", "lora", "embedding", "start_noise")
    asked = {f.name: getattr(request, f.name) for f in fields(request) if f.name not in apart}
    answered = {
        "sampler": request.sampler or contract.sampling.sampler,
        "steps": settings.first + len(settings.path.steps),
        "guidance": settings.guidance.scale,
        "width": settings.width,
        "height": settings.height,
        "strength": settings.strength,
    }
    noise = request.start_noise
    given = {
        "image": request.image and pixels_digest(request.image),
        "mask": request.mask and pixels_digest(request.mask),
        "references": [pixels_digest(picture) for picture in request.references],
        "control": [
            {"network": files_digest(Path(path)), "picture": pixels_digest(picture), "scale": scale}
            for path, picture, scale in request.control
        ],
        "lora": [{**files_digest(Path(path)), "weight": weight} for path, weight in request.lora],
        "embedding": [files_digest(Path(path)) for path in request.embedding],
        "start_noise": None if noise is None else tensors_digest({"noise": noise}),
    }
    return {
        "request": plain(asked | answered | given),
        "model": {
            "family": contract.family,
            "weights": contract.weights,
            "codec": contract.latent.codec,
            "licence": contract.licence.model_dump(),
            "lineage": contract.lineage.model_dump(mode="json"),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "mezzotint": metadata.version("mezzotint"),
    }


def plain(value: Any) -> Any:
    """The same as JSON has it: tuples as lists."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def files_digest(path: Path) -> dict[str, str]:
    """The name of a weights file, or of a folder with one and its settings, and the SHA-256 of its bytes."""
    if path.is_file():
        return {"file": path.name, "sha256": _sha256(path, path.stat().st_mtime_ns)}
    inside = [file for file in sorted(path.iterdir()) if file.suffix in (".json", ".safetensors", ".bin", ".pt")]
    digests = {file.name: _sha256(file, file.stat().st_mtime_ns) for file in inside}
    return {"file": path.name, "sha256": sha256_json(digests)}


@lru_cache(maxsize=64)
def _sha256(path: Path, changed: int) -> str:
    return sha256_file(path)


def pixels_digest(image: Image) -> str:
    """SHA-256 of mode, size and pixels: the same picture has the same digest in any file format that keeps it."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()

"""Between PIL images and tensors: (B, C, H, W) float32 in [-1, 1], one or three channels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}


def read(path: Path) -> Image:
    """Open and fully decode an image file; InputError where it is missing, broken or no image."""
    from PIL import Image as pil

    path = Path(path)
    if not path.is_file():
        raise InputError(f"no such image: {path}")
    try:
        with pil.open(path) as image:
            image.load()
            return _eight_bit(image.copy())
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise InputError(f"cannot read image {path}: {error}. Remove it or replace it with an intact file.") from error


def _eight_bit(image: Image) -> Image:
    """Sixteen-bit greys (microscopes, X-ray) scaled to eight: Pillow would clip them to white."""
    if not image.mode.startswith("I"):
        return image
    import numpy as np
    from PIL import Image as pil

    values = np.asarray(image).astype(np.int64)
    return pil.fromarray(
        (values.clip(0, 65535) / 257 if values.max() > 255 else values.clip(0)).round().astype(np.uint8)
    )


def find(folder: Path) -> list[Path]:
    """All image files directly or deeper in a folder, sorted; InputError where there is no folder or none in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"no such folder: {folder}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputError(f"no images in {folder} (looked for {', '.join(sorted(SUFFIXES))})")
    return found


def to_tensor(image: Image, width: int, height: int, channels: int = 3) -> Tensor:
    """(1, channels, height, width) float32 in [-1, 1], resized with Lanczos where the size differs."""
    import numpy as np
    import torch
    from PIL import Image as pil

    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), pil.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32)) / 127.5 - 1
    return (pixels[None] if channels == 1 else pixels.permute(2, 0, 1))[None].contiguous()


def mask_to_tensor(mask: Image, width: int, height: int) -> Tensor:
    """(1, 1, height, width) of zeros and ones: one where the mask is white, that is where it asks for repainting."""
    import numpy as np
    import torch
    from PIL import Image as pil

    mask = mask.convert("L")
    if mask.size != (width, height):
        mask = mask.resize((width, height), pil.Resampling.BOX)
    return torch.from_numpy((np.array(mask) >= 128).astype(np.float32))[None, None]


def grey(pixels: Tensor) -> Tensor:
    """(B, 1, H, W) of (B, 1 | 3, H, W): 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), as images are read grey."""
    if pixels.shape[1] == 1:
        return pixels
    return 0.299 * pixels[:, 0:1] + 0.587 * pixels[:, 1:2] + 0.114 * pixels[:, 2:3]


def bounded(image: Image, most: int, unit: int) -> Image:
    """A picture of at most `most` pixels, shrunk where it has more, its centre cut to whole multiples of `unit`.

    InputError where it is smaller than 4 units or longer than 8 times its width.
    """
    from PIL import Image as pil

    width, height = image.size
    if min(width, height) < 4 * unit or max(width, height) > 8 * min(width, height):
        raise InputError(
            f"a picture to look at must have sides of at least {4 * unit} pixels and at most 8 to 1: "
            f"this one is {width}x{height}"
        )
    if width * height > most:
        shrink = (most / (width * height)) ** 0.5
        width, height = int(width * shrink), int(height * shrink)
        image = image.resize((width, height), pil.Resampling.LANCZOS)
    across, down = width // unit * unit, height // unit * unit
    left, top = (width - across) // 2, (height - down) // 2
    return image.crop((left, top, left + across, top + down))


def to_images(pixels: Tensor) -> list[Image]:
    """A list of PIL images ("L" or "RGB") from (B, 1|3, H, W) in [-1, 1]; values outside are clipped."""
    from PIL import Image as pil

    array = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    return [pil.fromarray(a[0]) if a.shape[0] == 1 else pil.fromarray(a.transpose(1, 2, 0)) for a in array]

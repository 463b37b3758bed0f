"""What the training tests share: small folders of images and small recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 16
UNET: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
    "dropout": 0.1,
}
KL_VAE: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}


def image_folder(path: Path, count: int, size: int = SIZE) -> Path:
    """Gradients with a square in every second one, whose label is 1, and whose mask shows the square."""
    path.mkdir(parents=True)
    rows = []
    for i in range(count):
        rng = np.random.default_rng(i)
        ramp = np.add.outer(np.arange(size), np.arange(size)) * 4 + rng.integers(0, 60)
        picture = np.clip(ramp, 0, 255).astype(np.uint8)
        row: dict[str, Any] = {"file_name": f"{i}.png", "text": f"cell {i % 2}", "label": i % 2}
        if i % 2:
            picture[4:10, 5:9] = 0
            mask = np.zeros((size, size), dtype=np.uint8)
            mask[4:10, 5:9] = 255
            Image.fromarray(mask).save(path / f"mask{i}.png")
            row["mask"] = f"mask{i}.png"
        Image.fromarray(picture).save(path / f"{i}.png")
        rows.append(row)
    (path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def full_recipe(root: Path, out: str = "run", **changes: Any) -> dict[str, Any]:
    """A full-method recipe on pixels with classes and masks, of a second or two."""
    base: dict[str, Any] = {
        "method": "full",
        "out": str(root / out),
        "steps": 12,
        "batch": 4,
        "threads": 1,
        "log_every": 1,
        "data": {"folder": str(root / "train"), "size": [SIZE, SIZE], "channels": 1, "flips": ["horizontal"]},
        "classes": {"names": ["sound", "broken"]},
        "inpaint": {"source": "both", "dilation": [0, 2], "full_share": 0.1, "bank": 8},
        "process": {"prediction": "flow", "schedule": {"kind": "rectified_flow"}},
        "backbone": {"name": "unet", "config": UNET},
        "checkpoints": {"every": 3, "keep": 2},
        "validation": {"every": 6, "images": 4, "bands": 2},
    }
    return {**base, **changes}


def vae_recipe(root: Path, out: str = "run", **changes: Any) -> dict[str, Any]:
    """A vae-method recipe with every loss, the discriminator starting on the way."""
    base: dict[str, Any] = {
        "method": "vae",
        "out": str(root / out),
        "steps": 12,
        "batch": 4,
        "threads": 1,
        "log_every": 1,
        "data": {"folder": str(root / "train"), "size": [SIZE, SIZE], "channels": 1},
        "vae": {
            "config": KL_VAE,
            "perceptual": 0.0,
            "discriminator_start": 4,
            "discriminator_channels": 8,
            "discriminator_layers": 2,
        },
        "checkpoints": {"every": 3, "keep": 2},
    }
    return {**base, **changes}

"""Sizes of adapters on published networks, counted without memory: `python benchmarks/lora_sizes.py`.

The tests hold these numbers to those of papers and published files; this script prints them as the docs show them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mezzotint.adapters.targets import choose, size
from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import flux2_dev, klein_4b, klein_9b
from mezzotint.backbones.mmdit import MMDiT, sd35_large, sd35_medium
from mezzotint.backbones.published_unets import sd1, sd2, sdxl
from mezzotint.backbones.unet import UNet

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Stable Diffusion 1.5": lambda: UNet(sd1()),
    "Stable Diffusion 2.1": lambda: UNet(sd2()),
    "Stable Diffusion XL": lambda: UNet(sdxl()),
    "Stable Diffusion 3.5 Medium": lambda: MMDiT(sd35_medium()),
    "Stable Diffusion 3.5 Large": lambda: MMDiT(sd35_large()),
    "FLUX.2 klein 4B": lambda: Flux2(klein_4b()),
    "FLUX.2 klein 9B": lambda: Flux2(klein_9b()),
    "FLUX.2 dev": lambda: Flux2(flux2_dev()),
}
CONSISTENCY = ("attention", "feed-forward", "convolution", "projection", "time")  # as LCM-LoRA was published


@dataclass(frozen=True)
class Row:
    """An adapter of a network."""

    network: str
    targets: tuple[str, ...]
    rank: int


ROWS = [
    *(Row("Stable Diffusion 1.5", ("attention",), rank) for rank in (1, 4, 16)),
    Row("Stable Diffusion 1.5", CONSISTENCY, 64),
    Row("Stable Diffusion 2.1", ("attention",), 16),
    *(Row("Stable Diffusion XL", ("cross-attention",), rank) for rank in (16, 32)),
    *(Row("Stable Diffusion XL", ("attention",), rank) for rank in (16, 32)),
    Row("Stable Diffusion XL", CONSISTENCY, 64),
    *(Row(name, ("attention",), 16) for name in list(NETWORKS)[3:]),
    Row("FLUX.2 dev", ("attention",), 32),
]


def table(rows: Sequence[Row]) -> list[str]:
    """Markdown: what trains, how much less that is, and the numbers of a file in two formats."""
    lines = [
        "| network | targets | rank | modules | parameters | of the network | float16 | float32 |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    built: dict[str, nn.Module] = {}
    for row in rows:
        if row.network not in built:
            with torch.device("meta"):
                built[row.network] = NETWORKS[row.network]()
        network = built[row.network]
        found = size(network, choose(network, row.targets), row.rank)
        megabytes = [f"{found.bytes(dtype) / 1e6:.1f} MB" for dtype in (torch.float16, torch.float32)]
        lines.append(
            f"| {row.network} | {', '.join(row.targets)} | {row.rank} | {found.modules} | {found.parameters:,} |"
            f" 1/{found.ratio:,.0f} | {' | '.join(megabytes)} |"
        )
    return lines


if __name__ == "__main__":
    print("\n".join(table(ROWS)))

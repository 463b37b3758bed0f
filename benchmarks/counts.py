"""Parameters of every published network, built without memory, against the published: `python benchmarks/counts.py`.

The tests hold these numbers exactly; this script prints them as docs/families.md shows them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from mezzotint.backbones import published_unets as unets
from mezzotint.backbones.flux2_config import flux2_dev, klein_4b, klein_9b
from mezzotint.backbones.mmdit import sd3_medium, sd35_large, sd35_medium
from mezzotint.backbones.presets import dit
from mezzotint.codec.flux2_vae import Flux2VAEConfig
from mezzotint.codec.kl_vae import KLVAEConfig
from mezzotint.families.parts import AUTOENCODERS, BACKBONES, CONTROLS

VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
NETWORKS = {  # name: its configuration, what was published
    "DDPM CIFAR-10": (unets.ddpm_cifar10(), "35.7M"),
    "improved DDPM CIFAR-10": (unets.iddpm_cifar10(), "50M"),
    "improved DDPM ImageNet 64": (unets.iddpm_imagenet64(), "100M"),
    "improved DDPM LSUN 256": (unets.iddpm_lsun256(), "100M"),
    "ADM 64": (unets.adm_64(), "296M"),
    "ADM 128": (unets.adm_128(), "422M"),
    "ADM 256": (unets.adm_256(), "554M"),
    "ADM 512": (unets.adm_512(), "559M"),
    "LDM-4, without condition": (unets.ldm4_uncond(), "274M"),
    "LDM-4 by class (cin256-v2)": (unets.ldm4_cin256(), "400M"),
    "LDM-8 churches": (unets.ldm8_churches(), "295M"),
    "LDM-8 text to image": (unets.ldm8_text2img(), "872M"),
    "Stable Diffusion 1.5": (unets.sd1(), "860M"),
    "Stable Diffusion 2.1": (unets.sd2(), "865M"),
    "Stable Diffusion XL": (unets.sdxl(), "2.6B"),
    "Stable Diffusion XL refiner": (unets.sdxl_refiner(), "2.3B"),
    "LCM (1.5)": (unets.lcm_sd1(), "860M"),
    "LCM-SDXL": (unets.lcm_sdxl(), "2.6B"),
    "ControlNet 1.5": (unets.controlnet_sd1(), "361M"),
    "ControlNet XL": (unets.controlnet_sdxl(), "1.25B"),
    "DiT-S/2": (dit("S/2", 4, 8, 1000, 32), "33M, each embedder once"),
    "DiT-B/2": (dit("B/2", 4, 8, 1000, 32), "130M, each embedder once"),
    "DiT-L/2": (dit("L/2", 4, 8, 1000, 32), "458M, each embedder once"),
    "DiT-XL/2": (dit("XL/2", 4, 8, 1000, 32), "675M, each embedder once"),
    "Stable Diffusion 3 Medium": (sd3_medium(), "2B"),
    "Stable Diffusion 3.5 Medium": (sd35_medium(), "2.5B"),
    "Stable Diffusion 3.5 Large": (sd35_large(), "8.1B"),
    "FLUX.2 dev": (flux2_dev(), "32B"),
    "FLUX.2 klein 4B": (klein_4b(), "4B"),
    "FLUX.2 klein 9B": (klein_9b(), "9B"),
    "autoencoder of Stable Diffusion 1, 2, XL": (KLVAEConfig(**VAE, latent_channels=4), "84M"),
    "autoencoder of Stable Diffusion 3": (
        KLVAEConfig(**VAE, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False), "84M"
    ),
    "autoencoder of FLUX.2": (Flux2VAEConfig(), "84M"),
}  # fmt: skip


def counted(config: Any) -> tuple[int, int]:
    """Parameters, and numbers stored besides (tables of positions, statistics)."""
    kinds = [part for parts in (BACKBONES, AUTOENCODERS, CONTROLS) for part in parts.values()]
    part = next(part for part in kinds if type(config) is part.config)
    with torch.device("meta"):
        network = part.network(config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return parameters, sum(tensor.numel() for tensor in network.state_dict().values()) - parameters


def main() -> int:
    print("| network | parameters | stored besides | published |")
    print("|---|---:|---:|---|")
    for name, (config, published) in NETWORKS.items():
        parameters, besides = counted(config)
        print(f"| {name} | {parameters:,} | {f'{besides:,}' if besides else ''} | {published} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

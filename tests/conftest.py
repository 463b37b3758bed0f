"""What every test needs before torch is imported: no network, no screen, no crowd of threads, no key of the user."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["MEZZOTINT_HOME"] = tempfile.mkdtemp(prefix="mezzotint-home-")  # keys and log of the tests, not the user's
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # one process a core already


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of the starter model's kind with random weights: classes, inpainting, flow; 32x32 grey pixels."""
    import torch

    from mezzotint.backbones.unet import UNet
    from mezzotint.backbones.unet_config import UNetConfig
    from mezzotint.codec import Codec
    from mezzotint.codec.pixels import Pixels, PixelsConfig
    from mezzotint.contract import ClassFacts, Contract, GuidanceFacts, LatentFacts, Licence, SamplingFacts
    from mezzotint.data.solar_cells import CLASSES
    from mezzotint.families import Model, save
    from mezzotint.process import Prediction, Process, schedules

    config = UNetConfig(
        in_channels=1 + 1 + 1,  # noisy image, mask, masked image
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=len(CLASSES) + 1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = UNet(config)
        for parameter in backbone.parameters():  # branches that start at zero would hide what goes into them
            torch.nn.init.normal_(parameter, std=0.05)
    codec = Codec(Pixels(PixelsConfig(in_channels=1)))
    contract = Contract(
        process=Process(schedules.rectified_flow(), Prediction.FLOW),
        latent=LatentFacts.of(codec),
        size=(32, 32),
        weights="",
        classes=ClassFacts(names=CLASSES, null=len(CLASSES)),
        inpaint=1,
        guidance=GuidanceFacts(dropout=0.1, scale=2.0),
        sampling=SamplingFacts(sampler="flow_euler", steps=3),
        licence=Licence(weights="Apache-2.0"),
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    save(Model(contract, backbone, codec), path)
    return path

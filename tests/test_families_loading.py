"""Whole models in memory and on disk: mapped into place, resting while others work, written with their contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import relative
from reference_sd import PNDM, write, write_plain
from reference_sdxl import calm
from text_parts import tiny_clip

import mezzotint as mz
from mezzotint.errors import InputError
from mezzotint.families import save
from mezzotint.families.convert import convert
from mezzotint.families.model import PartName, working
from mezzotint.families.native import identified

PARTS: tuple[PartName, ...] = ("text", "backbone", "codec")
REQUEST = mz.Request(prompt="a crack", negative="dark", steps=4, guidance=3.0, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convertible(write_plain(tmp_path_factory.mktemp("published") / "sd1"))


def convertible(root: Path) -> Path:
    """With an autoencoder of 32 groups a norm: single files cannot say any other number."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, sample_size=32,
    )  # fmt: skip
    calm(vae, 3).save_pretrained(root / "vae")
    return root


def test_a_published_model_saved_with_its_contract_draws_the_same(folder: Path, tmp_path: Path) -> None:
    model = mz.load(folder)
    ours = mz.load(save(model, tmp_path / "ours").path)
    assert ours.contract.family == "sd1" and len(ours.contract.weights) == 64
    assert ours.contract.text is not None and all(len(e.digest) == 64 for e in ours.contract.text.encoders)
    assert ours.contract.process == model.contract.process and ours.contract.sampling == model.contract.sampling
    torch.testing.assert_close(mz.generate(ours, REQUEST).latents, mz.generate(model, REQUEST).latents, rtol=0, atol=0)


def test_another_text_encoder_is_refused_once_the_contract_speaks_of_it(folder: Path, tmp_path: Path) -> None:
    save(mz.load(folder), tmp_path / "ours")
    for file in (tmp_path / "ours" / "text_encoder").iterdir():
        file.unlink()
    (tmp_path / "ours" / "text_encoder").rmdir()
    tiny_clip(tmp_path / "ours" / "text_encoder", 64, layers=2, heads=1, vocabulary=49408, seed=9)
    with pytest.raises(InputError, match=r"text\.encoders\.0\.digest is .* but .*text_encoder"):
        mz.load(tmp_path / "ours")


def test_digests_name_the_numbers_however_they_are_stored(folder: Path, tmp_path: Path) -> None:
    contract = identified(mz.load(folder)).contract
    convert(folder, tmp_path / "one.safetensors", "single-file")
    again = identified(mz.load(tmp_path / "one.safetensors")).contract
    assert contract.weights == again.weights and contract.latent.codec == again.latent.codec


def test_parts_at_rest_are_where_they_were_and_give_the_same_picture(folder: Path) -> None:
    model, resting = mz.load(folder), mz.load(folder, offload=True)
    before = {name: tensor.data_ptr() for name, tensor in resting.backbone.named_parameters()}
    torch.testing.assert_close(
        mz.generate(resting, REQUEST).latents, mz.generate(model, REQUEST).latents, rtol=0, atol=0
    )
    assert {name: tensor.data_ptr() for name, tensor in resting.backbone.named_parameters()} == before


def test_a_part_comes_to_the_device_while_it_works_and_goes_back(folder: Path) -> None:
    model = replace(mz.load(folder), works_on=torch.device("meta"))
    places: Any = lambda: {t.device.type for t in model.backbone.parameters()}  # noqa: E731
    assert places() == {"cpu"}
    with pytest.raises(ZeroDivisionError), working(model, "backbone"):
        assert places() == {"meta"}
        raise ZeroDivisionError
    assert places() == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_chosen_at_load(folder: Path, dtype: torch.dtype) -> None:
    model = mz.load(folder, dtype=dtype)
    kinds = {part: {t.dtype for n in model.networks(part).values() for t in n.parameters()} for part in PARTS}
    codec = torch.float32 if dtype is torch.float16 else dtype  # its settings say force_upcast
    assert kinds == {"text": {dtype}, "backbone": {dtype}, "codec": {codec}}
    assert model.contract.dtypes.backbone == ("float32", "bfloat16", "float16")
    if dtype is torch.bfloat16:  # half precision is a hundred times slower here
        exact = mz.generate(mz.load(folder), replace(REQUEST, steps=2, guidance=1.0, negative="")).latents
        assert relative(mz.generate(model, replace(REQUEST, steps=2, guidance=1.0, negative="")).latents, exact) < 0.1


def test_peak_memory_of_a_whole_model_is_its_weights(folder: Path, tmp_path: Path) -> None:
    """In a process of its own: a quarter of a gigabyte, most of it the U-Net and the text encoder's table."""
    large = write(tmp_path / "large", 1, PNDM, "StableDiffusionPipeline", wide_unet())
    convertible(large)
    for file in (large / "text_encoder").iterdir():
        file.unlink()
    (large / "text_encoder").rmdir()
    tiny_clip(large / "text_encoder", 384, layers=2, heads=6, vocabulary=49408)
    convert(large, large / "model.safetensors", "single-file")
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": f"{here}{os.pathsep}{here.parent}",
        "OMP_NUM_THREADS": "1",  # a fork does not inherit threads
    }
    script = [sys.executable, str(here / "families_peaks.py"), str(folder), str(large)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    given_back, text = found.pop("given back")
    for case, (peak, weights) in found.items():
        assert peak <= 1.1 * weights, f"{case}: {peak / 2**20:.0f} MB for {weights / 2**20:.0f} MB"
    assert given_back >= 0.9 * text


def wide_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return calm(
        UNet2DConditionModel(
            sample_size=8, block_out_channels=(256, 512), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=8,
            cross_attention_dim=384,
        ),
        seed=1,
    )  # fmt: skip

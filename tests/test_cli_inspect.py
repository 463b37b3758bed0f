"""`mezzotint inspect` against what was written."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mezzotint.cli.main import main
from mezzotint.families import load


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    assert main(["inspect", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_folder_says_what_loading_it_finds(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, model = inspected(tiny_folder, capsys), load(tiny_folder)
    assert said["parts"]["unet"]["parameters"] == sum(p.numel() for p in model.backbone.parameters())
    assert said["parts"]["unet"]["class"] == "UNet2DModel"
    assert said["process"] == model.process.to_dict()
    assert said["classes"]["names"][1] == "mono crack"
    assert said["latent"]["codec"] == model.codec.digest()
    assert said["weights"] == model.contract.weights
    assert said["licence"]["weights"] == "Apache-2.0"


def test_the_same_facts_are_shown_to_people(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_folder)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^  prediction +flow$", said, re.MULTILINE)
    assert "mono crack" in said and "None" not in said


def test_a_safetensors_file_is_counted_from_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "some.safetensors"
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.float16), "scalar": torch.tensor(1.0)}
    save_file(tensors, file, {"note": "hello"})
    said = inspected(file, capsys)
    assert (said["tensors"], said["parameters"]) == (3, 15 + 7 + 1)
    assert said["dtype"] == ["F16", "F32"] and said["metadata"] == {"note": "hello"}


def test_a_folder_without_a_contract_says_that_it_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "unet").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "unet" / "model.safetensors")
    said = inspected(tmp_path, capsys)
    assert said["parameters"] == 2 and said["contract"].startswith("none")


def test_an_image_brings_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (6, 4)).save(tmp_path / "x.png")
    assert inspected(tmp_path / "x.png", capsys)["record"] == "none beside it"
    (tmp_path / "x.json").write_text('{"seed": 3}')
    said = inspected(tmp_path / "x.png", capsys)
    assert said["size"] == [6, 4] and said["record"] == {"seed": 3}

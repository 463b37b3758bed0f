"""`mezzotint convert` end to end: what it writes, says and leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference_sd
import torch
from safetensors.torch import load_file

import mezzotint as mz
from mezzotint.checkpoints import open_tensors, write_tensors
from mezzotint.cli.main import main


def test_there_and_back_with_the_same_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, single, back = reference_sd.write_velocity(tmp_path), tmp_path / "one.safetensors", tmp_path / "back"
    assert main(["convert", str(folder), str(single), "--layout", "single-file"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == str(single)
    assert any("tokenizer" in line for line in said[1:]) and all(line.startswith("left out: ") for line in said[1:])
    tensors = open_tensors(single)
    write_tensors(single, tensors | {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())})
    args = ["convert", str(single), str(back), "--layout", "diffusers", "--prediction", "velocity", "--json"]
    assert main(args) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["family"], told["layout"], told["files"]) == ("sd2", "diffusers", [str(back)])
    assert list(told["left_out"].values()) == [["model_ema.decay", "model_ema.num_updates"]]
    request = mz.Request(prompt="a crack", steps=2, width=32, height=32)
    ours, theirs = (mz.generate(mz.load(path), request).latents for path in (back, folder))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for part in ("unet", "vae"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert load_file(back / name).keys() == load_file(folder / name).keys()


def test_what_is_there_stays_until_it_is_given_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    folder, single = reference_sd.write_plain(tmp_path), tmp_path / "one.safetensors"
    single.write_text("mine")
    args = ["convert", str(folder), str(single), "--layout", "single-file"]
    assert main(args) == 2 and "--force" in capsys.readouterr().err and single.read_text() == "mine"
    assert main([*args, "--force"]) == 0 and len(open_tensors(single)) > 100

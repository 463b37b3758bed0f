"""What a run holds in memory: frozen weights as narrow as the recipe says, and nothing of what has done its work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_adapters import sd1
from safetensors.torch import load_file, save_file
from training_parts import image_folder

from mezzotint.training import loop, recipe
from mezzotint.training.methods import Place
from mezzotint.training.methods.full import Full
from mezzotint.training.methods.lora import Lora

pytest.importorskip("diffusers")
WIDE = 2**15  # numbers in the text encoder's hidden layer, which nobody outside of it sees


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("memory")
    image_folder(found / "pictures", 4, size=32)
    return found


def plan(root: Path, out: Path, base: Path, dtype: str = "float32", method: str = "lora", **more: Any) -> recipe.Recipe:
    said: dict[str, Any] = {
        "method": method, "out": str(out), "base": {"path": str(base), "dtype": dtype}, "steps": 1, "batch": 2,
        "threads": 1, "log_every": 1, "data": {"folder": str(root / "pictures"), "size": [32, 32]},
        "optimiser": {"rate": 1e-2}, "ema": {"decay": 0.5}, "previews": {"every": 1, "count": 1, "steps": 1},
    }  # fmt: skip
    return recipe.check(said | ({"lora": {"rank": 2}} if method == "lora" else {}) | more, "test")


def place(folder: Path) -> Place:
    return Place(folder, torch.device("cpu"), lambda *_: None)


def test_adapters_on_a_narrow_base_are_drawn_with_and_written_in_full(root: Path, tmp_path: Path) -> None:
    dtype = "float16"  # some processors take a second for a convolution in bfloat16
    pytest.importorskip("peft")
    run = loop.train(plan(root, tmp_path, sd1(root), dtype, recompute=True)).folder
    assert (run / loop.SAMPLES / "step-00000001.png").exists()
    found = load_file(run / "model/pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(tensor.abs().max() > 1e-3 for name, tensor in found.items() if "lora_B" in name)  # it learned


def test_what_trains_whole_is_float32_whatever_it_was_read_as(root: Path, tmp_path: Path) -> None:
    """Captions that a narrow encoder read steer a network in full precision, in training and in previews."""
    dtype = "float16"
    losses: dict[str, float] = {}
    for kind in ("float32", dtype):
        job = Full(plan(root, tmp_path / kind, sd1(root), kind, "full"), place(tmp_path / kind))
        assert {p.dtype for p in job.trained["backbone"].parameters()} == {torch.float32}
        loss, _ = job.loss(job.draw(0), 0)
        loss.backward()
        losses[kind] = float(loss.detach())
    assert losses[dtype] == pytest.approx(losses["float32"], rel=5e-3) and losses[dtype] != losses["float32"]
    run = loop.train(plan(root, tmp_path / "run", sd1(root), dtype, "full")).folder
    assert (run / loop.SAMPLES / "step-00000001.png").exists()


def padded(root: Path) -> Path:
    """A Stable Diffusion whose text encoder is by far its largest part: 34 MB."""
    folder = root / "padded"
    shutil.copytree(sd1(root), folder)
    text = folder / "text_encoder"
    settings = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(settings | {"intermediate_size": WIDE}))
    tensors = load_file(text / "model.safetensors")
    for name, tensor in tensors.items():
        if ".fc1." in name or name.endswith("fc2.weight"):
            axis = 1 if name.endswith("fc2.weight") else 0
            shape = [WIDE if i == axis else size for i, size in enumerate(tensor.shape)]
            tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / WIDE
    save_file(tensors, text / "model.safetensors", metadata={"format": "pt"})
    return folder


def held(file: Path) -> int:
    """Bytes of a file that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(str(file.resolve()))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not tell what is in memory")
def test_text_encoder_and_codec_are_not_in_memory_while_a_lora_trains(root: Path, tmp_path: Path) -> None:
    """Their files stay mapped, and pages come back when they are touched, as for a preview."""
    pytest.importorskip("peft")
    base = padded(root)
    job = Lora(plan(root, tmp_path, base), place(tmp_path))
    job.loss(job.draw(0), 0)[0].backward()
    assert job.core.model.text is not None
    networks = {
        "text_encoder/model.safetensors": next(iter(job.core.model.text.networks.values())),
        "vae/diffusion_pytorch_model.safetensors": job.core.model.codec.autoencoder,
    }
    for file, network in networks.items():
        weights = sum(parameter.nbytes for parameter in network.parameters())
        assert held(base / file) < 0.05 * weights + 2**15, file
        assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
        assert held(base / file) > 0.9 * weights, file  # there is no other copy

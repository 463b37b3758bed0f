"""`mezzotint inspect` against what was written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import reference_flux2
import reference_sd
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.backbones.controlnet import ControlNetConfig
from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.flux2_config import klein_9b
from mezzotint.backbones.mmdit import MMDiT, sd35_medium
from mezzotint.checkpoints.header import DTYPES
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.controlnet import controlnet
from mezzotint.checkpoints.layouts.flux2 import flux2
from mezzotint.cli.main import main
from mezzotint.families import load
from mezzotint.families.convert import convert
from mezzotint.layers.config import write_config

STEM = "diffusion_pytorch_model.safetensors"


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
    assert said["dtype"] == ["float16", "float32"] and said["metadata"] == {"note": "hello"}


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


def test_a_published_folder_says_what_loading_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = reference_sd.write_plain(tmp_path)
    said, model = inspected(folder, capsys), load(folder)
    contract, text = model.contract, model.text
    assert (said["family"], said["layout"], said["size"]) == ("sd1", "diffusers", list(contract.size))
    assert said["process"] == contract.process.to_dict()
    assert said["guidance"] == contract.guidance.model_dump() and said["sampling"] == contract.sampling.model_dump()
    counted = {part: said["parts"][part]["parameters"] for part in said["parts"]}
    networks = {"unet": model.backbone, "vae": model.codec.autoencoder, **model.networks("text")}
    assert counted == {part: sum(p.numel() for p in network.parameters()) for part, network in networks.items()}
    assert text is not None and contract.text is not None
    (encoder,) = contract.text.encoders
    assert said["text"]["encoders"]["text_encoder"] == {
        "class": "CLIPTextModel", "width": encoder.width, "length": encoder.length
    }  # fmt: skip
    assert (said["text"]["width"], said["text"]["pooled"]) == (contract.text.width, contract.text.pooled)
    facts = contract.latent
    assert [said["latent"][key] for key in ("channels", "factor", "scale")] == [
        facts.channels,
        facts.factor,
        facts.scale,
    ]
    assert said["licence"]["weights"] == contract.licence.weights and said["left_open"] is None


def sparse(path: Path, tensors: Mapping[str, Tensor], dtype: str = "BF16") -> Path:
    """A safetensors file with an honest header and no data on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def test_an_enormous_file_is_read_by_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """FLUX.2 klein 9B: 18 GB that are not there, so whoever reads them reads for minutes."""
    with torch.device("meta"):
        tensors = Flux2(klein_9b()).state_dict()
    file = sparse(tmp_path / "flux-2-klein-9b.safetensors", restored(tensors, flux2(klein_9b())))
    said = inspected(file, capsys)
    assert said["parts"]["transformer"]["parameters"] == 9_078_581_248
    assert said["parts"]["transformer"]["dtype"] == ["bfloat16"]
    assert said["parts"]["transformer"]["bytes"] == 2 * 9_078_581_248
    assert (said["family"], said["missing"]) == ("flux2", ["vae", "text_encoder"])
    assert "--distilled yes" in said["left_open"] and said["guidance"]["distilled"] == "True or False"
    assert said["licence"]["weights"].startswith("FLUX Non-Commercial")


def test_tables_that_are_stored_besides_are_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stable Diffusion 3.5 Medium: published as 2.5 billion, of which the table of positions is 226 million."""
    config = sd35_medium()
    with torch.device("meta"):
        sparse(tmp_path / "m" / "transformer" / STEM, MMDiT(config).state_dict())
    written = json.dumps(write_config(config, "SD3Transformer2DModel"))
    (tmp_path / "m" / "transformer" / "config.json").write_text(written)
    said = inspected(tmp_path / "m", capsys)
    part = said["parts"]["transformer"]
    assert (part["parameters"], part["stored_besides"]) == (2_243_171_520, 226_492_416)
    assert said["family"] == "sd35" and said["missing"] == ["vae", "text_encoder"]


def test_what_a_file_leaves_open_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
        "cond_stage_model.model.ln_final.weight": torch.zeros(4),
    }
    assert "not_a_known_model" in inspected(Path(_saved(tensors, tmp_path / "half.safetensors")), capsys)
    folder = reference_flux2.write(tmp_path / "klein", reference_flux2.DISTILLED)
    file = convert(folder, tmp_path / "single" / "klein.safetensors", "single-file").files[0]
    assert main(["inspect", str(file), "--parts", str(folder), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["left_open"] is None and said["guidance"]["distilled"] is True and said["missing"] == []
    assert said["text"]["encoders"]["text_encoder"]["length"] == 512
    save_file(load_file(file), tmp_path / "single" / "bare.safetensors")
    said = inspected(tmp_path / "single" / "bare.safetensors", capsys)
    assert "--distilled" in said["left_open"] and said["guidance"]["scale"] == "1.0 or 4.0"


def _saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> str:
    save_file(tensors, path, metadata)
    return str(path)


def test_additions_to_a_model_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import ControlNetModel

    low = {
        "unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.randn(4, 320),
        "unet.mid_block.attentions.0.proj_in.lora_B.weight": torch.randn(640, 4),
    }
    said = inspected(Path(_saved(low, tmp_path / "lora.safetensors", {"ss_sd_model_name": "base.ckpt"})), capsys)
    assert (said["kind"], said["format"], said["ranks"]) == ("LoRA", "diffusers", [4])
    assert said["parameters"] == 4 * 320 + 640 * 4 and said["base"] == "base.ckpt"
    said = inspected(Path(_saved({"emb_params": torch.randn(3, 768)}, tmp_path / "word.safetensors")), capsys)
    assert (said["kind"], said["words"], said["family"]) == ("textual inversion", {"word": 3}, "Stable Diffusion 1.x")
    network = ControlNetModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        cross_attention_dim=64, attention_head_dim=8, conditioning_embedding_out_channels=(16, 32, 96, 256),
    )  # fmt: skip
    network.save_pretrained(tmp_path / "control")
    said = inspected(tmp_path / "control", capsys)
    assert (said["kind"], said["class"], said["shown"]) == ("control network", "ControlNetModel", "pixels")
    assert said["parameters"] == sum(p.numel() for p in network.parameters())
    assert said["made_for"]["cross_attention_dim"] == 64
    config = ControlNetConfig.from_config(json.loads((tmp_path / "control" / "config.json").read_text()))
    original = restored(load_file(tmp_path / "control" / STEM), controlnet(config))
    named = {f"control_model.{name}": tensor.contiguous() for name, tensor in original.items()}
    again = inspected(Path(_saved(named, tmp_path / "control.safetensors")), capsys)
    assert (again["kind"], again["parameters"]) == ("control network", said["parameters"])

"""`mezzotint generate` end to end on a tiny model: files, records, and the same answers as from Python."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reference_sd
import torch
from networks import randomise
from PIL import Image
from safetensors.torch import load_file, save_file

from mezzotint.cli.generate import control_of, numbers, size_of, weighted
from mezzotint.cli.main import main
from mezzotint.errors import InputError
from mezzotint.families import load
from mezzotint.files import sha256_file
from mezzotint.generate import generate
from mezzotint.pipeline import pixels_digest, record
from mezzotint.request import Request


def test_images_and_latents_are_those_of_python(tiny_folder: Path, tmp_path: Path) -> None:
    args = [
        "--label",
        "mono crack",
        "--count",
        "2",
        "--seed",
        "5",
        "--steps",
        "4",
        "--guidance",
        "3",
        "--policy",
        "off",
    ]
    latents = tmp_path / "latents.safetensors"
    assert (
        main(["generate", "--model", str(tiny_folder), "--out", str(tmp_path), *args, "--save-latents", str(latents)])
        == 0
    )
    result = generate(load(tiny_folder), Request(label="mono crack", count=2, seed=5, steps=4, guidance=3.0))
    torch.testing.assert_close(load_file(latents)["latents"], result.latents, rtol=0, atol=0)
    for i, image in enumerate(result.images):
        written = Image.open(tmp_path / f"{i:04d}_seed{5 + i}.png")
        assert np.array_equal(np.array(written), np.array(image))


def test_the_record_leads_back_to_how_an_image_was_made(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (32, 32), 90).save(tmp_path / "cell.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    given = ["--image", str(tmp_path / "cell.png"), "--mask", str(tmp_path / "mask.png"), "--label", "1", "--seed", "8"]
    assert main(["generate", "--model", str(tiny_folder), "--out", str(out), "--json", *given]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record == json.loads((out / "0000_seed8.json").read_text())
    assert record["sha256"] == sha256_file(out / record["file"])
    assert record["read"]["mask"] == str(tmp_path / "mask.png")
    assert record["model"]["weights"] == load(tiny_folder).contract.weights
    assert (record["request"]["label"], record["request"]["sampler"], record["seed"]) == (1, "flow_euler", 8)


def test_every_prompt_gets_its_images_and_its_numbers(tiny_folder: Path, tmp_path: Path) -> None:
    latents = tmp_path / "latents.safetensors"
    args = ["mono crack", "poly finger", "--count", "2", "--steps", "2", "--save-latents", str(latents)]
    args += ["--policy", "off"]
    assert main(["generate", "--model", str(tiny_folder), "--out", str(tmp_path / "out"), *args]) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert names == ["0000_seed0.png", "0001_seed1.png", "0002_seed0.png", "0003_seed1.png"]
    second = generate(load(tiny_folder), Request(label="poly finger", count=2, steps=2))
    torch.testing.assert_close(load_file(latents)["latents"][2:], second.latents, rtol=0, atol=0)


def test_start_noise_is_used_as_given(tiny_folder: Path, tmp_path: Path) -> None:
    noise = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    latents = tmp_path / "latents.safetensors"
    args = ["--start-noise", str(tmp_path / "noise.safetensors"), "--save-latents", str(latents)]
    assert main(["generate", "--model", str(tiny_folder), "--out", str(tmp_path), *args]) == 0
    result = generate(load(tiny_folder), Request(start_noise=noise))
    torch.testing.assert_close(load_file(latents)["latents"], result.latents, rtol=0, atol=0)


def test_what_is_black_in_the_mask_stays(tiny_folder: Path, tmp_path: Path) -> None:
    cell = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[10:20, 5:30] = 255
    Image.fromarray(cell).save(tmp_path / "cell.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    args = ["--image", str(tmp_path / "cell.png"), "--mask", str(tmp_path / "mask.png"), "--label", "poly crack"]
    assert main(["generate", "--model", str(tiny_folder), "--out", str(tmp_path / "out"), *args]) == 0
    made = np.array(Image.open(tmp_path / "out" / "0000_seed0.png"))
    assert np.array_equal(made[mask == 0], cell[mask == 0])
    assert (made[mask == 255] != cell[mask == 255]).mean() > 0.5


@pytest.mark.parametrize(("text", "size"), [(None, (None, None)), ("64x32", (64, 32)), ("64X32", (64, 32))])
def test_sizes(text: str | None, size: tuple[int, int] | tuple[None, None]) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["64", "x", "64x", "-1x3", "64x32x3", "sixty"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="WIDTHxHEIGHT"):
        size_of(text)


@pytest.fixture(scope="module")
def additions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1 folder, and beside it a LoRA, a word, a control network and its picture."""
    root = tmp_path_factory.mktemp("additions")
    folder = reference_sd.write_plain(root)
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    attention = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{attention}.lora_A.weight": down, f"{attention}.lora_B.weight": up}, root / "fine=cracks@2.safetensors"
    )
    save_file({"<crack>": torch.randn(2, 64)}, root / "word.safetensors")
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 32))
    randomise(network)
    network.save_pretrained(root / "edges=net")
    Image.effect_noise((32, 32), 90).convert("RGB").save(root / "a@b.png")
    return root


def test_additions_act_and_are_recorded_by_their_digests(
    additions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora, word, net = additions / "fine=cracks@2.safetensors", additions / "word.safetensors", additions / "edges=net"
    latents = tmp_path / "latents.safetensors"
    folder = reference_sd.write_plain(additions)
    args = ["a <crack>", "--model", str(folder), "--steps", "2", "--guidance", "2", "--out", str(tmp_path), "--json"]
    args += ["--lora", f"{lora}@0.5", "--lora", str(lora), "--embedding", str(word), "--save-latents", str(latents)]
    args += ["--control", f"{net}={additions / 'a@b.png'}@0.7", "--long-prompt", "chunk", "--policy", "off"]
    assert main(["generate", *args]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    picture = Image.open(additions / "a@b.png")
    request = Request(
        prompt="a <crack>", steps=2, guidance=2.0, lora=[(lora, 0.5), (lora, 1.0)], embedding=[word],
        control=[(net, picture, 0.7)], long_prompt="chunk",
    )  # fmt: skip
    model = load(folder)
    expected = generate(model, request).latents
    torch.testing.assert_close(load_file(latents)["latents"], expected, rtol=0, atol=0)
    for less in ("lora", "embedding", "control"):
        given = {"lora": request.lora, "embedding": request.embedding, "control": request.control, less: ()}
        plain = Request(prompt="a <crack>", steps=2, guidance=2.0, **given, long_prompt="chunk")  # pyright: ignore
        assert not torch.allclose(generate(model, plain).latents, expected)
    asked = said["request"]
    named = {"file": lora.name, "sha256": sha256_file(lora)}
    assert asked["lora"] == [{**named, "weight": 0.5}, {**named, "weight": 1.0}]
    assert asked["embedding"] == [{"file": word.name, "sha256": sha256_file(word)}]
    (control,) = asked["control"]
    assert control["network"]["file"] == "edges=net" and len(control["network"]["sha256"]) == 64
    assert (control["picture"], control["scale"]) == (pixels_digest(picture), 0.7)
    assert said["read"]["control"] == [f"{net}={additions / 'a@b.png'}@0.7"]
    assert said["request"] == json.loads(json.dumps(record(model, request)["request"]))


def test_a_record_of_everything_is_plain_json(tiny_folder: Path) -> None:
    noise = torch.randn(1, 1, 32, 32)
    request = Request(label=1, start_noise=noise, skip_layers=(), crop=(1, 2), original_size=(3, 4))
    made = record(load(tiny_folder), request)
    assert json.loads(json.dumps(made)) == made
    assert made["request"]["original_size"] == [3, 4] and len(made["request"]["start_noise"]) == 64
    again = record(load(tiny_folder), Request(label=1, start_noise=noise + 1))
    assert again["request"]["start_noise"] != made["request"]["start_noise"]


def test_names_may_hold_the_signs_that_divide(tmp_path: Path) -> None:
    for name in ("plain", "with@sign", "with=sign@2"):
        (tmp_path / name).write_text("")
        assert weighted(str(tmp_path / name), "--lora") == (tmp_path / name, 1.0)
        assert weighted(f"{tmp_path / name}@0.25", "--lora") == (tmp_path / name, 0.25)
    Image.new("L", (4, 4)).save(tmp_path / "x=y.png")
    network, picture, scale = control_of(f"{tmp_path / 'with=sign@2'}={tmp_path / 'x=y.png'}@-0.5")
    assert (network, picture.size, scale) == (tmp_path / "with=sign@2", (4, 4), -0.5)
    assert numbers("7, 8,9", "--skip-layers", "7,8,9") == (7, 8, 9)

"""Users' mistakes: exit code 2, one or two lines that say what and where, no traceback, nothing left half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mezzotint.cli.main import main
from mezzotint.process import Prediction, Process, schedules

Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command line that must be refused, and return what was said."""
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)

    def run(*args: object) -> str:
        code = main([str(arg) for arg in args])
        said = capsys.readouterr().err
        assert code == 2, said
        assert said.startswith("mezzotint: ")
        assert 1 <= len(said.splitlines()) <= 2, said
        assert "Traceback" not in said
        return said

    return run


def test_unknown_verbs_and_options(refused: Refused) -> None:
    assert "did you mean 'generate'?" in refused("genrate", "x")
    assert "mezzotint --help" in refused("frobnicate")
    assert "did you mean '--model'?" in refused("generate", "--modle", "x")
    assert "--model" in refused("generate", "--out", "x")
    assert "fp8" in refused("generate", "--model", "x", "--out", "y", "--dtype", "fp8")


@pytest.mark.parametrize("verb", ["generate", "inspect", "doctor"])
def test_paths_that_lead_nowhere(verb: str, refused: Refused, tmp_path: Path) -> None:
    def try_path(path: Path) -> str:
        return refused("generate", "--model", path, "--out", tmp_path) if verb == "generate" else refused(verb, path)

    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    for name in ("absent", "empty", "notes.txt"):
        assert name in try_path(tmp_path / name)


def test_weights_that_are_not_those_of_the_contract(refused: Refused, model: Path, tmp_path: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    first = min(tensors)
    save_file(tensors | {first: tensors[first] + 1e-3}, weights)
    said = refused("generate", "--model", model, "--out", tmp_path)
    assert "weights" in said and "contract.json" in said and "unet" in said
    assert main(["generate", "--model", str(model), "--out", str(tmp_path / "forced"), "--force"]) == 0
    (record,) = (tmp_path / "forced").glob("*.json")
    assert "weights" in json.loads(record.read_text())["model"]["lineage"]["overrides"][0]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c["latent"].update(codec="0" * 64), "latent.codec"),
        (lambda c: c["latent"].update(scale=0.18215), "latent."),
        (lambda c: c.update(inpaint=2), "in_channels"),
        (lambda c: c["process"].update(prediction="flwo"), "flow"),
        (lambda c: c["process"].update(prediction="epsilon"), "epsilon"),
        (lambda c: c.update(lisence={}), "licence"),
        (lambda c: c.pop("licence"), "licence"),
        (lambda c: c.update(version=99), "version"),
    ],
)
def test_contracts_that_cannot_hold(
    edit: Callable[[dict], object], said: str, refused: Refused, model: Path, tmp_path: Path
) -> None:
    contract = json.loads((model / "contract.json").read_text())
    edit(contract)
    (model / "contract.json").write_text(json.dumps(contract))
    assert said in refused("generate", "--model", model, "--out", tmp_path)


def test_broken_model_files(refused: Refused, model: Path, tmp_path: Path) -> None:
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert weights.name in refused("generate", "--model", model, "--out", tmp_path)
    assert weights.name in refused("inspect", weights)


def test_a_broken_contract(refused: Refused, model: Path, tmp_path: Path) -> None:
    (model / "contract.json").write_text("{")
    assert "contract.json" in refused("generate", "--model", model, "--out", tmp_path)
    assert "contract.json" in refused("inspect", model)


def test_requests_that_cannot_be_served(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    def ask(*args: object) -> str:
        return refused("generate", "--model", tiny_folder, "--out", tmp_path / "out", *args)

    assert "did you mean 'euler'?" in ask("--sampler", "eulr")
    assert "eta" in ask("--sampler", "heun", "--eta", "0.5")
    assert "steps" in ask("--steps", "0")
    assert "count" in ask("--count", "0")
    assert "--size" in ask("--size", "large")
    assert "width" in ask("--size", "0x32")
    assert "mono crack" in ask("--label", "mono crakc")
    assert "label" in ask("--label", "99")
    assert "strength" in ask("--strength", "0.5")
    assert "nowhere" in ask("--device", "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_sampler_that_cannot_serve_the_objective(refused: Refused, model: Path, tmp_path: Path) -> None:
    contract = json.loads((model / "contract.json").read_text())
    contract["process"] = Process(schedules.linear(), Prediction.VELOCITY).to_dict()
    (model / "contract.json").write_text(json.dumps(contract))
    said = refused("generate", "--model", model, "--out", tmp_path / "out", "--sampler", "flow_euler")
    assert "flow_euler" in said and "linear" in said
    assert main(["generate", "--model", str(model), "--out", str(tmp_path / "out"), "--sampler", "ddim"]) == 0


def test_files_in_a_request(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    def ask(*args: object) -> str:
        return refused("generate", "--model", tiny_folder, "--out", tmp_path / "out", *args)

    assert "absent.png" in ask("--image", tmp_path / "absent.png")
    Image.new("L", (32, 32)).save(tmp_path / "whole.png")
    assert "image" in ask("--mask", tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:40])
    assert "broken.png" in ask("--image", tmp_path / "broken.png")
    assert "broken.png" in ask("--image", tmp_path / "whole.png", "--mask", tmp_path / "broken.png")
    save_file({"noise": torch.zeros(1, 4, 8, 8)}, tmp_path / "noise.safetensors")
    assert "noise" in ask("--start-noise", tmp_path / "noise.safetensors")
    assert "whole.png" in ask("--start-noise", tmp_path / "whole.png")
    assert not (tmp_path / "out").exists()


def test_additions_that_cannot_be_read(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    def ask(*args: object) -> str:
        return refused("generate", "--model", tiny_folder, "--out", tmp_path / "out", *args)

    Image.new("L", (32, 32)).save(tmp_path / "edges.png")
    (tmp_path / "net").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "some.safetensors")
    net, picture, some = tmp_path / "net", tmp_path / "edges.png", tmp_path / "some.safetensors"
    assert "NETWORK=IMAGE@SCALE" in ask("--control", picture)
    assert "absent" in ask("--control", f"{tmp_path / 'absent'}={picture}")
    assert "absent.png" in ask("--control", f"{net}={tmp_path / 'absent.png'}@0.5")
    assert "'much' is no weight" in ask("--control", f"{net}={picture}@much")
    assert "finite" in ask("--control", f"{net}={picture}@nan")
    assert "config.json" in ask("--control", f"{net}={picture}@0.5")
    assert "absent.safetensors" in ask("--lora", tmp_path / "absent.safetensors")
    assert "absent.safetensors" in ask("--lora", f"{tmp_path / 'absent.safetensors'}@0.5")
    assert "'' is no weight" in ask("--lora", f"{some}@")
    assert "some.safetensors" in ask("--lora", some)
    assert "absent" in ask("--embedding", tmp_path / "absent.safetensors")
    assert "text" in ask("--embedding", some)
    assert "references" in ask("--reference", picture)
    assert "--crop" in ask("--crop", "7")
    assert "--original-size" in ask("--original-size", "7")
    assert "--skip-layers" in ask("--skip-layers", "7-9")
    assert "skip_layers" in ask("--skip-layers", "0")
    assert "skip_interval" in ask("--skip-start", "0.9")
    assert not (tmp_path / "out").exists()


def test_conversions_that_cannot_be_made(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    assert "absent" in refused("convert", tmp_path / "absent", tmp_path / "x", "--layout", "diffusers")
    assert "--layout" in refused("convert", tiny_folder, tmp_path / "x")
    assert "onnx" in refused("convert", tiny_folder, tmp_path / "x", "--layout", "onnx")
    assert "one layout" in refused("convert", tiny_folder, tmp_path / "x", "--layout", "diffusers")
    save_file({"a": torch.zeros(1)}, tmp_path / "some.safetensors")
    said = refused("convert", tmp_path / "some.safetensors", tmp_path / "x", "--layout", "diffusers")
    assert "some.safetensors" in said
    assert not (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused("generate", "--model", tiny_folder, "--out", tmp_path / "file" / "out")


def test_a_disk_that_is_full(tiny_folder: Path, tmp_path: Path) -> None:
    """The system refuses every byte beyond 100 of a file, which is what a full disk looks like to a program."""
    resource = pytest.importorskip("resource")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mezzotint",
            "generate",
            "--model",
            str(tiny_folder),
            "--out",
            str(tmp_path / "out"),
            "--policy",
            "off",
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
        env={"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("mezzotint: cannot write") and len(done.stderr.splitlines()) <= 2
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


RECIPE = """
method = "full"
steps = 1
batch = 1
[data]
folder = "{data}"
size = [32, 32]
channels = 1
[backbone]
name = "unet"
[process]
prediction = "flow"
[process.schedule]
kind = "rectified_flow"
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text.replace("steps = 1", "stepz = 1"), "steps"),
        (lambda text: text.replace('folder = "{data}"', 'foldr = "{data}"'), "data.foldr (nearest valid name: folder)"),
        (lambda text: text.replace('"full"', '"fool"'), "full"),
        (lambda text: text.replace('"full"', '"lora"'), "needs a [base] table"),
        (lambda text: text.replace("batch = 1", "batch = 0"), "batch"),
        (lambda text: text.replace("batch = 1", "batch = one"), "not valid TOML"),
        (lambda text: text.replace('"flow"', '"flwo"'), "flow"),
        (lambda text: text, "metadata.jsonl"),  # the data folder is empty
        (lambda text: text.replace("{data}", "{data}/absent"), "absent"),
    ],
)
def test_recipes_that_cannot_be_followed(
    change: Callable[[str], str], said: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "my.toml").write_text(change(RECIPE).format(data=tmp_path / "data"))
    assert said in refused("train", "my.toml")


def test_recipes_that_cannot_be_read(refused: Refused, tmp_path: Path) -> None:
    assert "absent.toml" in refused("train", tmp_path / "absent.toml")
    (tmp_path / "my.toml").write_text(RECIPE)
    assert "nonsense" in refused("train", tmp_path / "my.toml", "--set", "nonsense")
    (tmp_path / "my.toml").write_bytes(b"\xff\xfe\x00")
    assert "my.toml" in refused("train", tmp_path / "my.toml")


def test_synthesis_without_what_it_needs(refused: Refused, tiny_folder: Path, tmp_path: Path) -> None:
    def ask(good: str, *args: object) -> str:
        return refused("synth", "--model", tiny_folder, "--good", tmp_path / good, "--out", tmp_path / "out", *args)

    for folder in ("empty", "good", "broken"):
        (tmp_path / folder).mkdir()
    Image.new("L", (32, 32), 128).save(tmp_path / "good" / "1.png")
    (tmp_path / "broken" / "1.png").write_bytes(b"no image at all")
    assert "--good" in refused("synth", "--model", tiny_folder, "--out", tmp_path / "out")
    assert "absent" in ask("absent")
    assert "empty" in ask("empty")
    assert "broken" in ask("broken")
    assert "empty" in ask("good", "--defects", tmp_path / "empty")
    assert "crack" in ask("good", "--kinds", "crakc", "--type", "mono")
    assert "count" in ask("good", "--count", "0")
    assert "absent" in refused("synth", "--model", tmp_path / "absent", "--good", tmp_path / "good", "--out", "out")
    assert not (tmp_path / "out").exists()


def test_evaluation_without_what_it_needs(refused: Refused, tmp_path: Path) -> None:
    for folder in ("empty", "good"):
        (tmp_path / folder).mkdir()
    Image.new("L", (32, 32), 128).save(tmp_path / "good" / "1.png")
    for first, second in (("empty", "good"), ("good", "empty"), ("absent", "good"), ("good", "absent")):
        said = refused("evaluate", "--synthetic", tmp_path / first, "--real", tmp_path / second)
        assert first in said or second in said
    assert "--real" in refused("evaluate", "--synthetic", tmp_path / "good")

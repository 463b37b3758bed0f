"""Whole checkpoints that are wrong, torn or malicious: one or two lines that name the thing, before anything is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_sd import write_plain
from safetensors.torch import load_file, save_file

import mezzotint as mz
from mezzotint.errors import InputError

UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("healthy") / "sd1")


def reset(file: str, **settings: Any) -> Callable[[Path], None]:
    """Other settings in a JSON file; None takes one out."""

    def damage(root: Path) -> None:
        data = json.loads((root / file).read_text()) | settings
        (root / file).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return damage


def edit(file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = root / f"{file}.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return damage


def torn(file: str, keep: float) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = root / f"{file}.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return damage


def gone(name: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return damage


class Runs:
    """A pickle that would leave a mark if it were run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def armed(file: str) -> Callable[[Path], None]:
    """The weights as a pickle that runs a command."""

    def damage(root: Path) -> None:
        (root / f"{file}.safetensors").unlink()
        target = root / f"{file}.bin"
        if target.name == "model.bin":
            target = target.with_name("pytorch_model.bin")
        target.write_bytes(pickle.dumps({"weight": Runs(root / "ran")}))

    return damage


def outward(root: Path) -> None:
    (root / f"{UNET}.safetensors").unlink()
    index = {"weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (root / f"{UNET}.safetensors.index.json").write_text(json.dumps(index))


def first(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(tensor for tensor in tensors.values() if tensor.ndim > 1)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (reset("model_index.json", _class_name="AudioPipeline"), None),  # what is there counts, not what it is called
        (reset("unet/config.json", _class_name="UNet3DModel"), "no family known here"),
        (reset("unet/config.json", block_out_channels=[10**9, 64]), r"unet.*(no network can be built|beyond)"),
        (reset("unet/config.json", layers_per_block=10**6), r"unet.*no network can be built"),
        (reset("unet/config.json", attention_head_dim=7), "'attention_head_dim' = 7 does not divide"),
        (reset("unet/config.json", made_up=3), "does not know the option 'made_up'"),
        (reset("unet/config.json", cross_attention_dim=48), r"unet.*of another shape"),
        (reset("vae/config.json", _class_name="AutoencoderOobleck"), r"vae.*_class_name is 'AutoencoderOobleck'"),
        (reset("vae/config.json", latent_channels=5), r"vae.*of another shape"),
        (reset("vae/config.json", scaling_factor=0), "scale 0 loses every image"),
        (reset("text_encoder/config.json", num_hidden_layers=10**9), "no network can be built|beyond|1000000000"),
        (reset("text_encoder/config.json", num_hidden_layers=3), r"text_encoder.*missing"),
        (reset("text_encoder/config.json", hidden_act="relu"), "hidden_act"),
        (reset("scheduler/scheduler_config.json", _class_name="Mystery"), "'_class_name' is 'Mystery'"),
        (reset("scheduler/scheduler_config.json", beta_schedule="sigmoid"), "'beta_schedule' = 'sigmoid'"),
        (reset("scheduler/scheduler_config.json", trained_betas=[0.1, 0.2]), "trained_betas"),
        (reset("scheduler/scheduler_config.json", prediction_type="guess"), "'prediction_type' = 'guess'"),
        (reset("scheduler/scheduler_config.json", rescale_betas_zero_snr=True), "alpha is 0"),
        (gone("vae"), "has no vae"),
        (gone("unet"), "no family known here|parts of a model alone"),
        (gone(f"{UNET}.safetensors"), "has no weights"),
        (gone("text_encoder/config.json"), "no family known here|has no text_encoder"),
        (torn(UNET, 0.5), "not an intact safetensors file"),
        (torn(TEXT, 0.001), "not an intact safetensors file"),
        (torn(VAE, 0.0), "empty"),
        (edit(UNET, lambda t: first(t).view(-1)[:1].fill_(float("nan"))), r"unet.*not (a )?finite|NaN"),
        (edit(VAE, lambda t: first(t).view(-1)[:1].fill_(float("inf"))), r"vae.*not (a )?finite|Inf|inf"),
        (edit(TEXT, lambda t: first(t).view(-1)[:1].fill_(float("nan"))), r"text_encoder.*(not (a )?finite|NaN)"),
        (edit(UNET, lambda t: t.update(extra=torch.zeros(3))), r"unet.*1 unexpected \(extra\)"),
        (edit(UNET, lambda t: t.pop("conv_in.bias")), r"unet.*1 missing \(conv_in.bias\)"),
        (edit(UNET, lambda t: t.update({"conv_in.bias": torch.zeros(7)})), r"1 of another shape \(conv_in.bias \(7,\)"),
        (edit(TEXT, lambda t: t.update(extra=torch.zeros(3))), r"text_encoder.*extra"),
        (outward, "points outside its folder"),
        (armed(UNET), "would run|code|pickle"),
        (armed(TEXT), "would run|code|pickle"),
        (lambda root: (root / "model_index.json").write_text("{"), "not readable JSON"),
        (lambda root: (root / "unet/config.json").write_text("[1]"), "must hold a JSON object"),
        (lambda root: (root / "unet/config.json").write_text("[" * 10**5), "not readable JSON"),
        (lambda root: [f.write_text("{") for f in (root / "tokenizer").iterdir()], "tokenizer.*(intact|readable)"),
    ],
)  # fmt: skip
def test_a_damaged_folder(healthy: Path, tmp_path: Path, damage: Callable[[Path], None], says: str | None) -> None:
    root = tmp_path / "m"
    shutil.copytree(healthy, root)
    damage(root)
    if says is None:
        assert mz.load(root).family == "sd1"
        return
    with pytest.raises(InputError, match=says) as error:
        mz.load(root)
    assert str(error.value).count("\n") <= 1 and len(str(error.value)) < 600
    assert not (root / "ran").exists()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"a.b": torch.zeros(2)}, "fit no family"),
        ({"unet.x.lora_A.weight": torch.zeros(2, 2), "unet.x.lora_B.weight": torch.zeros(2, 2)}, "is a LoRA.*--lora"),
        ({"control_model.input_hint_block.0.weight": torch.zeros(1)}, "is a ControlNet.*--control"),
        ({"emb_params": torch.zeros(1, 768)}, "textual-inversion embedding.*--embedding"),
    ],
)
def test_a_file_that_is_no_model_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor], says: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=says):
        mz.load(tmp_path / "x.safetensors")


def test_a_tokenizer_cannot_bring_code(healthy: Path, tmp_path: Path) -> None:
    root = tmp_path / "m"
    shutil.copytree(healthy, root)
    (root / "tokenizer" / "evil.py").write_text(f"open({str(root / 'ran')!r}, 'w')\nclass Evil: pass\n")
    reset("tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})(root)
    mz.load(root)
    assert not (root / "ran").exists()

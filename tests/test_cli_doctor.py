"""`mezzotint doctor`: what a path is, the answer and its page, exit codes, and what is said to wrong input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mezzotint.cli.main import main
from mezzotint.data import cache, solar_cells
from mezzotint.doctor import kinds, subject
from mezzotint.doctor.finding import Checked, Finding, NotChecked
from mezzotint.doctor.probes import PROBES
from mezzotint.errors import InputError
from mezzotint.families import load

STARTER = Path(__file__).parent.parent / "models" / "solar-cells"
Said = tuple[int, str, str]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Said]:
    """Run the verb in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.delenv("MEZZOTINT_DEBUG", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*args: object) -> Said:
        code = main(["doctor", *(str(arg) for arg in args)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten real solar cells."""
    folder = tmp_path_factory.mktemp("cells")
    for cell in solar_cells.cells()[::250][:10]:
        shutil.copy(cell.path, folder / cell.path.name)
    return folder


def lora_of(model: Path, at: Path) -> Path:
    """A LoRA of rank 1 that does a little in every attention of a model's backbone."""
    shapes = {name: module.weight for name, module in load(model).backbone.named_modules() if name.endswith("to_q")}
    tensors = {}
    for name, weight in shapes.items():
        tensors[f"unet.{name}.lora_A.weight"] = 0.01 * torch.ones(1, weight.shape[1])
        tensors[f"unet.{name}.lora_B.weight"] = 0.01 * torch.ones(weight.shape[0], 1)
    assert tensors
    save_file(tensors, at)
    return at


def a_run(at: Path, recipe: str, records: int = 3) -> Path:
    """A run folder of training, without a model."""
    at.mkdir(parents=True)
    (at / "recipe.toml").write_text(recipe)
    (at / "metrics.jsonl").write_text("".join(json.dumps({"step": i, "loss": 1.0}) + "\n" for i in range(records)))
    return at


def test_the_starter_model_with_real_cells(doctor: Callable[..., Said], cells: Path) -> None:
    code, out, err = doctor(STARTER, "--data", cells, "--images", 8, "--only", "data", "--only", "files")
    assert code == 0, out
    assert out.startswith("Healthy: 2 probes found nothing that costs quality or time")
    assert out.strip().endswith("everything that was measured: out/doctor/solar-cells/doctor.html")
    assert "mezzotint: files, 1 of 2" in err and "data, 2 of 2" in err  # in the order of PROBES
    page = Path("out/doctor/solar-cells/doctor.html").read_text()
    assert "solar-cells" in page and 'id="probe-data"' in page


def test_json_is_the_whole_diagnosis(doctor: Callable[..., Said], cells: Path, tmp_path: Path) -> None:
    code, out, err = doctor(
        STARTER, "--data", cells, "--images", 4, "--only", "files", "--json", "--out", tmp_path / "r"
    )
    said = json.loads(out)
    assert code == 0 and err == ""
    assert said["healthy"] and said["outcomes"][0]["probe"] == "files" and said["settings"]["images"] == 4
    assert said["settings"]["kind"] == "model" and said["settings"]["data"] == str(cells)
    assert said.pop("page") == str(tmp_path / "r" / "doctor.html")
    assert json.loads((tmp_path / "r" / "doctor.json").read_text()) == said


def test_what_is_found_is_exit_code_1(
    doctor: Callable[..., Said], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Finding("objective", "broken", "Its error is 4.87.", "Say velocity.", "mezzotint inspect m", 9.0)

    def probe(name: str) -> Callable[..., Checked]:
        def examine(case: object) -> Checked:
            if name == "text":
                raise NotChecked("this model reads no text")
            return Checked((fault,) if name == "objective" else ())

        return examine

    monkeypatch.setattr("mezzotint.doctor.diagnose.probe", probe)
    code, out, err = doctor(tiny_folder)
    assert code == 1
    assert out.splitlines()[0] == "Broken: the network answers with another objective than its files say."
    assert out.splitlines()[2:6] == [
        "1. broken: the network answers with another objective than its files say [objective]",
        "   Its error is 4.87.", "   Say velocity.", "   $ mezzotint inspect m",
    ]  # fmt: skip
    assert "not checked: text: this model reads no text" in out
    assert f"speed, {len(PROBES)} of {len(PROBES)}, about 0 s more" in err


def test_a_mismatch_that_generate_refuses_is_examined(
    doctor: Callable[..., Said], tiny_folder: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {min(tensors): tensors[min(tensors)] + 1e-3}, weights)
    code, out, _ = doctor(model, "--only", "files", "--json")
    assert code in (0, 1) and [each["probe"] for each in json.loads(out)["outcomes"]] == ["files"]


# What a path is.


def test_weights_that_are_no_numbers_are_a_diagnosis_though_they_are_not_opened(
    doctor: Callable[..., Said], tiny_folder: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(tiny_folder, tmp_path / "broken")
    file = next((broken / "unet").glob("*.safetensors"))
    tensors = load_file(file)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, file)
    code, out, _ = doctor(broken, "--json")
    assert code == 1
    (found,) = json.loads(out)["findings"]
    assert found["cause"] == "weights.finite" and name in found["says"]


def test_a_lora_is_examined_on_its_base(doctor: Callable[..., Said], tiny_folder: Path, tmp_path: Path) -> None:
    file = lora_of(tiny_folder, tmp_path / "some.safetensors")
    code, _, err = doctor(file)
    assert code == 2 and "is a LoRA" in err and "--base" in err
    found = subject.recognise(file, base=tiny_folder, lora=[(file, 0.5)])
    assert (found.kind, found.model, found.base) == ("LoRA", tiny_folder, None)
    assert found.lora == ((file, 1.0), (file, 0.5))
    case = subject.opened(found)
    assert case.path == tiny_folder and case.lora == found.lora
    code, out, _ = doctor(file, "--base", tiny_folder, "--only", "files", "--json", "--out", tmp_path / "r")
    said = json.loads(out)
    assert code in (0, 1) and said["path"] == str(file) and said["settings"]["lora"] == [f"{file}@1"]


def test_a_lora_is_known_by_its_keys_alone(tiny_folder: Path, tmp_path: Path) -> None:
    """A half is missing: `generate` refuses it, and the doctor must be able to say so as a finding."""
    file = lora_of(tiny_folder, tmp_path / "half.safetensors")
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if key != max(tensors)}, file)
    assert kinds.addition(file) == "a LoRA"


def test_weights_of_adapters_are_read_from_the_command(
    tiny_folder: Path, tmp_path: Path, doctor: Callable[..., Said]
) -> None:
    file = lora_of(tiny_folder, tmp_path / "some.safetensors")
    _, out, _ = doctor(tiny_folder, "--lora", f"{file}@0.25", "--lora", file, "--only", "files", "--json")
    assert json.loads(out)["settings"]["lora"] == [f"{file}@0.25", f"{file}@1"]


def test_a_cache_is_examined_with_its_model(doctor: Callable[..., Said], tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    file = tmp_path / "cache" / "train.safetensors"
    save_file({"latents": torch.zeros(2, 1, 1, 32, 32)}, file, {"format": cache.LATENTS})
    for path in (file, file.parent):
        code, _, err = doctor(path)
        assert code == 2 and "is a cache" in err and "--base" in err
        found = subject.recognise(path, base=tiny_folder)
        assert (found.kind, found.model, found.cache, found.probes) == ("cache", tiny_folder, path, ("cache",))
    assert subject.recognise(tiny_folder, cache=file).cache == file


def test_a_finished_run_is_examined_with_what_it_names(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = f'method = "full"\n[data]\nfolder = "cells"\n[base]\npath = "{tiny_folder}"\nprediction = "flow"\n'
    run = a_run(tmp_path / "runs" / "mine", recipe)
    shutil.copytree(tiny_folder, run / "model")
    (tmp_path / "cells").mkdir()
    found = subject.recognise(run)
    assert (found.kind, found.model, found.base, found.trace) == ("run", run / "model", tiny_folder, run)
    assert found.data == tmp_path / "cells"  # seen from above the run folder
    assert found.answers == {"prediction": "flow"} and found.limited == ""
    assert any("cells" in remark for remark in found.remarks)
    given = subject.recognise(run, data=tmp_path, base=run / "model")
    assert (given.data, given.base) == (tmp_path, run / "model")


def test_a_run_that_made_a_lora_is_examined_on_its_base(tiny_folder: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "mine", f'method = "lora"\n[base]\npath = "{tiny_folder}"\n')
    for layout in ("pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_model.safetensors"):
        file = run / "model" / layout
        file.parent.mkdir(parents=True)
        lora_of(tiny_folder, file)
        found = subject.recognise(run)
        assert (found.kind, found.model, len(found.lora)) == ("run", tiny_folder, 1)
        assert kinds.adapter(found.lora[0][0]) is not None
        shutil.rmtree(run / "model")
    (run / "model").mkdir()
    lora_of(tiny_folder, run / "model" / "pytorch_lora_weights.safetensors")
    (run / "recipe.toml").write_text('method = "lora"\n[base]\npath = "gone"\n')
    with pytest.raises(InputError, match=r"the recipe's base gone is not here.*--base"):
        subject.recognise(run)


def test_an_unfinished_run_is_examined_by_its_trace(
    doctor: Callable[..., Said], tiny_folder: Path, tmp_path: Path
) -> None:
    tuned = a_run(tmp_path / "tuned", f'method = "full"\nsteps = 9\n[base]\npath = "{tiny_folder}"\n')
    found = subject.recognise(tuned)
    assert (found.model, found.base, found.probes) == (tiny_folder, tiny_folder, ("data", "trace"))
    assert "not finished" in found.limited
    case = subject.opened(found)
    assert case.base is case.bare and case.data is None
    anew = a_run(tmp_path / "anew", 'method = "full"\nsteps = 9\n[backbone]\nname = "unet"\n')
    found = subject.recognise(anew)
    assert (found.model, found.probes) == (None, ("trace",))
    case = subject.opened(found)
    with pytest.raises(NotChecked, match="not finished"):
        _ = case.bare.contract
    code, _, err = doctor(anew)
    assert code in (0, 1) and "not finished" in err
    assert [each["probe"] for each in json.loads(Path("out/doctor/anew/doctor.json").read_text())["outcomes"]] == [
        "trace"
    ]
    code, _, err = doctor(anew, "--only", "latent")
    assert code == 2 and "only trace can be examined" in err


def test_a_set_of_synth_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("count = 3\n")
    assert kinds.recipe_of(tmp_path) is None


# Wrong input.


def test_wrong_paths_are_refused(doctor: Callable[..., Said], tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    save_file({"a": torch.zeros(1)}, tmp_path / "some.safetensors")
    whole = (tiny_folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    shutil.copy(tmp_path / "cut.safetensors", model / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "step" / "checkpoints" / "step-1").mkdir(parents=True)
    (tmp_path / "step" / "checkpoints" / "step-1" / "state.json").write_text("{}")
    for args, said in (
        (["absent"], "absent"),
        (["empty"], "empty"),
        (["notes.txt"], "notes.txt"),
        (["picture.png"], "picture.png"),
        (["some.safetensors"], "some.safetensors"),
        (["cut.safetensors"], "cut.safetensors"),
        (["model"], "diffusion_pytorch_model.safetensors"),
        (["step/checkpoints/step-1"], "give the run's folder"),
        ([tiny_folder, "--lora", "some.safetensors"], "is no LoRA"),
        ([tiny_folder, "--lora", "picture.png"], "is no LoRA"),
        ([tiny_folder, "--lora", "cut.safetensors@0.5"], "cut.safetensors"),
        ([tiny_folder, "--lora", "absent@0.5"], "absent"),
        ([tiny_folder, "--data", "empty"], "no images in"),
        ([tiny_folder, "--data", "absent"], "absent"),
        ([tiny_folder, "--base", "absent"], "--base"),
        ([tiny_folder, "--cache", "some.safetensors"], "--cache"),
        ([tiny_folder, "--trace", "empty"], "--trace"),
        ([tiny_folder, "--only", "latnet"], "did you mean 'latent'?"),
        ([tiny_folder, "--images", "0"], "--images"),
        ([tiny_folder, "--device", "nowhere"], "nowhere"),
        ([tiny_folder, "--only", "data"], "nothing could be checked"),
        ([tiny_folder, "--only", "files", "--out", "notes.txt"], "notes.txt"),
    ):  # fmt: skip
        given = [
            tmp_path / arg if isinstance(arg, str) and (tmp_path / arg.split("@")[0]).exists() else arg for arg in args
        ]
        code, out, err = doctor(*given)
        complaint = err[err.index("mezzotint: ") :] if "nothing could" not in said else err.splitlines()[-1]
        assert code == 2 and out == "", (args, out)
        assert said in complaint, (args, complaint)
        assert "Traceback" not in err and len([line for line in err.splitlines() if ", 1 of" not in line]) <= 2, err

"""Stable Diffusion 1.x and 2.x and what was made from them against the reference library, from file to latents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import mezzotint as mz
from mezzotint.errors import InputError
from mezzotint.process import Prediction

pytest.importorskip("diffusers")
import reference_sd as sd

from mezzotint.families import sd1, sd2

NETWORK, RUN = 1e-5, 1e-5  # the project asks for 1e-5 and 2e-4


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sd")


@pytest.fixture(scope="session")
def folder(root: Path) -> Path:
    return sd.write_plain(root)


@pytest.fixture(scope="session")
def model(folder: Path) -> mz.Model:
    return sd.both(folder)[1]


@pytest.fixture(scope="session")
def consistent(root: Path) -> mz.Model:
    return sd.both(sd.write_consistency(root), "LatentConsistencyModelPipeline")[1]


@pytest.fixture(scope="session")
def second(root: Path) -> Path:
    """Stable Diffusion 2.x in its original file, which does not say what it predicts; alone in its folder."""
    (root / "alone").mkdir()
    return sd.saved(sd.second_file(sd.write_velocity(root)), root / "alone" / "v2.safetensors")


@pytest.mark.filterwarnings("ignore:this model reads:UserWarning")
@pytest.mark.parametrize("name", sd.ROWS)
def test_equals_the_reference(root: Path, name: str) -> None:
    row = sd.ROWS[name](root)
    parts = {"backbone": row.backbone, "text": row.text, "codec": row.codec}
    assert all(error is None or error < NETWORK for error in parts.values()), parts
    assert all(error < RUN for error in row.runs.values()), row.runs
    assert row.original is None or row.original < RUN


def test_everything_that_is_told_counts(root: Path, model: mz.Model, consistent: mz.Model) -> None:
    """What moved the latents too little to be seen would be no part of the comparison."""
    start: dict[str, Any] = {"steps": 2, "sampler": "ddim"}
    plain = mz.generate(model, sd.request(**start)).latents
    control = [(sd.write_control(root, 1), sd.picture(), 0.7)]
    for change in (
        {"prompt": "a cat"}, {"negative": sd.NEGATIVE}, {"guidance": 4.0}, {"guidance_rescale": 0.7}, {"seed": 4},
        {"sampler": "unipc"}, {"eta": 0.5}, {"image": sd.picture(), "strength": 1.0}, {"control": control},
        {"control": [(control[0][0], sd.picture(), 0.8)]}, {"control": [(control[0][0], sd.picture(8), 0.7)]},
    ):  # fmt: skip
        other = mz.generate(model, sd.request(**(start | change))).latents
        assert sd.distance(other, plain) > 1e-3, change
    runs = [mz.generate(consistent, sd.request(steps=2, guidance=scale)).latents for scale in (2.0, 8.5)]
    assert sd.distance(*runs) > 1e-3


def test_pictures_are_the_references(folder: Path, model: mz.Model) -> None:
    pipeline, _ = sd.both(folder)
    wish = sd.request(sampler="ddim", steps=3)
    (expected,) = sd.theirs(pipeline, wish, output_type="pil")
    (found,) = mz.generate(model, wish).images
    levels = [np.asarray(image).astype(int) for image in (found, expected)]
    assert levels[1].std() > 10 and np.abs(levels[0] - levels[1]).max() <= 1


def test_a_size_is_taken_from_the_folder(model: mz.Model) -> None:
    assert model.contract.size == (sd.SIDE, sd.SIDE) and model.family == "sd1"
    assert mz.generate(model, mz.Request(steps=1)).images[0].size == (sd.SIDE, sd.SIDE)


# Original files.


def test_the_reference_reads_the_same_single_file(root: Path, folder: Path, model: mz.Model) -> None:
    """The names in these files are the original ones, not merely ones that we write and read."""
    import diffusers

    file = sd.saved(sd.first_file(folder), root / "named.safetensors")
    pipeline: Any = diffusers.StableDiffusionPipeline.from_single_file(str(file), config=str(folder))
    pipeline.set_progress_bar_config(disable=True)
    assert sd.apart(model, pipeline, sd.request(sampler="ddim", steps=2)) < RUN


def same(a: mz.Model, b: mz.Model) -> bool:
    ours, others = a.backbone.state_dict(), b.backbone.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_averages_and_tables_are_never_taken_for_weights(
    tmp_path: Path, folder: Path, model: mz.Model, ending: str
) -> None:
    """The running mean in these files has other values; a .ckpt keeps its tensors under state_dict."""
    for name, tensors in (("whole", sd.first_file(folder)), ("pruned", sd.content(folder, sd1.FAMILY))):
        found = mz.load(sd.saved(tensors, tmp_path / f"{name}.{ending}"))
        assert found.family == "sd1" and found.process.prediction is Prediction.EPSILON and same(found, model)
        assert found.contract.sampling == model.contract.sampling


def test_a_single_file_with_additions_is_refused(tmp_path: Path, folder: Path) -> None:
    more = {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn3.to_q.weight": torch.zeros(32, 32)}
    with pytest.raises(InputError, match=r"attn3|no place|no room|unexpected"):
        mz.load(sd.saved({**sd.content(folder, sd1.FAMILY), **more}, tmp_path / "more.safetensors"))
    more = {"control_extra.weight": torch.zeros(3)}
    with pytest.raises(InputError, match=r"1 tensors? that belong to no part of this family, control_extra\.weight"):
        mz.load(sd.saved({**sd.content(folder, sd1.FAMILY), **more}, tmp_path / "more.safetensors"))


def test_the_last_layer_of_a_second_text_encoder_is_never_read(second: Path, root: Path) -> None:
    """Its file holds 24 layers and a projection; published folders keep 23, and so do we."""
    found, (_, folder) = mz.load(second, prediction="velocity"), sd.both(sd.write_velocity(root))
    assert found.text is not None and folder.text is not None
    ours, others = (text.networks["text_encoder"].state_dict() for text in (found.text, folder.text))
    assert ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)
    assert sum(name.endswith("layer_norm1.bias") for name in ours) == 23
    assert [reading.padding for reading in found.text.readings(False)] == ["!"]


# What a file predicts.


def test_pain_02_a_velocity_file_is_never_read_as_epsilon(second: Path) -> None:
    """2.1 and 2.1-base look the same and do not say which they are: the user is asked, and nothing is guessed."""
    with pytest.raises(InputError, match=r"does not say .*--prediction velocity or --prediction epsilon"):
        mz.load(second)
    latents: list[torch.Tensor] = []
    for answer, size in (("velocity", 768), ("epsilon", 512)):
        found = mz.load(second, prediction=answer)
        assert found.family == "sd2" and found.contract.size == (size, size)
        assert found.process.prediction is Prediction(answer)
        latents.append(mz.generate(found, sd.request(steps=2)).latents)
    assert sd.distance(*latents) > 0.1
    with pytest.raises(InputError, match=r"no prediction 'v'"):
        mz.load(second, prediction="v")


@pytest.mark.parametrize("word", ["v", "velocity", "epsilon"])
def test_a_header_answers(tmp_path: Path, root: Path, word: str) -> None:
    told = {"modelspec.prediction_type": word}
    file = sd.saved(sd.content(sd.write_velocity(root), sd2.FAMILY), tmp_path / "m.safetensors", told)
    expected = Prediction.EPSILON if word.startswith("e") else Prediction.VELOCITY
    assert mz.load(file).process.prediction is expected
    other = Prediction.VELOCITY if word.startswith("e") else Prediction.EPSILON
    with pytest.raises(InputError, match=rf"prediction is {expected} in .*m\.safetensors, but {other} was asked for"):
        mz.load(file, prediction=other)


def test_a_flag_among_the_tensors_answers(tmp_path: Path, root: Path) -> None:
    tensors = sd.content(sd.write_velocity(root), sd2.FAMILY)
    found = mz.load(sd.saved({**tensors, "v_pred": torch.zeros(0)}, tmp_path / "m.safetensors"))
    assert found.process.prediction is Prediction.VELOCITY


def test_a_scheduler_file_beside_answers_and_contradictions_are_refused(
    tmp_path: Path, second: Path, root: Path
) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(sd.DDIM))
    silent = tmp_path / "m.safetensors"
    shutil.copy(second, silent)
    assert mz.load(silent).process.prediction is Prediction.VELOCITY
    with pytest.raises(InputError, match=r"prediction is velocity in .*scheduler_config\.json, but epsilon was asked"):
        mz.load(silent, prediction="epsilon")
    told = {"modelspec.prediction_type": "epsilon"}
    file = sd.saved(sd.content(sd.write_velocity(root), sd2.FAMILY), tmp_path / "n.safetensors", told)
    with pytest.raises(InputError, match=r"prediction is velocity in .*scheduler_config.* but epsilon in .*n\.saf"):
        mz.load(file)
    with pytest.raises(InputError, match=r"prediction is velocity in .*velocity.scheduler.*, but epsilon was asked"):
        mz.load(sd.write_velocity(root), prediction="epsilon")


# Scheduler files.


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize(
    ("change", "sampler"),
    [
        (lambda file: file | {"steps_offset": 0}, "ddpm"),
        (lambda file: without(file, "steps_offset") | {"_class_name": "DDIMScheduler"}, None),
        (lambda file: file | {"_class_name": "DDPMScheduler", "clip_sample": True}, None),
        (lambda file: without(file, "clip_sample") | {"_class_name": "DDIMScheduler"}, None),
        (lambda file: file | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, None),
    ],
)
def test_scheduler_files_are_corrected_as_the_pipelines_do(
    tmp_path: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]], sampler: str | None
) -> None:
    """Leading timesteps start at 1, latents are not clipped: whatever the file says, or where it is silent."""
    shutil.copytree(folder, tmp_path / "m")
    file = change(dict(sd.PNDM))
    (tmp_path / "m" / "scheduler" / "scheduler_config.json").write_text(json.dumps(file))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", file["_class_name"]]
    (tmp_path / "m" / "model_index.json").write_text(json.dumps(index))
    parts = {part: getattr(sd.both(folder)[0], part) for part in ("unet", "vae", "text_encoder", "tokenizer")}
    pipeline = sd.opened(tmp_path / "m", "StableDiffusionPipeline", **parts)
    assert sd.apart(mz.load(tmp_path / "m"), pipeline, sd.request(sampler=sampler, steps=3)) < 2e-5


def without(file: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in file.items() if name not in names}


# What does not fit.


def test_a_control_network_of_another_backbone_is_refused(tmp_path: Path, folder: Path, model: mz.Model) -> None:
    wrong = sd.control_file(sd.write_control(tmp_path, 1))
    wrong = {name: tensor for name, tensor in wrong.items() if "zero_convs.3" not in name}
    save_file(wrong, tmp_path / "wrong.safetensors")
    with pytest.raises(InputError, match=r"wrong\.safetensors"):
        mz.generate(model, sd.request(control=[(tmp_path / "wrong.safetensors", sd.picture(), 1.0)]))


def test_a_consistency_model_has_no_negative_prompt_and_no_more_steps_than_it_was_taught(
    consistent: mz.Model,
) -> None:
    with pytest.raises(InputError, match="this model is distilled and has none"):
        mz.generate(consistent, sd.request(negative=sd.NEGATIVE))
    with pytest.raises(InputError, match="use 1 to 50"):
        mz.generate(consistent, sd.request(steps=51))
    with pytest.raises(InputError, match="use 1 to 15"):
        mz.generate(consistent, sd.request(steps=16, image=sd.picture(), strength=0.3))

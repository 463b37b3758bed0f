"""Stable Diffusion 3 and 3.5 whole: parts and pictures against the reference library, from folders and single files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference_sd35 import (
    FEW,
    KINDS,
    LARGE,
    LONG,
    MEDIUM,
    MOVING,
    NEGATIVE,
    PROMPT,
    SIDE,
    Run,
    apart,
    asked,
    backbone_error,
    codec_error,
    control_error,
    controlled,
    from_image,
    hushed,
    levels_apart,
    loaded,
    opened,
    ours,
    quiet,
    repainted,
    single_control,
    single_file,
    text_error,
    theirs,
    write,
    write_control,
)
from safetensors.torch import load_file, save_file
from text_parts import tiny_clip

import mezzotint as mz
from mezzotint.errors import InputError
from mezzotint.generate import generate_batch
from mezzotint.process import schedules

pytest.importorskip("diffusers")
PART, RUN, ROUNDING = 1e-5, 2e-4, 1e-6
TEXTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DEFAULT = Run("flow_euler", 4, 4.5, negative=NEGATIVE)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sd35")
    return {kind: write(root / str(index), kind) for index, kind in enumerate(KINDS)}


@pytest.fixture(scope="session")
def medium(folders: dict[str, Path]) -> Path:
    return folders[MEDIUM]


@pytest.mark.parametrize("kind", KINDS)
def test_parts(folders: dict[str, Path], kind: str) -> None:
    model, pipeline = loaded(folders[kind]), opened(folders[kind])
    assert backbone_error(model, pipeline) < PART
    assert text_error(model, pipeline) < PART
    assert codec_error(model, pipeline) < PART


@pytest.mark.parametrize(
    "run",
    [
        Run("flow_euler", 20, 4.5, negative=NEGATIVE),
        Run("flow_euler", 4, 1.0, width=24, height=48),
        Run("euler", 4, 7.0, width=40, height=24),
        Run("heun", 4, 4.5, LONG),
        Run("dpmpp_2m", 28, 1.0),
        Run("dpmpp_2m", 4, 7.0, LONG, LONG),
        Run("dpmpp_2m_sde", 4, 4.5),
        Run("unipc", 12, 7.0, negative=NEGATIVE),
        Run("flow_euler", 8, 4.5, skip=(1,)),
        Run("dpmpp_2m", 4, 7.0, skip=(0, 2), skip_interval=(0.1, 0.8)),
    ],
    ids=str,
)
def test_runs(medium: Path, run: Run) -> None:
    assert apart(ours(loaded(medium), run).latents, theirs(opened(medium), [run])) < RUN


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != MEDIUM])
def test_other_kinds(folders: dict[str, Path], kind: str) -> None:
    run = replace(FEW[1], steps=4)
    assert apart(ours(loaded(folders[kind]), run).latents, theirs(opened(folders[kind]), [run])) < RUN


def test_a_batch_of_prompts_and_seeds(medium: Path) -> None:
    prompts = ((PROMPT, ""), (LONG, NEGATIVE), ("", LONG))
    runs = [replace(DEFAULT, prompt=told, negative=not_, seed=7 * i) for i, (told, not_) in enumerate(prompts)]
    with quiet():
        found = generate_batch(loaded(medium), [asked(run) for run in runs])
    for result, expected in zip(found, theirs(opened(medium), runs), strict=True):
        assert apart(result.latents[0], expected) < RUN


def test_pictures(medium: Path) -> None:
    (expected,) = theirs(opened(medium), [DEFAULT], decoded=True)
    (found,) = ours(loaded(medium), DEFAULT).images
    assert found.size == expected.size == (SIDE, SIDE)
    assert levels_apart(found, expected) <= 1


@pytest.mark.parametrize(("sampler", "strength"), [("flow_euler", 0.6), ("heun", 0.5), ("flow_euler", 1.0)])
def test_from_an_image(medium: Path, sampler: str, strength: float) -> None:
    run = replace(DEFAULT, sampler=sampler, steps=7)
    assert from_image(opened(medium), loaded(medium), run, strength) < RUN
    assert repainted(opened(medium), loaded(medium), run, strength) < RUN


def test_without_t5_and_with_a_shift_that_follows_the_picture(tmp_path: Path) -> None:
    """The Stable Diffusion 3 pipeline has both, though no released file asks for the second."""
    folder = write(tmp_path / "model", LARGE, with_t5=False, scheduler=MOVING)
    model, pipeline = loaded(folder), opened(folder)
    assert text_error(model, pipeline) < PART
    for sampler in ("flow_euler", "unipc"):
        run = Run(sampler, 4, 4.5, width=40, height=24)
        assert apart(ours(model, run).latents, theirs(pipeline, [run])) < RUN
    assert model.contract.text is not None
    assert [reading.encoder for reading in model.contract.text.encoders] == [*TEXTS[:2], "none"]


# Control.


@pytest.mark.parametrize("kind", ["that reads text, zeros for the pooled prompt", "that reads text", "without text"])
def test_control(medium: Path, tmp_path: Path, kind: str) -> None:
    """InstantX's kind, one that is told all, and Stability's, also from its own single file and twice over."""
    model, pipeline, network = loaded(medium), opened(medium), write_control(tmp_path / "network", kind)
    assert control_error(model, pipeline, network) < PART
    if kind != "without text":
        assert controlled(pipeline, model, DEFAULT, [(network, 0.8)]) < RUN
        return
    single = single_control(network, tmp_path / "network.safetensors")
    assert controlled(pipeline, model, DEFAULT, [(network, 0.8)], single) < RUN
    assert controlled(pipeline, model, DEFAULT, [(network, 0.8), (network, -0.4)]) < RUN


def test_control_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from mezzotint.families.control import controlled as attached

    network = write_control(tmp_path / "network", "that reads text")
    config = (network / "config.json").read_text()
    (network / "config.json").write_text(config.replace('"in_channels": 16', '"in_channels": 32'))
    with pytest.raises(InputError):
        attached(loaded(folders[LARGE]), [(network, 1.0)])


# Single files.


@pytest.mark.parametrize("texts", [(), TEXTS[:2], TEXTS])
def test_single_files_draw_as_folders(medium: Path, tmp_path: Path, texts: tuple[str, ...]) -> None:
    """What the file lacks comes from the folder: text encoders, or their tokenizers alone."""
    beside = tmp_path / "parts"
    lacking = {*TEXTS} - {*texts}
    for part in (*lacking, "tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(medium / part, beside / part)
    model = loaded(single_file(medium, tmp_path / "model.safetensors", texts), beside)
    assert apart(ours(model, DEFAULT).latents, ours(loaded(medium), DEFAULT).latents) < ROUNDING
    assert model.contract.latent.scale == 1.5305 and model.contract.latent.shift == 0.0609
    assert model.contract.text == loaded(medium).contract.text


def test_the_reference_opens_our_single_file(medium: Path, tmp_path: Path) -> None:
    """Text encoders too, but for T5, whose embedding its own reader leaves without numbers."""
    from diffusers import StableDiffusion3Pipeline

    file, pipeline = single_file(medium, tmp_path / "model.safetensors", TEXTS), opened(medium)
    third = {"text_encoder_3": pipeline.text_encoder_3, "tokenizer_3": pipeline.tokenizer_3}
    single = StableDiffusion3Pipeline.from_single_file(str(file), config=str(medium), local_files_only=True, **third)
    assert apart(ours(loaded(medium), DEFAULT).latents, theirs(hushed(single), [DEFAULT])) < RUN


def test_text_encoders_as_released_apart(medium: Path, tmp_path: Path) -> None:
    """In a folder beside the file, each in a file of its own; CLIP-L with the projection that nobody reads."""
    (tmp_path / "text_encoders").mkdir()
    for part, name in zip(TEXTS, ("clip_l", "clip_g", "t5xxl_fp16"), strict=True):
        tensors = load_file(medium / part / "model.safetensors")
        if name == "clip_l":
            tensors["text_projection.weight"] = torch.randn(64, 64)
        if "clip" in name:
            tensors["logit_scale"] = torch.tensor(4.6)
        save_file(tensors, tmp_path / "text_encoders" / f"{name}.safetensors")
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(medium / part, tmp_path / part)
    model = loaded(single_file(medium, tmp_path / "model.safetensors"))
    assert apart(ours(model, DEFAULT).latents, ours(loaded(medium), DEFAULT).latents) < ROUNDING


def test_a_single_file_without_tokenizers(tmp_path: Path) -> None:
    """CLIP's own vocabulary, which bigG fills up with "!" and CLIP-L with the end token."""
    from mezzotint.text.vocabulary import clip_vocabulary

    folder = write(tmp_path / "model", LARGE, with_t5=False, words=49408)
    model = mz.load(single_file(folder, tmp_path / "model.safetensors", TEXTS[:2]))
    for name, padding in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizer = clip_vocabulary()
        tokenizer.save_pretrained(folder / name)
        settings = folder / name / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace('"pad_token": "<|endoftext|>"', f'"pad_token": "{padding}"'))
    assert text_error(model, opened(folder)) < PART
    assert model.contract.text is not None
    assert [reading.padding for reading in model.contract.text.encoders] == ["<|endoftext|>", "!", "zeros"]


# Facts.


@pytest.mark.parametrize(
    ("kind", "steps", "scale"), [(MEDIUM, 50, 5.0), (next(iter(KINDS)), 50, 5.0), (LARGE, 40, 4.5)]
)
def test_facts(folders: dict[str, Path], kind: str, steps: int, scale: float) -> None:
    contract = loaded(folders[kind]).contract
    assert contract.family == "sd35" and "Community License" in contract.licence.weights
    assert contract.process.schedule == schedules.sd35()
    assert (contract.sampling.sampler, contract.sampling.steps, contract.guidance.scale) == ("flow_euler", steps, scale)
    assert contract.size == (SIDE, SIDE)
    assert contract.text is not None and len(contract.text.encoders) == 3
    assert [reading.length for reading in contract.text.encoders] == [77, 77, 256]


def test_what_the_contract_proposes_is_drawn(medium: Path) -> None:
    """A request that names nothing but a prompt: the contract's size, sampler, guidance."""
    found = mz.generate(loaded(medium), mz.Request(prompt=PROMPT, steps=4, seed=3))
    run = Run("flow_euler", 4, 5.0, seed=3)
    assert apart(found.latents, theirs(opened(medium), [run])) < RUN


def test_text_encoders_of_another_model_are_refused(medium: Path, tmp_path: Path) -> None:
    """A vector for the whole prompt of another width."""
    shutil.copytree(medium, tmp_path / "model", ignore=shutil.ignore_patterns("text_encoder_2"))
    tiny_clip(tmp_path / "model" / "text_encoder_2", 80, projection=40, heads=1, act="gelu")
    with pytest.raises(InputError, match=r"pooled is 104 .* but 112"):
        mz.load(tmp_path / "model")


def test_a_t5_without_its_tokenizer_says_what_to_do(medium: Path, tmp_path: Path) -> None:
    file = single_file(medium, tmp_path / "model.safetensors", TEXTS)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(medium / part, tmp_path / part)
    with pytest.raises(InputError, match=r"tokenizer_3.*--parts"):
        mz.load(file)

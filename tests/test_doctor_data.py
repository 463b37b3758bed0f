"""The doctor's look at images and caches: each fault is seeded into a folder or a file and named, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import torch
from PIL import Image
from torch import Tensor

from mezzotint.data import cache as caches
from mezzotint.data import folder as folders
from mezzotint.data import table
from mezzotint.doctor import freshness
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, NotChecked
from mezzotint.doctor.probes import cache, data
from mezzotint.families import Model
from mezzotint.files import sha256_json
from mezzotint.text import minilm

SIZE = 64
CAPTIONS = ("a crack on the cell", "a dark area", "a scratch on the steel", "a dark cell")


def picture(seed: int) -> np.ndarray:
    """A few blurred blots, another picture for every seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    heights, places, widths = rng.normal(0, 60, 20), rng.integers(0, SIZE, (20, 2)), rng.uniform(2, 9, 20)
    blots = [
        height * np.exp(-((y - v) ** 2 + (x - u) ** 2) / (2 * width**2))
        for height, (v, u), width in zip(heights, places, widths, strict=True)
    ]
    return np.clip(128 + sum(blots), 0, 255).astype(np.uint8)


def write(path: Path, seeds: range, row: Callable[[int], dict[str, Any]] = lambda i: {}) -> Path:
    path.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for i in seeds:
        Image.fromarray(picture(i)).convert("RGB").save(path / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": CAPTIONS[i % 4], "label": i % 3, **row(i)})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def listed(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    rows = [json.loads(line) for line in (path / "metadata.jsonl").read_text().splitlines()]
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, change(rows))) + "\n")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    text = minilm.load_folder(parts.bert_folder(tmp_path_factory.mktemp("bert")), length=20)
    backbone = parts.text_unet(3, 3, 16)  # as wide as the tiny BERT
    return parts.model(backbone, parts.pixel_codec(), text, size=(SIZE, SIZE))


def classes() -> Model:
    return parts.class_model(size=(SIZE, SIZE))


def case(model: Model, path: Path | None, **more: Any) -> Case:
    return Case(Path("model"), model, folder=path, **more)


def causes(checked: Checked, grades: tuple[str, ...] = ("broken", "harmful")) -> set[str]:
    return {found.cause for found in checked.findings if found.grade in grades}


def test_a_sound_folder_has_no_finding(tmp_path: Path, texts: Model) -> None:
    path = write(tmp_path / "a", range(40))
    for model in (texts, classes()):
        checked = data.examine(case(model, path))
        assert causes(checked, ("broken", "harmful", "note")) == set()
        assert {m.name: m.value for m in checked.measures}["images"] == 40


def test_no_folder_asks_for_one() -> None:
    with pytest.raises(NotChecked, match="--data"):
        data.examine(case(classes(), None))


def test_copies_are_a_note_while_few_and_harmful_when_many(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(40))

    def copied(count: int) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
        def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            for i in range(count):
                shutil.copy(path / f"{i:03d}.png", path / f"copy{i}.png")
            return rows + [{**rows[i], "file_name": f"copy{i}.png"} for i in range(count)]

        return change

    listed(path, copied(1))
    few = data.examine(case(classes(), path))
    assert causes(few) == set() and causes(few, ("note",)) == {"data.copies"}
    listed(path, lambda rows: copied(6)([row for row in rows if not row["file_name"].startswith("copy")]))
    many = data.examine(case(classes(), path))
    assert causes(many) == {"data.copies"}
    share = next(m.value for m in many.measures if m.name == "share of exact copies")
    assert share == 6 / 46
    assert many.findings[0].strength == pytest.approx(share / data.EXACT)
    assert many.exhibits


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(20))
    (path / "004.png").write_bytes((path / "004.png").read_bytes()[:300])
    (found,) = data.examine(case(classes(), path)).findings
    assert found.cause == "data.broken" and found.grade == "harmful" and "004.png" in found.says


def test_validation_that_training_has_seen_is_a_leak(tmp_path: Path) -> None:
    train, held = write(tmp_path / "train", range(30)), write(tmp_path / "held", range(26, 40))
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "validation": 1.0}\n')
    (run / "recipe.toml").write_text(f'[data]\nfolder = "{train}"\nvalidation = "{held}"\n')
    checked = data.examine(case(classes(), None, trace=run))
    assert causes(checked) == {"data.leak"}
    assert {m.name: m.value for m in checked.measures}["share of validation images in training"] == 4 / 14


def test_captions_that_are_missing_equal_or_cut(tmp_path: Path, texts: Model) -> None:
    path = write(tmp_path / "a", range(40))
    for change in (
        lambda rows: [{**row, "text": ""} for row in rows],
        lambda rows: [{**row, "text": "a cell"} for row in rows],
        lambda rows: [{**row, "text": f"{CAPTIONS[i % 4]} {'on the cell ' * 40}"} for i, row in enumerate(rows)],
        lambda rows: [{**row, "text": "" if i % 3 == 0 else row["text"]} for i, row in enumerate(rows)],
    ):
        listed(path, change)
        assert causes(data.examine(case(texts, path))) == {"data.captions"}
        listed(path, lambda rows: [{**row, "text": CAPTIONS[i % 4]} for i, row in enumerate(rows)])
    listed(path, lambda rows: [{**row, "text": "a cell"} for row in rows])
    assert causes(data.examine(case(texts, path, base=texts))) == set()  # a subject may have one caption
    assert causes(data.examine(case(classes(), path))) == set()  # a model that reads none needs none


def test_classes_far_from_balanced(tmp_path: Path) -> None:
    path = write(tmp_path / "a", range(64), lambda i: {"label": 0 if i > 3 else 1 + i % 2})
    assert causes(data.examine(case(classes(), path))) == {"data.balance"}


def test_plain_pictures_are_looked_at_too(tmp_path: Path, texts: Model) -> None:
    path = write(tmp_path / "a", range(20))
    (path / "metadata.jsonl").unlink()
    assert causes(data.examine(case(texts, path)), ("broken", "harmful", "note")) == set()
    for i in range(3):
        shutil.copy(path / f"{i:03d}.png", path / f"copy{i}.png")
    assert causes(data.examine(case(texts, path))) == {"data.copies"}


# Caches.


def latents(path: Path, at: Path, model: Model, change: Callable[[Tensor], Tensor] = lambda z: z) -> Path:
    """What training keeps of a folder, with a change of its values that the header knows nothing of."""
    found = folders.read(path, (SIZE, SIZE), model.codec.pixel_channels)
    dtype = "float32"
    encode = lambda pixels: change(model.codec.encode(pixels))  # noqa: E731
    caches.latents(at, found, [(), (-1,)], encode, model.contract.latent.codec, Path("codec"), dtype=dtype)
    return at


@pytest.fixture(scope="module")
def coded() -> Model:
    return parts.model(parts.plain_unet(4, 4), parts.kl_codec(), size=(SIZE, SIZE))


def test_a_sound_cache_has_no_finding(tmp_path: Path, coded: Model) -> None:
    path = write(tmp_path / "a", range(12))
    checked = cache.examine(case(coded, path, cache=latents(path, tmp_path / "train.safetensors", coded)))
    assert not checked.findings
    assert checked.measures[0].value < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda z: z / 0.7, "scaled by 1.429"),
        (lambda z: z + z.std(), "shifted"),
        (lambda z: z[:, [1, 0, 3, 2]], "another order (1, 0, 3, 2)"),
        (lambda z: z.flip(0), "other images"),
        (lambda z: torch.randn(z.shape, generator=torch.Generator().manual_seed(0)), "another codec"),
    ],
)
def test_a_cache_whose_values_are_not_what_its_header_claims(
    tmp_path: Path, coded: Model, change: Callable[[Tensor], Tensor], says: str
) -> None:
    path = write(tmp_path / "a", range(12))
    kept = latents(path, tmp_path / "train.safetensors", coded, change)
    (found,) = cache.examine(case(coded, path, cache=tmp_path)).findings
    assert found.cause == "latent.cache" and found.grade in ("broken", "harmful")
    assert says in found.says and "names this model's codec" in found.says and kept.name in found.says


def test_latents_kept_in_half_precision_are_a_note(tmp_path: Path, coded: Model) -> None:
    path = write(tmp_path / "a", range(12))
    latents(path, tmp_path / "train.safetensors", coded, lambda z: z.bfloat16().float())
    (found,) = cache.examine(case(coded, path, cache=tmp_path)).findings
    assert found.grade == "note" and "bfloat16" in found.says


def test_slope_and_offset_are_those_of_least_squares() -> None:
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    slope, offset = torch.tensor([2.0, 0.5, 1.0]).double(), torch.tensor([0.0, 1.0, -2.0]).double()
    found = freshness.compare(x * slope.view(1, 3, 1, 1) + offset.view(1, 3, 1, 1), x)
    assert torch.allclose(found.slope, slope)
    assert torch.allclose(found.offset, offset / x.transpose(0, 1).flatten(1).std(1, unbiased=False))
    assert torch.allclose(found.correlation, torch.ones(3).double())


def test_a_cache_of_other_images_cannot_be_judged(tmp_path: Path, coded: Model) -> None:
    path = write(tmp_path / "a", range(12))
    latents(path, tmp_path / "train.safetensors", coded)
    with pytest.raises(NotChecked, match="other images"):
        cache.examine(case(coded, write(tmp_path / "b", range(20, 30)), cache=tmp_path))
    with pytest.raises(NotChecked, match="--data"):
        cache.examine(case(coded, None, cache=tmp_path))


def states(at: Path, model: Model, captions: list[str], change: Callable[[Tensor], Tensor] = lambda z: z) -> None:
    facts, text = model.contract.text, model.text
    assert facts is not None and text is not None

    def encode(prompts: Any) -> Any:
        said = text.encode(list(prompts))
        assert said.tokens is not None
        return replace(said, tokens=change(said.tokens))

    caches.text(at, captions, encode, sha256_json(facts.model_dump(mode="json")), Path("text"))


def test_cached_text_states_are_compared_with_fresh_ones(tmp_path: Path, texts: Model) -> None:
    path = write(tmp_path / "a", range(12))
    states(tmp_path / "text-train.safetensors", texts, list(CAPTIONS))
    assert not cache.examine(case(texts, path, cache=tmp_path)).findings
    (tmp_path / "text-train.safetensors").unlink()
    states(tmp_path / "text-train.safetensors", texts, list(CAPTIONS), lambda z: 1.5 * z)
    (found,) = cache.examine(case(texts, path, cache=tmp_path)).findings
    assert found.cause == "text.cache" and "slope 1.5" in found.says
    header, tensors = table.read(tmp_path / "text-train.safetensors")
    turned = {name: value.flip(0) / 1.5 if value.is_floating_point() else value for name, value in tensors.items()}
    table.write(tmp_path / "turned.safetensors", 5, header, [turned])
    (tmp_path / "text-train.safetensors").unlink()
    (found,) = cache.examine(case(texts, path, cache=tmp_path)).findings
    assert found.cause == "text.cache"

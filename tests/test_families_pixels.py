"""Models of pixels, from folder or original file to the picture, against the reference library's own pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import on_meta
from networks import relative
from torch import Tensor

import mezzotint as mz
from mezzotint.backbones import published_unets as published
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.adm import Order, adm
from mezzotint.checkpoints.layouts.ddpm import ddpm as port
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.families.ddpm import FAMILY, sections
from mezzotint.families.family import Asked
from mezzotint.families.materials import Materials, read_original
from mezzotint.process import Discrete, Prediction, schedules

pytest.importorskip("diffusers")
import reference_pixels as reference
from original_networks import Weights, guided_diffusion
from parity_rows import Row


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pixels")


@pytest.fixture(scope="module")
def rows(root: Path) -> list[Row]:
    return reference.parity(root)


@pytest.fixture(scope="module")
def plain(rows: list[Row], root: Path) -> Path:
    """The DDPMPipeline folder that `rows` speaks of."""
    return root / "ddpm"


def test_whole_runs_agree_with_the_reference(rows: list[Row]) -> None:
    for row in rows:
        assert row.backbone is not None and row.backbone < 1e-5, row.model
        assert all(error < 2e-4 for error in row.runs.values()), (row.model, row.runs)
        assert row.original is None or row.original < 1e-6, row.model
    assert len(rows[0].runs) == 10


def test_pictures_agree_with_the_reference(plain: Path) -> None:
    with reference.one_noise() as anew:
        theirs = reference.run(reference.opened("DDPMPipeline", plain), batch_size=2, num_inference_steps=4)
        anew()
        ours = reference.draw(mz.load(plain), "ddpm", 4)
    assert reference.levels_apart(ours.images, theirs.images) <= 1


def test_a_folder_draws_by_default_as_its_authors_did(plain: Path) -> None:
    facts = mz.load(plain).contract
    assert (facts.family, facts.size, facts.sampling.steps) == ("ddpm", (reference.SIDE,) * 2, 1000)
    assert (facts.sampling.sampler, facts.sampling.variance, facts.sampling.clip) == ("ddpm", "large", 1.0)


@pytest.mark.parametrize("indexed", [True, False])
def test_flat_folders_of_the_first_days(plain: Path, tmp_path: Path, indexed: bool) -> None:
    """One folder, old names of attention, a pickle, a scheduler file silent on spacing; with an index the reference
    opens it too.
    """
    flat = reference.tiny_flat(plain, tmp_path / "flat", indexed)
    model = mz.load(flat)
    assert model.contract.sampling.variance == "small"
    with reference.one_noise() as anew:
        pipeline = reference.opened("DDPMPipeline", flat if indexed else plain)
        if not indexed:
            pipeline.scheduler = type(pipeline.scheduler)(variance_type="fixed_small")
        theirs = reference.run(pipeline, batch_size=2, num_inference_steps=5).latents
        anew()
        assert reference.distance(reference.draw(model, "ddpm", 5).latents, theirs) < 2e-4
        anew()
        assert reference.distance(reference.draw(mz.load(plain), "ddpm", 5).latents, theirs) > 1e-2  # fixed_large


def test_a_ddim_folder_keeps_its_unclipped_estimates(tmp_path: Path) -> None:
    folder = reference.tiny_folder(tmp_path / "ddim", reference.PLAIN, {"clip_sample": False}, "DDIM")
    model = mz.load(folder)
    assert (model.contract.sampling.sampler, model.contract.sampling.clip) == ("ddim", None)
    with reference.one_noise() as anew:
        theirs = reference.run(reference.opened("DDIMPipeline", folder), batch_size=2, num_inference_steps=6)
        anew()
        assert reference.distance(reference.draw(model, "ddim", 6).latents, theirs.latents) < 2e-4


@pytest.mark.parametrize("order", reference.ORDERS)
def test_a_file_says_how_its_attention_is_stacked(rows: list[Row], root: Path, order: Order) -> None:
    """The network that was loaded is the formula's of this order, and not of the other."""
    model = mz.load(root / f"adm-{order}" / "model.pt")
    weights = torch.load(root / f"adm-{order}" / "model.pt", weights_only=True)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    t, label = torch.tensor([3.0, 700.0]), torch.tensor([4, 1])
    found: dict[str, float] = {}
    for other in reference.ORDERS:
        theirs = guided_diffusion(Weights(weights), x, t, label, heads=lambda width: width // 16, order=other, layers=1)
        found[other] = relative(model.backbone(x, t, Conditioning(label=label)), theirs)
    assert found.pop(order) < 1e-5 < 1e-3 < next(iter(found.values()))


def test_improved_ddpm_is_told_rescaled_timesteps(rows: list[Row], root: Path, tmp_path: Path) -> None:
    """Told as 0..1000 where config.json says so, and by the table's own count where it does not."""
    found = mz.load(root / "improved" / "model.pt").process.schedule
    assert found == replace(schedules.cosine(4000), tick=0.25)
    config = {"sample_size": 8, "num_attention_heads": 4}
    reference.stated(tmp_path / "plain", config, root / "improved" / "scheduler_config.json")
    (tmp_path / "plain" / "model.pt").write_bytes((root / "improved" / "model.pt").read_bytes())
    model = mz.load(tmp_path / "plain" / "model.pt")
    assert model.process.schedule == schedules.cosine(4000)
    assert model.contract.variance == "learned"


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"label": 1, "guidance": 2.0}, "condition dropped"),
        ({"label": 1, "negative": "2"}, "negative prompt"),
        ({"label": 5}, "out of range: 0 to 4"),
        ({}, "needs a label"),
        ({"prompt": "a cat", "label": 1}, "without text"),
    ],
)
def test_classes_without_a_null_class(rows: list[Row], root: Path, wish: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        mz.generate(mz.load(root / "adm"), mz.Request(steps=2, **wish))


def test_a_model_without_condition_takes_none(plain: Path) -> None:
    model = mz.load(plain)
    wishes: list[dict[str, Any]] = [{"prompt": "a cat"}, {"label": 1}, {"guidance": 3.0}, {"negative": "a dog"}]
    for wish in wishes:
        with pytest.raises(InputError):
            mz.generate(model, mz.Request(steps=2, **wish))


COSINE, RESCALED = schedules.cosine(4000), replace(schedules.cosine(4000), tick=0.25)
# name: its configuration, the side of its pictures, its schedule, the order of q, k and v
ROWS: dict[str, tuple[Callable[[], UNetConfig], int, Discrete, Order]] = {
    "ADM 64": (published.adm_64, 64, schedules.cosine(), "new"),
    "ADM 128": (published.adm_128, 128, schedules.linear(), "legacy"),
    "ADM 256": (published.adm_256, 256, schedules.linear(), "legacy"),
    "ADM 256 without classes": (lambda: published.adm_256(None), 256, schedules.linear(), "legacy"),
    "ADM 512": (published.adm_512, 512, schedules.linear(), "legacy"),
    "improved CIFAR-10": (published.iddpm_cifar10, 32, RESCALED, "legacy"),
    "improved ImageNet 64": (published.iddpm_imagenet64, 64, RESCALED, "legacy"),
    "improved ImageNet 64 by class": (lambda: published.iddpm_imagenet64(1000), 64, COSINE, "legacy"),
    "improved LSUN": (published.iddpm_lsun256, 256, schedules.linear(), "legacy"),
}


@lru_cache
def unfilled(config: UNetConfig) -> dict[str, Tensor]:
    return on_meta(lambda: UNet(config))


def alone(folder: Path, config: UNetConfig, order: Order | None, beside: dict[str, Any] | None = None) -> Materials:
    """An original file of such a network that has no numbers, only names and shapes."""
    if beside is not None:
        (folder / "config.json").write_text(json.dumps(beside))
    entries = port(config) if config.freq_shift == 1 else adm(config, order)
    original = FAMILY.original
    assert original is not None
    return read_original(folder / "model.pt", restored(unfilled(config), entries), original, None)


@pytest.mark.parametrize("name", ROWS)
def test_published_files_say_all_by_their_shapes(name: str, tmp_path: Path) -> None:
    make, side, schedule, order = ROWS[name]
    config = make()
    materials = alone(tmp_path, config, order)
    facts = FAMILY.facts(materials, Asked())
    assert (facts["size"], facts["process"].schedule) == ((side, side), schedule)
    assert facts["process"].prediction is Prediction.EPSILON and facts["variance"] == "learned"
    assert (facts["sampling"].sampler, facts["sampling"].clip) == ("ddpm", 1.0)
    assert (len(facts["classes"].names) if facts["classes"] else None) == config.num_class_embeds
    read = UNetConfig.from_config(materials.parts["unet"].config)
    assert read.plan() == replace(config, dropout=0.0).plan() and read.sample_size == side
    assert materials.parts["unet"].tensors.keys() == unfilled(config).keys()
    rows = sections({}, {})["unet"].rows
    assert rows and rows(materials.parts["unet"].config) == adm(config, order)
    assert FAMILY.licence(materials) == "MIT"


@pytest.mark.parametrize(("make", "side"), [(published.ddpm_cifar10, 32), (published.ddpm_256, 256)])
def test_published_ports_say_all_by_their_shapes(make: Callable[[], UNetConfig], side: int, tmp_path: Path) -> None:
    facts = FAMILY.facts(alone(tmp_path, make(), None), Asked())
    assert (facts["size"], facts["process"].schedule) == ((side, side), schedules.linear())
    assert (facts["sampling"].variance, facts["sampling"].steps, facts["variance"]) == ("large", 1000, "fixed")


def test_a_size_alone_beside_a_published_file_leaves_its_heads(tmp_path: Path) -> None:
    materials = alone(tmp_path, published.adm_256(), "legacy", {"sample_size": 128})
    assert FAMILY.facts(materials, Asked())["size"] == (128, 128)
    read = UNetConfig.from_config(materials.parts["unet"].config)
    assert read.plan() == published.adm_256().plan()


def test_unknown_shapes_need_a_word_beside_them(tmp_path: Path) -> None:
    """What to put there is said: heads, then the schedule, then the size; an order that there is not is refused."""
    with pytest.raises(InputError, match=r"model\.pt.*config\.json .*attention_head_dim or num_attention_heads"):
        alone(tmp_path, reference.IMPROVED, "legacy")
    heads = {"num_attention_heads": 4}
    with pytest.raises(InputError, match=r"put its scheduler_config\.json beside it"):
        FAMILY.facts(alone(tmp_path, reference.IMPROVED, "legacy", heads), Asked())
    reference.stated(tmp_path, heads, {"_class_name": "DDPMScheduler"})
    with pytest.raises(InputError, match=r"put sample_size in config\.json"):
        FAMILY.facts(alone(tmp_path, reference.IMPROVED, "legacy"), Asked())
    materials = alone(tmp_path, reference.IMPROVED, "legacy", {**heads, "_qkv_order": "old"})
    with pytest.raises(InputError, match="neither legacy nor new"):
        _ = materials.parts["unet"].tensors


def test_a_folder_made_of_an_improved_ddpm_keeps_its_clock_and_heads(
    rows: list[Row], root: Path, tmp_path: Path
) -> None:
    file = root / "improved" / "model.pt"
    mz.convert(file, tmp_path / "folder", "diffusers")
    with reference.one_noise() as anew:
        first = reference.draw(mz.load(file), "ddpm", 3).latents
        anew()
        assert torch.equal(reference.draw(mz.load(tmp_path / "folder"), "ddpm", 3).latents, first)

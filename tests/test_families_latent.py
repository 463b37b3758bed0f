"""Latent diffusion and DiT, from folder or original file to the picture, against the reference's own pipelines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import on_meta
from networks import relative
from PIL import Image
from torch import Tensor

import mezzotint as mz
from mezzotint.backbones import published_unets as published
from mezzotint.backbones.class_tokens import ClassTokensConfig
from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.backbones.presets import dit as preset
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.checkpoints.keymap import Entry, restored
from mezzotint.checkpoints.layouts.dit import dit
from mezzotint.checkpoints.layouts.text import bert_entries
from mezzotint.checkpoints.layouts.unet import unet
from mezzotint.checkpoints.layouts.vae import vae
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.codec.vq import VQ, VQConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.families.family import Asked, Family
from mezzotint.families.load import gather
from mezzotint.families.materials import Materials, read_original, shapes_of
from mezzotint.families.registry import FAMILIES
from mezzotint.families.steering import class_index
from mezzotint.process import Prediction, Process, schedules
from mezzotint.text.bert import BertConfig, LdmBert

pytest.importorskip("diffusers")
import reference_latent as reference
from parity_rows import Row
from reference_pixels import distance, draw, levels_apart, next_noise, one_noise, opened, run, scheduler, walked

pytestmark = pytest.mark.filterwarnings("ignore:this model reads 75 tokens")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latent")


@pytest.fixture(scope="module")
def rows(root: Path) -> dict[str, Row]:
    return {row.model: row for row in reference.parity(root)}


@pytest.fixture(scope="module")
def folder(rows: dict[str, Row], root: Path) -> Callable[[str], Path]:
    """The checkpoints that `rows` speaks of."""
    return lambda name: root / name


@pytest.fixture(scope="module")
def model(folder: Callable[[str], Path]) -> Callable[[str], Model]:
    """Each of them loaded once."""
    return cache(lambda name: mz.load(folder(name)))


def test_whole_runs_agree_with_the_reference(rows: dict[str, Row]) -> None:
    for name, row in rows.items():
        assert row.backbone is not None and row.backbone < 1e-5, name
        assert row.codec is None or row.codec < 1e-5, name
        assert row.text is None or row.text < 1e-5, name
        assert all(error < 2e-4 for error in row.runs.values()), (name, row.runs)
        assert row.original is None or row.original < 1e-6, name
    assert {len(row.runs) >= 3 for row in rows.values()} == {True}


@pytest.mark.parametrize(
    ("name", "kind", "told", "said"),
    [
        ("ldm-vq", "LDMPipeline", {"batch_size": 2}, {}),
        ("ldm-kl", "LDMPipeline", {"batch_size": 2}, {}),
        (
            "ldm-text",
            "LDMTextToImagePipeline",
            {"prompt": reference.PROMPTS, "guidance_scale": 5.0},
            {"prompt": reference.PROMPTS},
        ),
        ("dit", "DiTPipeline", {"class_labels": [3, 281]}, {"label": [3, 281]}),
    ],
)
def test_pictures_agree_under_the_defaults(
    folder: Callable[[str], Path], name: str, kind: str, told: dict[str, Any], said: dict[str, Any]
) -> None:
    """The folder's own scheduler and, but for the text model whose pipeline starts at 1, its own guidance."""
    model = mz.load(folder(name))
    assert model.contract.sampling.sampler == "ddim" and model.contract.sampling.steps == 50
    with one_noise() as anew:
        theirs = run(opened(kind, folder(name)), num_inference_steps=4, **told)
        anew()
        ours = reference.several(model, "ddim", 4, said)
    assert levels_apart(ours.images, theirs.images) <= 1


@pytest.mark.parametrize(
    ("name", "said", "other"),
    [
        ("ldm-text", {"prompt": "a crack", "guidance": 5.0}, {"prompt": "a cell", "guidance": 5.0}),
        ("ldm-text", {"prompt": "a crack", "guidance": 5.0}, {"prompt": "a crack", "guidance": 1.0}),
        ("ldm-text", {"prompt": "a crack", "guidance": 5.0},
         {"prompt": "a crack", "guidance": 5.0, "negative": "dark cells"}),
        ("dit", {"label": 3}, {"label": 281}),
        ("dit", {"label": 3}, {"label": 3, "guidance": 1.0}),
        ("dit", {"label": 3}, {"label": 3, "negative": "tabby cat"}),
        ("ldm-class/model.safetensors", {"label": 1}, {"label": 2}),
        ("ldm-class/model.safetensors", {"label": 1}, {}),
    ],
)  # fmt: skip
def test_what_steers_a_model_can_be_seen(
    model: Callable[[str], Model], name: str, said: dict[str, Any], other: dict[str, Any]
) -> None:
    """Agreement to 1e-6 means something: what is asked for moves the latents a thousand times further."""
    with one_noise() as anew:
        first = draw(model(name), "ddim", 3, **said).latents
        anew()
        assert distance(draw(model(name), "ddim", 3, **other).latents, first) > 1e-3


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("name", ["ldm-vq", "ldm-kl"])
def test_image_to_image_agrees(
    folder: Callable[[str], Path], model: Callable[[str], Model], name: str, sampler: str
) -> None:
    """The reference has no such pipeline; its schedulers, network and autoencoder entered half way make one."""
    pipeline = opened("LDMPipeline", folder(name))
    values = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    picture = Image.fromarray(values.numpy())
    with one_noise() as anew, torch.no_grad():
        encoded = pipeline.vqvae.encode((values.permute(2, 0, 1)[None].float() / 127.5 - 1).repeat(2, 1, 1, 1))
        known = encoded.latents if name == "ldm-vq" else encoded.latent_dist.mean * reference.SCALE
        theirs = walked(
            lambda x, t: pipeline.unet(x, t).sample, scheduler(sampler, folder(name)),
            next_noise(model(name).codec.channels, reference.SIDE), 10, known, strength=0.6,
        )  # fmt: skip
        anew()
        ours = draw(model(name), sampler, 10, image=picture, strength=0.6).latents
    assert distance(ours, theirs) < 2e-4


def test_scales_of_latents(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As the folder says; 1 where a folder of codes is silent, as the published ones are; as a file carries it."""
    assert mz.load(folder("ldm-kl")).contract.latent.scale == reference.SCALE
    assert mz.load(folder("ldm-kl-file") / "model.safetensors").contract.latent.scale == pytest.approx(reference.SCALE)
    assert mz.load(folder("ldm-vq-file") / "model.safetensors").contract.latent.scale == 1.0
    shutil.copytree(folder("ldm-vq"), tmp_path / "silent")
    at = tmp_path / "silent" / "vqvae" / "config.json"
    config = json.loads(at.read_text())
    del config["scaling_factor"]
    at.write_text(json.dumps(config))
    assert mz.load(tmp_path / "silent").contract.latent.scale == 1.0


@pytest.mark.parametrize("label", ["tench", "Tinca tinca", "tabby cat", "crane", "class 5"])
def test_classes_by_name_as_the_reference_reads_them(
    folder: Callable[[str], Path], model: Callable[[str], Model], label: str
) -> None:
    """Synonyms between commas; of two classes of one name the last."""
    classes = model("dit").contract.classes
    assert classes is not None
    assert [class_index(classes, label)] == opened("DiTPipeline", folder("dit")).get_label_ids([label])
    assert class_index(classes, "tench, Tinca tinca") == 0 and class_index(classes, None) == 1000


def test_an_unknown_class_is_answered_in_a_line(model: Callable[[str], Model]) -> None:
    for label in ("tabi cat", 1001):
        with pytest.raises(InputError) as caught:
            mz.generate(model("dit"), mz.Request(label=label, steps=2))
        assert len(str(caught.value)) < 250
    with pytest.raises(InputError, match="did you mean 'tabby cat'"):
        mz.generate(model("dit"), mz.Request(label="tabi cat", steps=2))


def test_a_dit_of_the_older_class_opens(folder: Callable[[str], Path], tmp_path: Path) -> None:
    once = mz.load(reference.renamed_class(folder("dit"), tmp_path / "once"))
    assert reference.apart(mz.load(folder("dit")), once, "dpmpp_2m", 4, {"label": 3}) == 0.0


def test_the_authors_numbers_of_a_dit_can_be_had(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """A file is read as the reference reads its folder, or as its authors do where a config.json says so."""
    path = reference.original_transformer(folder("dit"), tmp_path / "file", **reference.AUTHORS)
    x, t, label = reference.latent_noise(4), torch.tensor([17.0, 803.0]), torch.tensor([3, 1000])
    with torch.no_grad():
        theirs = reference.authors_network(path)(x, t, label)
        own = mz.load(path).backbone(x, t, Conditioning(label=label))
        usual = mz.load(folder("dit-file") / "model.pt").backbone(x, t, Conditioning(label=label))
    assert relative(own, theirs) < 1e-5 < 1e-3 < relative(usual, theirs)


def test_a_dit_alone_asks_for_its_autoencoder(folder: Callable[[str], Path], tmp_path: Path) -> None:
    reference.stated(tmp_path / "alone", {"num_attention_heads": 2}, None)
    path = shutil.copy(folder("dit-file") / "model.pt", tmp_path / "alone" / "model.pt")
    with pytest.raises(InputError, match=r"vae.*--parts"):
        mz.load(path)
    shutil.copytree(folder("dit") / "vae", tmp_path / "parts" / "vae")
    (tmp_path / "parts" / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    model = mz.load(path, parts=tmp_path / "parts")
    assert reference.apart(mz.load(folder("dit")), model, "ddim", 3, {"label": 3}) < 1e-6
    (tmp_path / "parts" / "config.json").unlink()
    with pytest.raises(InputError, match="no DiT of width 32"):
        mz.load(path, parts=tmp_path / "parts")


def test_unknown_shapes_need_a_word_beside_them(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = shutil.copy(folder("ldm-vq-file") / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="attention_head_dim"):
        mz.load(path)
    reference.stated(tmp_path, {"attention_head_dim": 16}, None)
    with pytest.raises(InputError, match=r"scheduler_config\.json"):
        mz.load(path)


# The published files, on the meta device


def tiny_stage(kind: str) -> dict[str, Tensor]:
    config = VQConfig(**reference.STAGES) if kind == "vq" else KLVAEConfig(**reference.DEEPER, latent_channels=4)
    network = on_meta(lambda: VQ(config) if isinstance(config, VQConfig) else KLVAE(config))
    return under(reference.STAGE, network, vae(config))


def under(prefix: str, tensors: Mapping[str, Tensor], rows: list[Entry]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in restored(tensors, rows).items()}


def whole(config: UNetConfig | ConditionalUNetConfig, kind: str) -> dict[str, Tensor]:
    return under(reference.UNET, on_meta(lambda: UNet(config)), unet(config)) | tiny_stage(kind)


def recognised(tensors: Mapping[str, Tensor], folder: Path) -> tuple[Family, Materials]:
    """The family that claims these names and shapes, and the parts it finds."""
    shapes = shapes_of(tensors)
    family = next(f for f in FAMILIES.values() if f.original and f.original.fits(shapes))
    assert family.original is not None
    return family, read_original(folder / "model.ckpt", tensors, family.original, None)


def table(start: float, end: float) -> Process:
    return Process(schedules.scaled_linear(start, end), Prediction.EPSILON)


@pytest.mark.parametrize(
    ("config", "kind", "process"),
    [
        (published.ldm4_uncond(), "vq", table(0.0015, 0.0195)),
        (published.ldm8_churches(), "kl", table(0.0015, 0.0155)),
    ],
    ids=["LDM-4", "churches"],
)
def test_published_files_without_condition(config: UNetConfig, kind: str, process: Process, tmp_path: Path) -> None:
    carried = {"scale_factor": torch.tensor(0.22765929)} if kind == "kl" else {}
    family, materials = recognised(whole(config, kind) | carried, tmp_path)
    facts = family.facts(materials, Asked())
    assert (family.name, facts["size"], facts["process"]) == ("ldm", (256, 256), process)
    read = UNetConfig.from_config(materials.parts["unet"].config)
    assert read.plan() == replace(config, dropout=0.0).plan()
    assert materials.config("vae", "scaling_factor") == pytest.approx(1.0 if kind == "vq" else 0.22765929)


def test_published_file_by_class(tmp_path: Path) -> None:
    config = published.ldm4_cin256()
    rows = {f"{reference.TEXT}embedding.weight": torch.empty(1001, 512, device="meta")}
    family, materials = recognised(whole(config.unet, "vq") | rows, tmp_path)
    facts = family.facts(materials, Asked())
    assert (family.name, facts["size"], facts["process"]) == ("ldm-classes", (256, 256), table(0.0015, 0.0195))
    assert (len(facts["classes"].names), facts["classes"].null) == (1000, 1000)
    read = ClassTokensConfig.from_config(materials.parts["unet"].config)
    assert read.unet.plan() == config.unet.plan() and read.classes == 1001


def test_published_file_by_text(tmp_path: Path) -> None:
    bert = BertConfig()
    words = under(reference.TEXT, on_meta(lambda: LdmBert(bert)), bert_entries({"encoder_layers": 32}))
    family, materials = recognised(whole(published.ldm8_text2img(), "kl") | words, tmp_path)
    facts = family.facts(materials, Asked())
    assert (family.name, facts["size"], facts["process"]) == ("ldm-text", (256, 256), table(0.00085, 0.012))
    read = ConditionalUNetConfig.from_config(materials.parts["unet"].config)
    assert read.plan() == published.ldm8_text2img().plan()
    assert BertConfig.from_config(materials.parts["text_encoder"].config) == bert
    assert materials.config("vae", "scaling_factor") == 0.18215


@pytest.mark.parametrize(("name", "side"), [("XL/2", 256), ("XL/2", 512), ("B/4", 256)])
def test_published_dit(name: str, side: int, tmp_path: Path) -> None:
    config = preset(name, 4, 8, 1000, side // 8)
    family, materials = recognised(restored(on_meta(lambda: DiT(config)), dit(config)), tmp_path)
    facts = family.facts(materials, Asked())
    assert (family.name, facts["size"]) == ("dit", (side, side))
    assert facts["process"] == Process(schedules.linear(), Prediction.EPSILON)
    assert (facts["classes"].null, len(facts["classes"].names), facts["variance"]) == (1000, 1000, "learned")
    assert (facts["guidance"].scale, facts["sampling"].clip) == (4.0, None)
    assert DiTConfig.from_config(materials.parts["transformer"].config) == config


def test_each_layout_is_known_for_what_it_is(folder: Callable[[str], Path]) -> None:
    names = {
        "ldm-vq": "ldm", "ldm-kl-file/model.safetensors": "ldm", "ldm-text": "ldm-text",
        "ldm-text-file/model.safetensors": "ldm-text", "ldm-class/model.safetensors": "ldm-classes", "dit": "dit",
        "dit-file/model.pt": "dit",
    }  # fmt: skip
    assert {name: gather(folder(name))[0].name for name in names} == names


def test_a_folder_of_codes_becomes_a_file_and_stays_one_model(
    folder: Callable[[str], Path], model: Callable[[str], Model], tmp_path: Path
) -> None:
    mz.convert(folder("ldm-vq"), tmp_path / "model.safetensors", "single-file")
    assert reference.apart(model("ldm-vq"), mz.load(tmp_path / "model.safetensors"), "ddim", 2, {}) == 0.0

"""The first step of training every family, against the networks, codecs and schedulers of the reference library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_flux2
import reference_latent
import reference_pixels
import reference_sd
import reference_sd35
import reference_sdxl
import torch
import torch.nn.functional as F
from networks import relative
from PIL import Image, ImageOps
from reference_variational import step_cost
from torch import Tensor

import mezzotint as mz
from mezzotint.data import metadata
from mezzotint.data.manifest import manifest
from mezzotint.errors import InputError
from mezzotint.families.native import identified
from mezzotint.training import finish, loop, recipe
from mezzotint.training.methods import Batch, Place
from mezzotint.training.methods.full import Full

CAPTIONS = ("a crack on the cell", "", "the dark area", "a crack on the cell")
SEED, LARGER = 3, 3  # every image but the first is larger than what is trained on: LARGER times as wide, twice as high
Reference = tuple[Tensor, Tensor]  # clean (B, C, h, w), loss


@dataclass(frozen=True)
class Seen:
    """What the reference is told of a batch: read from the files, not from us."""

    pixels: Tensor  # (B, 3, H, W) in [-1, 1]
    mask: Tensor  # (B, 1, H, W) of zeros and ones
    prompts: list[str]
    numbers: (
        Tensor  # (B, 6) SDXL's: height and width of the file, top and left of the cut, height and width in training
    )
    noise: Tensor
    t: Tensor
    label: Tensor | None


@dataclass(frozen=True)
class Case:
    """A checkpoint, and the loss of a batch by the reference."""

    write: Callable[[Path], Path]
    loss: Callable[[Path, Seen], Reference]
    side: int = 32
    base: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Any] = field(default_factory=dict)


# Data.


@cache
def pictures(root: Path, side: int) -> Path:
    folder = root / f"pictures_{side}"
    folder.mkdir()
    rows: list[dict[str, Any]] = []
    for i, caption in enumerate(CAPTIONS):
        rng = np.random.default_rng(i)
        width, height = (side, side) if i == 0 else (LARGER * side, 2 * side)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[height // 4 : height // 2, width // 3 : width // 3 + height // 2] = 255
        Image.fromarray(mask).save(folder / f"mask{i}.png")
        rows.append({"file_name": f"{i}.png", "text": caption, "label": i, "mask": f"mask{i}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def seen(folder: Path, side: int, batch: Batch, prompts: list[str]) -> Seen:
    pixels: list[Tensor] = []
    masks: list[Tensor] = []
    numbers: list[list[int]] = []
    for i, flip in zip(batch["index"].tolist(), batch["flip"].tolist(), strict=True):
        picture = Image.open(folder / f"{i}.png").convert("RGB")
        fitted = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
        mask = ImageOps.fit(Image.open(folder / f"mask{i}.png"), (side, side), Image.Resampling.BOX)
        row, where = torch.from_numpy(np.array(fitted)).permute(2, 0, 1), torch.from_numpy(np.array(mask))[None]
        pixels.append((row.float() / 127.5 - 1).flip([2] if flip else []))
        masks.append((where >= 128).float().flip([2] if flip else []))
        scaled = round(picture.width * side / picture.height)
        numbers.append([picture.height, picture.width, 0, (scaled - side) // 2, side, side])
    return Seen(
        torch.stack(pixels), torch.stack(masks), prompts, torch.tensor(numbers, dtype=torch.float32), batch["noise"],
        batch["t"], batch.get("label"),
    )  # fmt: skip


# The reference's loss, a family each.


def table(folder: Path, **told: Any) -> Any:
    """The scheduler that the reference trains under, from a folder's file."""
    from diffusers import DDPMScheduler

    said = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return DDPMScheduler.from_config(said, **told)


def target(schedule: Any, clean: Tensor, at: Seen) -> Tensor:
    if schedule.config.prediction_type == "epsilon":
        return at.noise
    assert schedule.config.prediction_type == "v_prediction"
    return schedule.get_velocity(clean, at.noise, at.t)


def clip_tokens(pipeline: Any, prompts: list[str]) -> Tensor:
    ids = pipeline.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return pipeline.text_encoder(ids.input_ids)[0]


def stable_diffusion(folder: Path, at: Seen, kind: str = "StableDiffusionPipeline", **told: Any) -> Reference:
    pipeline, schedule = reference_sdxl.opened(folder, kind), table(folder, **told)
    vae = pipeline.vae

    def encoded(pixels: Tensor) -> Tensor:
        return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor

    clean = encoded(at.pixels)
    x = schedule.add_noise(clean, at.noise, at.t)
    if pipeline.unet.config.in_channels == 9:
        cells = F.interpolate(at.mask, clean.shape[-2:])
        x = torch.cat((x, cells, encoded(at.pixels * (at.mask < 0.5))), dim=1)
    raw = pipeline.unet(x, at.t, clip_tokens(pipeline, at.prompts)).sample
    return clean, F.mse_loss(raw, target(schedule, clean, at))


def sdxl(folder: Path, at: Seen) -> Reference:
    pipeline, schedule = reference_sdxl.opened(folder), table(folder)
    clean = pipeline.vae.encode(at.pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    tokens, _, pooled, _ = pipeline.encode_prompt(at.prompts, do_classifier_free_guidance=False)
    said = torch.tensor([float(prompt != "") for prompt in at.prompts])  # as the pipeline's negative branch
    more = {"text_embeds": pooled * said[:, None], "time_ids": at.numbers}
    x = schedule.add_noise(clean, at.noise, at.t)
    raw = pipeline.unet(x, at.t, tokens * said[:, None, None], added_cond_kwargs=more).sample
    return clean, F.mse_loss(raw, target(schedule, clean, at))


def sd35(folder: Path, at: Seen) -> Reference:
    pipeline = reference_sd35.opened(folder)
    config = pipeline.vae.config
    clean = (pipeline.vae.encode(at.pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    with reference_sd35.quiet():
        tokens, _, pooled, _ = pipeline.encode_prompt(at.prompts, None, None, do_classifier_free_guidance=False)
    sigma = (at.t / pipeline.scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    raw = pipeline.transformer((1 - sigma) * clean + sigma * at.noise, tokens, pooled, at.t).sample
    return clean, F.mse_loss(raw, at.noise - clean)


def flux2(folder: Path, at: Seen) -> Reference:
    pipeline = reference_flux2.opened(folder)
    clean = reference_flux2.to_backbone(pipeline, pipeline.vae.encode(at.pixels).latent_dist.mode())
    tokens = reference_flux2.encoded(folder, tuple(at.prompts))
    sigma = (at.t / 1000).view(-1, 1, 1, 1)
    x = (1 - sigma) * clean + sigma * at.noise
    scale = torch.full((len(x),), 3.5) if pipeline.transformer.config.guidance_embeds else None
    raw = pipeline.transformer(
        hidden_states=pipeline._pack_latents(x), timestep=at.t / 1000, guidance=scale, encoder_hidden_states=tokens,
        txt_ids=pipeline._prepare_text_ids(tokens), img_ids=pipeline._prepare_latent_ids(x),
    ).sample.transpose(1, 2).unflatten(-1, x.shape[-2:])  # fmt: skip
    return clean, F.mse_loss(raw, at.noise - clean)


def dit(folder: Path, at: Seen) -> Reference:
    """With the bound on the variance, as the authors add it: a thousandth of a sum over a thousand steps."""
    pipeline, schedule = reference_pixels.opened("DiTPipeline", folder), table(folder)
    clean = pipeline.vae.encode(at.pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    x = schedule.add_noise(clean, at.noise, at.t)
    raw = pipeline.transformer(x, at.t, class_labels=at.label).sample
    cost = step_cost(schedule.alphas_cumprod, raw, clean, x, at.t)
    return clean, F.mse_loss(raw[:, :4], at.noise) + cost.mean()


def pixels(folder: Path, at: Seen) -> Reference:
    pipeline, schedule = reference_pixels.opened("DDPMPipeline", folder), table(folder)
    raw = pipeline.unet(schedule.add_noise(at.pixels, at.noise, at.t), at.t).sample
    loss = F.mse_loss(raw[:, :3], at.noise)
    if raw.shape[1] == 6:
        x = schedule.add_noise(at.pixels, at.noise, at.t)
        loss = loss + step_cost(schedule.alphas_cumprod, raw, at.pixels, x, at.t).mean()
    return at.pixels, loss


def latent_diffusion(folder: Path, at: Seen) -> Reference:
    pipeline, schedule = reference_pixels.opened("LDMPipeline", folder), table(folder)
    encoded = pipeline.vqvae.encode(at.pixels)
    mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    clean = mean * pipeline.vqvae.config.scaling_factor
    raw = pipeline.unet(schedule.add_noise(clean, at.noise, at.t), at.t).sample
    return clean, F.mse_loss(raw, at.noise)


def latent_diffusion_by_text(folder: Path, at: Seen) -> Reference:
    pipeline, schedule = reference_pixels.opened("LDMTextToImagePipeline", folder), table(folder)
    clean = pipeline.vqvae.encode(at.pixels).latent_dist.mode() * pipeline.vqvae.config.scaling_factor
    ids = pipeline.tokenizer(at.prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    tokens = pipeline.bert(ids.input_ids)[0]
    raw = pipeline.unet(schedule.add_noise(clean, at.noise, at.t), at.t, tokens).sample
    return clean, F.mse_loss(raw, at.noise)


# Checkpoints.


def second_single(root: Path) -> Path:
    """A single file, which does not say what the network predicts; the reference is shown the folder beside it."""
    file = root / "second.safetensors"
    if not file.exists():
        reference_sd.saved(reference_sd.second_file(reference_sd.write_velocity(root)), file)
    return file


def first_single(root: Path) -> Path:
    file = root / "first.safetensors"
    if not file.exists():
        reference_sd.saved(reference_sd.first_file(reference_sd.write_plain(root)), file)
    return file


def apart(root: Path) -> Path:
    """Stable Diffusion XL's folders have the names of others."""
    (root / "xl").mkdir(exist_ok=True)
    return root / "xl"


@cache
def sd35_folder(folder: Path) -> Path:
    return reference_sd35.write(folder, reference_sd35.MEDIUM)


@cache
def flux2_folder(root: Path, kind: str) -> Path:
    return reference_flux2.write(root / kind, kind)


def small_pixels(root: Path, name: str, options: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Path:
    folder = root / name
    return folder if folder.exists() else reference_pixels.tiny_folder(folder, options, scheduler)


TEXT = {"text": {"dropout": 0.3}}
INPAINT = {**TEXT, "inpaint": {"source": "file"}}
LABELS = {"classes": {"dropout": 0.3}}
TOLD = {"train_distilled": True}
LEARNED = {**reference_pixels.PLAIN, "out_channels": 6}
CASES = {
    "Stable Diffusion 1": Case(reference_sd.write_plain, stable_diffusion, tables=TEXT),
    "Stable Diffusion 1, velocity": Case(
        first_single,
        lambda file, at: stable_diffusion(file.parent / "plain", at, prediction_type="v_prediction"),
        base={"prediction": "velocity"},
        tables=TEXT,
    ),
    "Stable Diffusion 1 inpainting": Case(
        reference_sd.write_inpainting,
        lambda folder, at: stable_diffusion(folder, at, "StableDiffusionInpaintPipeline"),
        tables=INPAINT,
    ),
    "Stable Diffusion 2": Case(
        second_single,
        lambda file, at: stable_diffusion(file.parent / "velocity", at),
        base={"prediction": "velocity"},
        tables=TEXT,
    ),
    "Stable Diffusion XL": Case(lambda root: reference_sdxl.write_base(apart(root)), sdxl, tables=TEXT),
    "Stable Diffusion XL, velocity": Case(lambda root: reference_sdxl.write_velocity(apart(root)), sdxl, tables=TEXT),
    "Stable Diffusion 3.5": Case(
        lambda root: sd35_folder(root / "sd35"),
        sd35,
        tables=TEXT,
    ),
    "FLUX.2 klein base": Case(
        lambda root: flux2_folder(root, reference_flux2.BASE), flux2, side=64, tables=TEXT
    ),
    "FLUX.2 klein distilled": Case(
        lambda root: flux2_folder(root, reference_flux2.DISTILLED), flux2, side=64, base=TOLD, tables=TEXT
    ),
    "FLUX.2 dev": Case(
        lambda root: flux2_folder(root, reference_flux2.DEV), flux2, side=64, base=TOLD,
        tables={**TEXT, "loss": {"guidance": 3.5}},
    ),
    "DiT": Case(lambda root: reference_latent.transformer(root / "dit"), dit, tables=LABELS),
    "DDPM": Case(
        lambda root: small_pixels(root, "ddpm", reference_pixels.PLAIN, reference_pixels.HO), pixels, side=8
    ),
    "Improved DDPM": Case(
        lambda root: small_pixels(root, "iddpm", LEARNED, reference_pixels.COSINE), pixels, side=8
    ),
    "Latent diffusion, codes": Case(
        lambda root: reference_latent.unconditional(root / "vq", "vq"), latent_diffusion
    ),
    "Latent diffusion": Case(lambda root: reference_latent.unconditional(root / "kl", "kl"), latent_diffusion),
    "Latent diffusion by text": Case(
        lambda root: reference_latent.by_text(root / "text"), latent_diffusion_by_text, side=64, tables=TEXT
    ),
}  # fmt: skip


# Tests.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def content(base: Path, folder: Path, out: Path, case: Case) -> dict[str, Any]:
    return {
        "method": "full", "out": str(out), "steps": 2, "batch": 4, "threads": 1, "seed": SEED, "log_every": 1,
        "base": {"path": str(base), **case.base},
        "data": {"folder": str(folder), "size": [case.side, case.side], "flips": ["horizontal"]}, **case.tables,
    }  # fmt: skip


def job(plan: recipe.Recipe) -> Full:
    return Full(plan, Place(Path(plan.out), torch.device("cpu"), lambda *_: None))


@pytest.mark.parametrize("name", CASES)
def test_the_first_step_is_the_reference_s_and_the_result_generates(place: Path, tmp_path: Path, name: str) -> None:
    """Clean latents and loss to rounding; what is saved loads, keeps its family, says where it is from, and draws."""
    case = CASES[name]
    base, folder = case.write(place), pictures(place, case.side)
    plan = recipe.check(content(base, folder, tmp_path / "run", case), "test")
    made = job(plan)
    batch = made.draw(0)
    captions = made.core.captions
    prompts = [captions.distinct[row] for row in batch["caption"].tolist()] if captions else []
    with torch.no_grad():
        clean, expected = case.loss(base, seen(folder, case.side, batch, prompts))
    assert relative(batch["clean"], clean) < 2e-5
    if captions:
        assert "" in prompts and len(set(prompts)) > 1  # dropped and not

    losses: list[float] = []
    watch = loop.Watch(step=lambda step, total, loss: losses.append(loss))
    assert loop.train(plan, watch=watch).finished and len(losses) == 2
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)

    model = mz.load(tmp_path / "run" / "model")
    before, contract = identified(mz.load(base, prediction=case.base.get("prediction"))).contract, model.contract
    assert contract.family == before.family and contract.process == before.process
    assert contract.latent == before.latent and contract.text == before.text and contract.classes == before.classes
    assert contract.guidance.distilled == before.guidance.distilled and contract.picture == before.picture
    assert contract.weights != before.weights and contract.licence == before.licence
    lineage = contract.lineage
    assert lineage.base == before.weights and lineage.dataset == manifest(folder, metadata.read(folder)).digest
    assert (lineage.recipe, lineage.seed, lineage.steps) == (finish.digest(plan), SEED, 2)
    request: dict[str, Any] = {"steps": 2, "width": case.side, "height": case.side}
    if contract.inpaint:
        picture = Image.open(folder / "0.png")
        request |= {"image": picture, "mask": Image.open(folder / "mask0.png")}
    if model.text:
        request["prompt"] = CAPTIONS[0]
    if contract.classes:
        request["label"] = 3
    drawn = mz.generate(model, mz.Request(**request))
    assert drawn.latents.isfinite().all() and len(drawn.images) == 1


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "text" in case.tables])
def test_pain_11_training_reads_a_prompt_as_generation_does(place: Path, tmp_path: Path, name: str) -> None:
    """The same tokens, mask and pooled vector for a prompt and for none."""
    case = CASES[name]
    base, folder = case.write(place), pictures(place, case.side)
    made = job(recipe.check(content(base, folder, tmp_path / "run", case), "test"))
    batch = made.draw(0)
    model = made.core.model
    told: list[Any] = []
    model.backbone.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    picture: dict[str, Any] = {"image": Image.open(folder / "0.png"), "mask": Image.open(folder / "mask0.png")}
    guided = not model.contract.guidance.distilled
    mz.generate(
        model,
        mz.Request(
            prompt=CAPTIONS[0], steps=1, width=case.side, height=case.side, guidance=2.0 if guided else None,
            **(picture if model.contract.inpaint else {}),
        ),
    )  # fmt: skip
    captions = made.core.captions
    assert captions is not None
    rows = captions.places([CAPTIONS[0], ""] if guided else [CAPTIONS[0]])
    whole = {key: value[: len(rows)] for key, value in batch.items()} | {"caption": rows}
    expected, found = made.core.conditioning(whole), told[0]
    for part in ("tokens", "mask", "pooled"):
        ours, theirs = getattr(expected, part), getattr(found, part)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.shape == theirs.shape and relative(ours.float(), theirs.float()) < 2e-6), part


def test_pain_02_a_single_file_that_says_velocity_trains_as_velocity(place: Path, tmp_path: Path) -> None:
    """Nobody asks for it: the file's own mark is enough, and another word is refused."""
    marked = place / "marked" / "first.safetensors"
    marked.parent.mkdir()
    plain = reference_sd.write_plain(place)
    reference_sd.saved(reference_sd.first_file(plain) | {"v_pred": torch.zeros(0)}, marked)
    case, folder = CASES["Stable Diffusion 1, velocity"], pictures(place, 32)
    silent = content(marked, folder, tmp_path / "run", case) | {"base": {"path": str(marked)}}
    made = job(recipe.check(silent, "test"))
    batch = made.draw(0)
    captions = made.core.captions
    assert captions is not None
    prompts = [captions.distinct[row] for row in batch["caption"].tolist()]
    with torch.no_grad():
        at = seen(folder, case.side, batch, prompts)
        right, wrong = (stable_diffusion(plain, at, prediction_type=kind)[1] for kind in ("v_prediction", "epsilon"))
        found = made.loss(batch, 0)[0].item()
    assert found == pytest.approx(right.item(), rel=1e-5) and found != pytest.approx(wrong.item(), rel=1e-2)
    wrongly = silent | {"base": {"path": str(marked), "prediction": "epsilon"}}
    with pytest.raises(InputError, match=r"velocity in .*first\.safetensors, but epsilon was asked for"):
        job(recipe.check(wrongly, "test"))


def test_pain_05_training_shifts_latents_as_generation_does(place: Path, tmp_path: Path) -> None:
    """(mean - shift) scale of the reference's encoder; without the shift it would be far off."""
    case = CASES["Stable Diffusion 3.5"]
    base, folder = case.write(place), pictures(place, case.side)
    made = job(recipe.check(content(base, folder, tmp_path / "run", case), "test"))
    batch = made.draw(0)
    vae = reference_sd35.opened(base).vae
    with torch.no_grad():
        mean = vae.encode(seen(folder, case.side, batch, []).pixels).latent_dist.mode()
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    assert shift and relative(batch["clean"], (mean - shift) * scale) < 2e-5
    assert (batch["clean"] - mean * scale).abs().mean() == pytest.approx(shift * scale, rel=1e-3)


@pytest.mark.parametrize("name", ["FLUX.2 klein distilled", "FLUX.2 dev"])
def test_pain_10_distilled_models_train_only_when_told(place: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base, folder = case.write(place), pictures(place, case.side)
    plan = content(base, folder, tmp_path / "run", case)
    plan["base"] = {"path": str(base)}
    with pytest.raises(InputError, match=r"is a distilled model(.|\n)*base\.train_distilled = true"):
        job(recipe.check(plan, "test"))
    assert not (tmp_path / "run").exists()

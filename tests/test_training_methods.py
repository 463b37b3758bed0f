"""Methods learn what they are for, and a run leaves behind what it promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from training_parts import KL_VAE, SIZE, full_recipe, image_folder, vae_recipe

from mezzotint import families
from mezzotint.conditioning import Conditioning
from mezzotint.contract import read_contract
from mezzotint.errors import InputError
from mezzotint.process import Process
from mezzotint.text.encoder import Reading
from mezzotint.training import loop, metrics, parts, recipe
from mezzotint.training.codecs import read_codec, write_codec
from mezzotint.training.methods import Place
from mezzotint.training.methods.full import Full


def train(plan: dict[str, Any], resume: bool = False) -> list[metrics.Record]:
    outcome = loop.train(recipe.check(plan, "test"), resume)
    assert outcome.finished
    return [
        record for record in metrics.read(outcome.folder) if record["step"]
    ]  # without the look before the first step


CALM = {"rate": 3e-3, "warmup": 5, "decay": 0.0}
STILL = {"dropout": 0.0}


def test_full_overfits_one_batch(tmp_path: Path) -> None:
    """Four images, seen in full at every step: the loss falls to a small part of what predicting nothing costs."""
    image_folder(tmp_path / "train", 4)
    config = {**full_recipe(tmp_path)["backbone"]["config"], **STILL}
    plan = full_recipe(
        tmp_path, steps=100, optimiser=CALM, backbone={"name": "unet", "config": config}, checkpoints={"every": 1000}
    )
    plan["data"]["flips"] = []
    del plan["inpaint"], plan["validation"]
    losses = [record["loss"] for record in train(plan)]
    assert losses[0] > 0.9
    assert np.mean(losses[-20:]) < 0.3 * losses[0]


def test_vae_overfits_one_batch_with_every_loss(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 4, size=32)
    plan = vae_recipe(tmp_path, steps=50, optimiser={"rate": 4e-3, "warmup": 5}, checkpoints={"every": 1000})
    plan["data"] |= {"size": [32, 32], "validation": str(tmp_path / "train")}
    plan["vae"] |= {"perceptual": 0.1, "discriminator_start": 20, "gradient": 0.5}
    plan |= {"validation": {"every": 25}, "previews": {"every": 50, "count": 2}, "ema": {"decay": 0.9}}
    records = train(plan)
    assert records[0]["loss/distance"] > 2.5 * records[-1]["loss/distance"]
    assert records[0]["loss/perceptual"] > 1.5 * records[-1]["loss/perceptual"]
    assert "loss/discriminator" not in records[10] and records[10]["gradient/discriminator"] == 0
    assert records[30]["loss/discriminator"] > 0 and records[30]["balance"] > 0
    assert records[24]["psnr"] > 20 and records[-1]["psnr"] > 18  # the discriminator asks for more than likeness
    # what was saved is what was measured: PSNR of the loaded codec equals the last record
    codec, _ = read_codec(tmp_path / "run" / "model")
    pixels = torch.stack([
        torch.from_numpy(np.asarray(Image.open(tmp_path / "train" / f"{i}.png")).copy()).float()[None] / 127.5 - 1
        for i in range(4)
    ])  # fmt: skip
    error = ((codec.decode(codec.encode(pixels)) - pixels) / 2).square().mean((1, 2, 3))
    assert float((-10 * error.log10()).mean()) == pytest.approx(records[-1]["psnr"], abs=1e-3)
    latents = codec.encode(pixels)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    sheet = Image.open(tmp_path / "run" / "samples" / "step-00000050.png")
    assert sheet.size == (2 * 34 - 2, 2 * 34 - 2)


def test_a_trained_codec_serves_the_full_method_and_binds_its_cache(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 4)
    train(vae_recipe(tmp_path, "codec", steps=2))
    plan = full_recipe(tmp_path, steps=2, codec={"path": str(tmp_path / "codec" / "model")})
    train(plan)
    model = families.load(tmp_path / "run" / "model")
    codec, _ = read_codec(tmp_path / "codec" / "model")
    assert model.codec.digest() == codec.digest() == model.contract.latent.codec
    torch.manual_seed(5)
    other = replace_weights(codec)
    write_codec(other, tmp_path / "codec" / "model")
    with pytest.raises(InputError, match=f"made with codec {codec.digest()[:16]}, this run has {other.digest()[:16]}"):
        loop.train(recipe.check(plan, "test"), resume=True)


def replace_weights(codec: Any) -> Any:
    from mezzotint.codec import Codec
    from mezzotint.codec.kl_vae import KLVAE

    return Codec(KLVAE(codec.autoencoder.config), codec.space)


def test_a_run_leaves_a_model_that_loads_and_the_recipe_that_reruns_it(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, steps=6, previews={"every": 3, "count": 2, "steps": 2}, licence="MIT")
    plan["data"]["validation"] = plan["data"]["folder"]
    records = train(plan)
    run = tmp_path / "run"
    model = families.load(run / "model")
    contract = read_contract(run / "model")
    assert contract.classes is not None and contract.classes.names == ("sound", "broken") and contract.classes.null == 2
    assert (contract.inpaint, contract.size, contract.guidance.dropout) == (1, (SIZE, SIZE), 0.1)
    assert contract.process == Process.from_dict(plan["process"])
    assert (contract.lineage.seed, contract.lineage.steps, contract.licence.weights) == (0, 6, "MIT")
    saved = load_file(run / "checkpoints" / "step-00000006" / "ema.safetensors")
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(saved[name], tensor)
    assert [r["step"] for r in records if "validation" in r] == [6]
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]
    assert {p.name for p in (run / "plots").iterdir()} == {"loss.png", "rate.png", "validation.png"}
    assert list((run / "tensorboard").iterdir())
    assert len(list((run / "checkpoints").iterdir())) == 2
    again = recipe.read(run / "recipe.toml", [f"out={tmp_path / 'again'}"])
    loop.train(again)
    first, second = (load_file(p / "model/unet/diffusion_pytorch_model.safetensors") for p in (run, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_goes_on_from_a_model_under_its_contract(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 4)
    first = full_recipe(tmp_path, "first", steps=2)
    train(first)
    start = tmp_path / "first" / "model"
    plan = full_recipe(tmp_path, "second", steps=1, base={"path": str(start)}, optimiser={"rate": 1e-12})
    del plan["process"], plan["backbone"]  # the base's holds
    train(plan)
    second = read_contract(tmp_path / "second" / "model")
    assert second.lineage.base == read_contract(start).weights and second.process == read_contract(start).process
    old, new = (families.load(path).backbone.state_dict() for path in (start, tmp_path / "second" / "model"))
    assert max((old[k] - new[k]).abs().max().item() for k in old) < 1e-9
    for key, value, message in (
        ("process", {"prediction": "clean", "schedule": {"kind": "rectified_flow"}}, "prediction is 'flow' in .*clean"),
        ("classes", {"names": ["sound", "cracked"]}, "classes is .*broken.* but .*cracked"),
        ("inpaint", {"k": 2}, "inpaint is 1 in .* but 2 in test"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            loop.train(recipe.check({**plan, "out": str(tmp_path / key), key: value}, "test"))
        assert str(start) in str(caught.value)


def test_accumulated_pieces_are_the_batch(tmp_path: Path) -> None:
    """The same seed draws the same batch, however it is divided: gradients agree to rounding."""
    image_folder(tmp_path / "train", 8)
    config = {**full_recipe(tmp_path)["backbone"]["config"], **STILL}
    weights = []
    for pieces in (1, 4):
        plan = full_recipe(
            tmp_path, f"run{pieces}", batch=8, steps=3, accumulation=pieces, backbone={"name": "unet", "config": config}
        )
        records = train(plan)
        weights.append((records, load_file(tmp_path / f"run{pieces}/checkpoints/step-00000003/backbone.safetensors")))
    (one, a), (four, b) = weights
    for ours, theirs in zip(one, four, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient/backbone"] == pytest.approx(theirs["gradient/backbone"], rel=1e-4)
    # Adam divides by the gradient's own size, so a gradient of rounding noise may move by the rate either way
    moved = torch.cat([(a[k] - b[k]).abs().flatten() for k in a])
    assert moved.max() <= 6.1e-4 and moved.median() < 1e-7


def test_bfloat16_trains_on_the_same_numbers(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 4)
    config = {**full_recipe(tmp_path)["backbone"]["config"], **STILL}
    losses = []
    for precision in ("float32", "bfloat16"):
        plan = full_recipe(
            tmp_path, precision, steps=3, precision=precision, backbone={"name": "unet", "config": config}
        )
        losses.append([record["loss"] for record in train(plan)])
        saved = load_file(tmp_path / precision / "model/unet/diffusion_pytorch_model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())  # the weights themselves stay exact
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_step_and_files(tmp_path: Path, value: float, monkeypatch: Any) -> None:
    image_folder(tmp_path / "train", 8)
    true = Full.loss

    def poisoned(self: Full, batch: dict[str, torch.Tensor], step: int) -> Any:
        loss, numbers = true(self, batch, step)
        return (loss * value if step == 4 else loss), numbers

    monkeypatch.setattr(Full, "loss", poisoned)
    plan = recipe.check(full_recipe(tmp_path), "test")
    with pytest.raises(InputError, match=f"the loss is {value} at step 4; the batch was") as caught:
        loop.train(plan)
    job = Full(plan, Place(tmp_path / "run", torch.device("cpu"), lambda *_: None))
    expected = [job.core.images[0].names[i] for i in job.draw(4)["index"].tolist()]
    assert ", ".join(expected) in str(caught.value)
    # what came before is safe and goes on as if nothing had been
    monkeypatch.setattr(Full, "loss", true)
    assert loop.train(plan, resume=True).finished


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 4)
    plan = full_recipe(tmp_path, optimiser={"rate": 1e30, "clip": 1e30, "warmup": 0, "schedule": "constant"})
    with pytest.raises(InputError, match=r"(loss|gradient of the backbone) is (nan|inf) at step [1-9]"):
        loop.train(recipe.check(plan, "test"))


class Words:
    """Two captions and the empty prompt as fixed vectors: the text encoder of a test."""

    width, pooled_width, stands_for_nothing = 8, 8, "encoded"
    networks: ClassVar[dict[str, torch.nn.Module]] = {}

    def readings(self, digests: bool = True) -> tuple[Reading, ...]:
        return (Reading("words", "words" if digests else "", (-1,), 3, "mask", "mean", 8),)

    def encode(self, prompts: Any) -> Conditioning:
        seeds = [sum(prompt.encode()) for prompt in prompts]
        tokens = torch.stack([torch.randn(3, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
        return Conditioning(tokens=tokens, mask=torch.ones(len(seeds), 3, dtype=torch.bool), pooled=tokens.mean(1))


TEXT_UNET = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("text_unet", TEXT_UNET),  # cross-attention to the tokens
        (
            "text_unet",
            {
                **TEXT_UNET, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 8,
                "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"],
                "mid_block_type": "UNetMidBlock2D",
            },
        ),  # the pooled vector alone
    ],
    ids=["cross-attention", "pooled"],
)  # fmt: skip
def test_captions_steer_through_both_paths(
    tmp_path: Path, name: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two captions, two images: after training the right caption explains an image far better than the wrong one."""
    data = tmp_path / "train"
    data.mkdir()
    for i, grey in enumerate((40, 215)):
        Image.fromarray(np.full((SIZE, SIZE), grey, np.uint8)).save(data / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(("dark", "bright"))]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(parts, "encoder", lambda plan: Words())
    plan = full_recipe(
        tmp_path, batch=8, text={"dropout": 0.2}, optimiser={"rate": 4e-3, "warmup": 5, "decay": 0.0}, steps=60,
        backbone={"name": name, "config": config}, loss={"density": "logit_normal", "mean": 1.0},
    )  # fmt: skip
    for key in ("classes", "inpaint", "validation"):
        plan.pop(key)
    plan["data"]["flips"] = []
    job = Full(recipe.check(plan, "test"), Place(tmp_path, torch.device("cpu"), lambda *_: None))
    captions = job.core.captions
    assert captions is not None and captions.distinct == ("", "bright", "dark")
    rows_of = captions.places(["dark", "bright"])
    empty = torch.cat([job.draw(step)["caption"] == 0 for step in range(60)]).float().mean().item()
    assert abs(empty - 0.2) < 0.08
    network = job.trained["backbone"]
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3)
    for step in range(60):
        loss, _ = job.loss(job.draw(step), step)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    batch = job.draw(1000)
    batch["t"] = torch.full_like(batch["t"], 900.0)  # so noisy that the image itself says little
    right = batch | {"caption": rows_of[batch["index"]]}
    wrong = batch | {"caption": 3 - right["caption"]}
    with torch.no_grad():
        found, missed = (job.loss(version, 0)[0].item() for version in (right, wrong))
    assert found < 0.5 * missed


def test_the_real_encoder_is_used_and_kept(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from mezzotint.text import minilm

    try:
        minilm.load_package(8)
    except InputError:
        pytest.skip("the MiniLM package is not installed")
    image_folder(tmp_path / "train", 4)
    plan = full_recipe(tmp_path, steps=2, text={"length": 8}, backbone={"name": "text_unet", "config": TEXT_UNET})
    for key in ("classes", "inpaint"):
        plan.pop(key)
    train(plan)
    model = families.load(tmp_path / "run" / "model")
    assert model.text is not None and model.contract.text is not None
    (reading,) = model.contract.text.encoders
    assert reading.digest == model.text.readings()[0].digest and reading.length == 8
    assert model.contract.guidance.dropout == 0.1


def test_wrong_parts_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 4)
    good = full_recipe(tmp_path)
    unet = good["backbone"]["config"]
    data = good["data"]
    for change, message in (
        ({"backbone": {"name": "unett", "config": unet}}, "unknown backbone 'unett': did you mean 'unet'"),
        ({"backbone": {"name": "unet", "config": {**unet, "in_channels": 7}}}, "in_channels is 7, but .* make it 3"),
        ({"backbone": {"name": "unet", "config": {**unet, "layer_per_block": 1}}}, "layer_per_block"),
        ({"process": {"prediction": "epsilon", "schedule": {"kind": "rectified_flow"}}}, "does not fit schedule"),
        ({"process": {"prediction": "flwo", "schedule": {"kind": "rectified_flow"}}}, "did you mean 'flow'"),
        ({"codec": {"path": str(tmp_path)}}, "neither an autoencoder folder"),
        ({"inpaint": {"source": "file"}}, "2 of 4 images of .* have no mask, 0.png first"),
        ({"classes": {"names": ["only"]}}, r"2 labels beyond the last class, which is 0 \(1.png, 3.png\)"),
        ({"loss": {"weighting": "snr"}}, "loss.weighting: input should be 'uniform' or 'min_snr', found 'snr'"),
        ({"loss": {"density": "normal"}}, "loss.density: input should be 'uniform' or 'logit_normal'"),
        ({"data": {**data, "folder": str(tmp_path / "absent")}}, "no such training folder"),
        ({"data": {**data, "validation": str(tmp_path)}}, r"has no metadata.jsonl"),
        ({"text": {"encoder": str(tmp_path / "absent")}}, "is not a text encoder"),
    ):
        with pytest.raises(InputError, match=message):
            loop.train(recipe.check({**good, **change, "out": str(tmp_path / "out")}, "test"))
        assert not (tmp_path / "out" / "model").exists()
    bad = vae_recipe(tmp_path, "out")
    with pytest.raises(InputError, match="must be multiples of 2"):
        loop.train(recipe.check({**bad, "data": {**bad["data"], "size": [15, 16]}}, "test"))
    with pytest.raises(InputError, match="unknown autoencoder"):
        loop.train(recipe.check({**bad, "vae": {"name": "vqgan", "config": KL_VAE}}, "test"))

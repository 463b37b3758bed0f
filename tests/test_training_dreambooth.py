"""DreamBooth: the subject's loss and the class's, prior images that the base draws, and nothing of it by accident."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference_adapters import sd1
from reference_sd import both
from safetensors.torch import load_file
from training_parts import full_recipe, image_folder

import mezzotint as mz
from mezzotint import families
from mezzotint.errors import InputError
from mezzotint.training import draws, loop, metrics, recipe, state
from mezzotint.training.methods import Place
from mezzotint.training.methods.dreambooth import DreamBooth

pytest.importorskip("diffusers")
SUBJECT, CLASS = "a photo of sks dog", "a photo of dog"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dreambooth")
    image_folder(found / "pictures", 4, size=32)
    return found


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return sd1(root)


def plan_of(root: Path, base: Path, out: str, **changes: Any) -> dict[str, Any]:
    plan: dict[str, Any] = {
        "method": "dreambooth", "out": str(root / out), "base": {"path": str(base)}, "steps": 4, "batch": 2,
        "threads": 1, "log_every": 1, "data": {"folder": str(base.parent / "pictures"), "size": [32, 32]},
        "dreambooth": {"prompt": SUBJECT, "class_prompt": CLASS, "prior_images": 3, "prior_steps": 2,
                       "prior_guidance": 3.0, "prior_weight": 0.7},
        "text": {"dropout": 0.0}, "optimiser": {"rate": 1e-3}, "checkpoints": {"every": 2},
    }  # fmt: skip
    return plan | changes


def job_of(root: Path, base: Path, out: str, **changes: Any) -> DreamBooth:
    plan = recipe.check(plan_of(root, base, out, **changes), "test.toml")
    return DreamBooth(plan, Place(root / out, torch.device("cpu"), lambda *_: None))


def test_the_loss_is_the_reference_s_for_subject_and_class(tmp_path: Path, base: Path) -> None:
    """mse(subject) + weight mse(class) by the reference's own network, encoder and schedule, on the batch drawn."""
    from diffusers import DDPMScheduler

    job = job_of(tmp_path, base, "run")
    pipeline, _ = both(base)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    batch = job.draw(0)

    def mse(prefix: str, prompt: str) -> torch.Tensor:
        clean, noise, t = (batch[f"{prefix}{key}"] for key in ("clean", "noise", "t"))
        ids = pipeline.tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        tokens = pipeline.text_encoder(ids.input_ids)[0].expand(len(clean), -1, -1)
        noisy = scheduler.add_noise(clean, noise, t)
        return (pipeline.unet(noisy, t, tokens).sample - noise).square().mean()

    with torch.no_grad():
        expected = mse("", SUBJECT) + 0.7 * mse("prior/", CLASS)
        found, numbers = job.loss(batch, 0)
    assert found.item() == pytest.approx(expected.item(), rel=2e-6)
    assert numbers["loss/class"].item() == pytest.approx(mse("prior/", CLASS).item(), rel=2e-6)
    assert not torch.equal(batch["noise"], batch["prior/noise"])


def test_the_base_draws_the_class_and_its_images_are_bound_to_it(tmp_path: Path, base: Path) -> None:
    job_of(tmp_path, base, "run")
    folder = tmp_path / "run" / "prior"
    model = mz.load(base)
    for k in range(3):
        wish = mz.Request(
            prompt=CLASS, seed=draws.number(0, k, "prior image"), steps=2, guidance=3.0, width=32, height=32
        )
        (expected,) = mz.generate(model, wish).images
        drawn = np.asarray(Image.open(folder / f"{k:05d}.png"), dtype=int)
        assert np.abs(drawn - np.asarray(expected, dtype=int)).max() <= 1  # drawn in a batch, or alone
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [CLASS] * 3
    # what is there is kept, what is missing is drawn again and comes out the same
    before = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    (folder / "00001.png").unlink()
    stamp = (folder / "00000.png").stat().st_mtime_ns
    job_of(tmp_path, base, "run")
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == before
    assert (folder / "00000.png").stat().st_mtime_ns == stamp
    changed = plan_of(tmp_path, base, "run")["dreambooth"] | {"prior_guidance": 4.0}
    with pytest.raises(InputError, match=r"drawn with guidance 3.0, this run has 4.0.\nDelete the folder"):
        job_of(tmp_path, base, "run", dreambooth=changed)
    other = plan_of(tmp_path, base, "run")["dreambooth"] | {"prior_folder": str(base.parent / "pictures")}
    with pytest.raises(InputError, match=r"is not empty and holds no prior.json"):
        job_of(tmp_path, base, "run", dreambooth=other)


@pytest.mark.parametrize("lora", [None, {"rank": 2, "text_targets": ["attention"]}], ids=["whole", "lora"])
def test_pain_21_goes_on_after_a_stop_to_the_same_weights(
    tmp_path: Path, base: Path, lora: dict[str, Any] | None
) -> None:
    if lora:
        pytest.importorskip("peft")
    changes: dict[str, Any] = {"lora": lora} if lora else {}
    whole = plan_of(tmp_path, base, "whole", **changes)
    assert loop.train(recipe.check(whole, "test")).finished
    broken = plan_of(tmp_path, base, "broken", **changes)

    class Killed(Exception):
        pass

    def die(step: int, total: int, loss: float) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        loop.train(recipe.check(broken, "test"), True, loop.Watch(step=die))
    assert state.newest(tmp_path / "broken/checkpoints") == tmp_path / "broken/checkpoints/step-00000002"
    assert loop.train(recipe.check(broken, "test"), True).finished
    name = "network" if lora else "backbone"
    ends = [load_file(tmp_path / run / f"checkpoints/step-00000004/{name}.safetensors") for run in ("whole", "broken")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    start = load_file(tmp_path / f"whole/checkpoints/step-00000002/{name}.safetensors")
    assert any(not torch.equal(start[key], value) for key, value in ends[0].items())
    if not lora:
        trained = families.load(tmp_path / "whole/model")
        assert (
            trained.family == "sd1"
            and trained.contract.lineage.base == families.native.identified(mz.load(base)).contract.weights
        )
    records = [r for r in metrics.read(tmp_path / "whole") if "loss/class" in r]
    for record in records:
        assert record["loss"] == pytest.approx(record["loss/subject"] + 0.7 * record["loss/class"], rel=1e-5)


def test_prior_preservation_keeps_what_the_base_knew(tmp_path: Path) -> None:
    """A small model that learned grey squares is taught a white subject: with the class beside it, it forgets less."""
    image_folder(tmp_path / "train", 4)
    first = full_recipe(tmp_path, "first", steps=60, batch=4, optimiser={"rate": 4e-3}, checkpoints={"every": 100})
    del first["inpaint"], first["validation"]
    first["data"]["flips"] = []
    loop.train(recipe.check(first, "test"))
    (tmp_path / "subject").mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16), 250 - i, np.uint8)).save(tmp_path / f"subject/{i}.png")
    rows = [{"file_name": f"{i}.png", "text": ""} for i in range(3)]
    (tmp_path / "subject/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    forgotten = {}
    for count in (0, 8):
        plan = plan_of(tmp_path, tmp_path / "first/model", f"run{count}", steps=40, batch=4, optimiser={"rate": 2e-3})
        plan["data"] = {"folder": str(tmp_path / "subject"), "validation": str(tmp_path / "train"), "size": [16, 16]}
        plan["data"] |= {"channels": 1}
        plan["dreambooth"] = {"label": "broken", "class_label": "sound", "prior_images": count, "prior_steps": 10}
        plan |= {"checkpoints": {"every": 100}, "ema": {"decay": 0.0}}
        del plan["text"]
        with pytest.warns(UserWarning, match="one colour"):
            loop.train(recipe.check(plan, "test"))
        found = [r["validation"] for r in metrics.read(tmp_path / f"run{count}") if "validation" in r]
        forgotten[count] = found[-1] - found[0]
    assert forgotten[0] > 0 and forgotten[8] < 0.6 * forgotten[0]


def test_real_images_of_the_class_stand_in_for_drawn_ones(tmp_path: Path, base: Path) -> None:
    table = {"prompt": SUBJECT, "class_prompt": CLASS, "class_folder": str(base.parent / "pictures")}
    job = job_of(tmp_path, base, "run", dreambooth=table)
    assert job.prior is not None and job.prior.images[0].names == tuple(f"{i}.png" for i in range(4))
    batch = job.draw(0)
    assert not (tmp_path / "run" / "prior").exists()
    captions = job.prior.captions
    assert captions is not None and captions.texts(batch["prior/caption"]) == [CLASS] * 2


def test_recipes_that_cannot_mean_it_are_refused(tmp_path: Path, base: Path) -> None:
    good = plan_of(tmp_path, base, "run")["dreambooth"]
    for change, message in (
        ({"class_prompt": None}, r"test.toml: prior images need dreambooth.class_prompt"),
        ({"class_folder": "photos"}, r"class_folder stands in place of prior_images"),
        ({"class_prompt": SUBJECT}, r"are the same, so nothing names the subject"),
        ({"label": "dog"}, r"label 'dog' was given, but .* has no classes"),
    ):
        with pytest.raises(InputError, match=message):
            job_of(tmp_path, base, "run", dreambooth={**good, **change})

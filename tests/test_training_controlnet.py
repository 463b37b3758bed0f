"""Control networks are trained: from a start that changes nothing to pictures that follow what they are shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_sd
import reference_sd35
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from mezzotint import families
from mezzotint.cli.main import main
from mezzotint.conditioning import Conditioning
from mezzotint.contract import SamplingFacts, read_adapter_contract, read_contract
from mezzotint.data import conditions
from mezzotint.errors import InputError
from mezzotint.families.control import load_control
from mezzotint.generate import generate
from mezzotint.process import Prediction, Process, schedules
from mezzotint.request import Request
from mezzotint.training import loop, metrics, recipe
from mezzotint.training.methods import Place
from mezzotint.training.methods.controlnet import Control

SIZE, STEPS = 16, 60
UNET: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 16,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def squares(path: Path, count: int, seed: int, size: int = SIZE) -> Path:
    """A bright square somewhere on grey, with its mask, and a picture to follow in which the place is red."""
    path.mkdir(parents=True)
    rng, rows, unit = np.random.default_rng(seed), [], size // 16
    for i in range(count):
        y, x = (rng.integers(0, 3, 2) * 5 + 1) * unit
        inside = np.zeros((size, size), dtype=bool)
        inside[y : y + 4 * unit, x : x + 4 * unit] = True
        red = np.zeros((size, size, 3), dtype=np.uint8)
        red[inside, 0] = 255
        Image.fromarray(np.where(inside, 230, 60).astype(np.uint8)).save(path / f"{i}.png")
        Image.fromarray(inside.astype(np.uint8) * 255).save(path / f"mask{i}.png")
        Image.fromarray(red).save(path / f"red{i}.png")
        row = {"file_name": f"{i}.png", "text": "a crack", "mask": f"mask{i}.png", "control": f"red{i}.png"}
        rows.append(row)
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def plan(root: Path, out: str | Path, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "method": "controlnet",
        "out": str(root / out),
        "steps": 6,
        "batch": 4,
        "threads": 1,
        "log_every": 10,
        "data": {"folder": str(root / "train"), "size": [SIZE, SIZE], "channels": 1},
        "base": {"path": str(root / "base" / "model")},
        "controlnet": {"condition": "mask"},
        "optimiser": {"rate": 3e-3, "decay": 0.0, "warmup": 5},
        "ema": {"decay": 0.9},
        "validation": {"every": 1000, "images": 9, "bands": 2},
        "checkpoints": {"every": 3},
    }
    return {**common, **changes}


def train(what: dict[str, Any], resume: bool = False, watch: loop.Watch | None = None) -> list[metrics.Record]:
    assert loop.train(recipe.check(what, "test"), resume, watch).finished
    return metrics.read(Path(what["out"]))


def job(what: dict[str, Any]) -> Control:
    torch.manual_seed(0)
    return Control(recipe.check(what, "test"), Place(Path(what["out"]), torch.device("cpu"), lambda *_: None))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a base that has learned to draw a square anywhere, and a control network that learned where."""
    root = tmp_path_factory.mktemp("control")
    squares(root / "train", 24, 0)
    squares(root / "held", 9, 1)
    both = {"folder": str(root / "train"), "validation": str(root / "held"), "size": [SIZE, SIZE], "channels": 1}
    base = plan(
        root, "base", method="full", steps=STEPS, batch=12, data=both, backbone={"name": "unet", "config": UNET},
        process={"prediction": "flow", "schedule": {"kind": "rectified_flow"}}, checkpoints={"every": 1000},
    )  # fmt: skip
    del base["base"], base["controlnet"]
    train(base)
    train(
        plan(
            root,
            "control",
            steps=STEPS,
            batch=12,
            data=both,
            checkpoints={"every": 1000},
            previews={"every": STEPS, "count": 2, "steps": 2},
        )
    )
    return root


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / WEIGHTS)


def test_pain_20_the_first_validation_is_the_bases_and_the_last_far_below(root: Path) -> None:
    """An untouched start, a loss that falls, and weights on disk of which none is the start's."""
    base, control = (metrics.read(root / run) for run in ("base", "control"))
    for band in ("validation", "validation/0-50%", "validation/50-100%"):
        assert control[0][band] == base[-1][band]
        assert control[-1][band] < base[-1][band]
    assert control[-1]["validation"] < 0.75 * base[-1]["validation"]
    start = job(plan(root, "again", steps=STEPS, batch=12)).control.state_dict()
    trained = state(root / "control")
    assert trained.keys() == start.keys()
    assert not [key for key, value in trained.items() if torch.equal(value, start[key])]
    contract = read_contract(root / "base" / "model")
    families.load(root / "base" / "model")  # which compares the digest of its weights
    facts = read_adapter_contract(root / "control" / "model")
    assert facts is not None and (facts.kind, facts.base, facts.family) == ("control", contract.weights, "native")
    assert facts.lineage.base == contract.weights and facts.lineage.steps == STEPS
    assert facts.process == contract.process and facts.latent == contract.latent
    assert facts.lineage.dataset == job(plan(root, "digests")).digests["data"]


def test_pictures_follow_held_out_masks(root: Path) -> None:
    """Bright where the mask is white and grey elsewhere; without the network the place is chance."""
    model, inside, outside, chance = families.load(root / "base" / "model"), [], [], []
    for i in range(4):
        mask = Image.open(root / "held" / f"mask{i}.png")
        white = np.array(mask) > 127
        request = Request(seed=i, steps=8, control=[(root / "control" / "model", mask, 1.0)])
        drawn = np.array(generate(model, request).images[0]).astype(float)
        free = np.array(generate(model, replace(request, control=[])).images[0]).astype(float)
        inside.append(drawn[white].mean())
        outside.append(drawn[~white].mean())
        chance.append(free[white].mean())
    assert min(inside) > 160 and max(outside) < 90
    assert np.mean(chance) < 120


def test_a_colour_hint_and_a_grey_one_say_the_same(root: Path) -> None:
    """A model of one channel is shown pictures of three; at scale 0 the base draws alone."""
    model = families.load(root / "base" / "model")
    mask = Image.open(root / "held" / "mask0.png")
    grey, colour, off = (
        generate(model, Request(seed=1, steps=2, control=[(root / "control" / "model", picture, scale)])).latents
        for picture, scale in ((mask, 1.0), (mask.convert("RGB"), 1.0), (mask, 0.0))
    )
    plain = generate(model, Request(seed=1, steps=2)).latents
    assert torch.equal(grey, colour) and torch.equal(off, plain) and not torch.equal(grey, plain)


def test_what_a_run_leaves_is_inspected_and_generates(root: Path, tmp_path: Path, capsys: Any) -> None:
    network, base = root / "control" / "model", root / "base" / "model"
    assert sorted(path.name for path in network.iterdir()) == ["config.json", "contract.json", WEIGHTS, "lineage"]
    assert main(["inspect", str(network), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kind"], said["class"], said["shown"]) == ("control network", "UNetControlNet", "pixels")
    assert said["follows"] == "mask"
    assert said["contract"]["process"]["prediction"] == "flow"
    mask = root / "held" / "mask0.png"
    args = ["--model", str(base), "--steps", "2", "--control", f"{network}={mask}@0.5", "--out", str(tmp_path)]
    assert main(["generate", "", *args, "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)
    assert made["record"]["request"]["control"][0]["scale"] == 0.5 if "record" in made else made
    assert main(["generate", "", "--model", str(network), "--out", str(tmp_path)]) == 2
    assert "is a control network: give it with --control" in capsys.readouterr().err
    sheet = Image.open(next((root / "control" / "samples").glob("*.png")))
    assert sheet.size == (2 * SIZE + 2, 2 * SIZE + 2)  # two pictures, each beside what it follows
    followed = np.array(sheet)[:SIZE, :SIZE]
    assert np.array_equal(followed, np.array(Image.open(root / "held" / "mask0.png")))


def test_a_model_of_another_kind_is_refused_with_both_files_named(root: Path, tmp_path: Path) -> None:
    model = families.load(root / "base" / "model")
    epsilon, ddim = Process(schedules.scaled_linear(), Prediction.EPSILON), SamplingFacts(sampler="ddim", steps=2)
    other = replace(model, contract=model.contract.model_copy(update={"process": epsilon, "sampling": ddim}))
    other = families.save(other, tmp_path / "other")
    picture = Image.open(root / "held" / "mask0.png")
    request = Request(steps=2, control=[(root / "control" / "model", picture, 1.0)])
    with pytest.raises(
        InputError, match=r"process\.prediction is 'epsilon' in .*other.* but 'flow' in .*control.model"
    ):
        generate(other, request)
    start = {"condition": "mask", "start": str(root / "control" / "model")}
    with pytest.raises(InputError, match="trained for another kind of model"):
        job(plan(root, "refused", base={"path": str(tmp_path / "other")}, controlnet=start))


@pytest.mark.parametrize("condition", ["mask", "edges", "file"])
def test_a_batch_shows_each_image_its_own_picture_mirrored_alike(root: Path, condition: str) -> None:
    data = plan(root, "hints")["data"] | {"flips": ["horizontal", "vertical"]}
    work = job(plan(root, "hints", data=data, controlnet={"condition": condition}, batch=8))
    images = work.core.images[0]
    seen: set[int] = set()
    for step in range(3):
        batch = work.draw(step)
        assert batch["hint"].shape == (8, 3, SIZE, SIZE)
        for place, (index, flip) in enumerate(zip(batch["index"], batch["flip"].tolist(), strict=True)):
            seen.add(flip)
            turned = images.pixels(index[None], work.core.mirrorings[flip])
            bright = turned[0, 0] > 0
            assert torch.allclose(batch["clean"][place], turned[0])
            expected = {
                "mask": bright.expand(3, -1, -1).float(),
                "edges": conditions.edges(turned)[0].expand(3, -1, -1).float(),
                "file": torch.stack((bright, bright & False, bright & False)).float(),
            }[condition]
            assert torch.equal(batch["hint"][place], expected) and expected.any()
    assert seen == {0, 1, 2, 3}


class Killed(BaseException):
    """The end of a process: nothing is written after it."""


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_resumed_after_a_kill_it_ends_with_the_same_weights(root: Path, tmp_path: Path, decay: float) -> None:
    def dying(done: int, total: int, loss: float) -> None:
        if done == 5:
            raise Killed

    whole, broken = (plan(root, f"{name}-{decay}", ema={"decay": decay}) for name in ("whole", "broken"))
    for what in (whole, broken):
        what["out"] = str(tmp_path / Path(what["out"]).name)
        what["data"] = what["data"] | {"flips": ["horizontal"]}
    train(whole)
    with pytest.raises(Killed):
        train(broken, watch=loop.Watch(step=dying))
    train(broken, resume=True)
    ours, theirs = state(Path(whole["out"])), state(Path(broken["out"]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    checkpoint = load_file(Path(whole["out"]) / "checkpoints" / "step-00000006" / "network.safetensors")
    assert all(key.startswith("networks.0.") for key in checkpoint)  # the frozen base is in no checkpoint


def test_a_control_network_is_trained_further(root: Path, tmp_path: Path) -> None:
    """It begins where the other ended, at a validation loss to the last digit."""
    start = {"condition": "mask", "start": str(root / "control" / "model")}
    data = plan(root, "on")["data"] | {"validation": str(root / "held")}
    what = plan(root, tmp_path / "on", controlnet=start, data=data, steps=2, batch=12)
    records = train(what)
    assert records[0]["validation"] == metrics.read(root / "control")[-1]["validation"]
    before, after = state(root / "control"), state(tmp_path / "on")
    assert not [key for key in before if torch.equal(before[key], after[key])]
    with pytest.raises(InputError, match=r"leave controlnet\.config out"):
        job(plan(root, "on", controlnet={**start, "config": {"conditioning_channels": 1}}))


def test_mistakes_in_a_recipe_are_named(root: Path, tmp_path: Path) -> None:
    bare = squares(tmp_path / "bare", 2, 0)
    (bare / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png"}')
    without = {"data": plan(root, "wrong")["data"] | {"folder": str(bare)}}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"condition": "mask"}, without, "has no masks to follow"),
        ({"condition": "file"}, without, r"0\.png has no condition picture"),
        ({"config": {"conditioning_chanels": 1}}, {}, "did you mean 'conditioning_channels'"),
        ({"edges": [0.3, 0.1], "condition": "edges"}, {}, "rising contrasts"),
        ({"start": str(tmp_path / "nowhere")}, {}, "no such control network"),
    ]
    for number, (table, changes, message) in enumerate(cases):
        with pytest.raises(InputError, match=message):
            job(plan(root, tmp_path / str(number), controlnet=table, **changes)).draw(0)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("coloured")
    squares(root / "train", 4, 0, reference_sd.SIDE)
    return root


def published(root: Path, path: Path, out: Path, **changes: Any) -> dict[str, Any]:
    side = reference_sd.SIDE
    data = {"folder": str(root / "train"), "size": [side, side], "channels": 3}
    settled = {"steps": 2, "batch": 2, "ema": {"decay": 0.0}, "text": {"dropout": 0.5}, "base": {"path": str(path)}}
    return plan(root, out, **{"data": data, **settled, **changes})


def test_on_stable_diffusion_it_is_a_network_that_diffusers_opens(coloured: Path, tmp_path: Path) -> None:
    """The published layout of a published base: names, settings and maps are the reference's."""
    diffusers = pytest.importorskip("diffusers")
    base = reference_sd.write_plain(tmp_path)
    control = {"condition": "edges"}
    train(
        published(coloured, base, tmp_path / "run", controlnet=control, previews={"every": 2, "count": 1, "steps": 1})
    )
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "run" / "model").eval()
    ours = load_control(tmp_path / "run" / "model")
    draw = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(1, 4, 8, 8, generator=draw), torch.randn(1, 5, 64, generator=draw)
    hint = torch.rand(1, 3, 8 * reference_sd.FACTOR, 8 * reference_sd.FACTOR, generator=draw)
    with torch.no_grad():
        down, middle = theirs(x, torch.tensor([7.0]), tokens, hint, return_dict=False)
        found = ours(x, torch.tensor([7.0]), Conditioning(tokens=tokens), hint)
    for map_, expected in zip(found, (*down, middle), strict=True):
        assert expected.abs().max() > 0
        assert (map_ - expected).abs().max() < 1e-5 * expected.abs().max()
    picture = Image.open(coloured / "train" / "red0.png")
    model = families.load(base)
    on, off = (
        generate(model, Request(prompt="a", steps=2, control=[(tmp_path / "run" / "model", picture, s)])).latents
        for s in (1.0, 0.0)
    )
    assert not torch.equal(on, off)


def test_pain_20_a_base_that_is_told_the_scale_tells_it_to_the_network(coloured: Path, tmp_path: Path) -> None:
    """Guidance-embedded: the recipe's scale reaches base and copy in training; saved and read back, they agree."""
    base = reference_sd.write_consistency(tmp_path)
    changes: dict[str, Any] = {"base": {"path": str(base), "train_distilled": True}, "loss": {"guidance": 2.5}}
    train(published(coloured, base, tmp_path / "run", **changes))
    network: Any = load_control(tmp_path / "run" / "model")
    assert network.config.time_cond_proj_dim == 32
    work = job(published(coloured, base, tmp_path / "again", **changes))
    assert work.core.conditioning(work.draw(0)).guidance.tolist() == [2.5, 2.5]
    start = work.control.state_dict()["time_embedding.cond_proj.weight"]
    assert not torch.equal(network.state_dict()["time_embedding.cond_proj.weight"], start)


def test_on_stable_diffusion_3_hints_are_latents(coloured: Path, tmp_path: Path) -> None:
    """The autoencoder's, scaled and shifted as the base's own; half the blocks are copied, and all of them move."""
    base = tmp_path / "base"
    reference_sd35.write(base, reference_sd35.MEDIUM, with_t5=False)
    side = reference_sd35.SIDE
    data = {"folder": str(coloured / "train"), "size": [side, side], "channels": 3}
    what = published(coloured, base, tmp_path / "run", data=data, controlnet={"condition": "file"}, steps=3)
    work = job(what)
    batch = work.draw(0)
    rows = work.core.images[0].hints(batch["index"]) * 2 - 1
    assert torch.allclose(batch["hint"], work.model.codec.encode(rows), atol=1e-6)
    start = {key: value.clone() for key, value in work.control.state_dict().items()}
    train(what)
    after = state(tmp_path / "run")
    # what nobody reads: the text of the last block, which is here the only one; and the table of places is no weight
    unread = ("pos_embed.pos_embed", "add_q_proj", "norm_added_q", "to_add_out", "ff_context")
    still = {key for key, value in start.items() if torch.equal(value, after[key])}
    assert all(any(part in key for part in unread) for key in still)


def test_a_narrow_base_trains_a_network_in_full_precision(root: Path, tmp_path: Path) -> None:
    """Weights that stay may be bfloat16: the loss is that of float32 to their rounding, what trains is float32."""
    small = plan(root, tmp_path / "narrow", base={"path": str(root / "base" / "model"), "dtype": "bfloat16"})
    narrow, wide = job(small), job(plan(root, tmp_path / "wide"))
    batch = narrow.draw(0)
    loss, expected = (work.loss(batch, 0)[0] for work in (narrow, wide))
    loss.backward()
    assert abs(loss.item() - expected.item()) < 0.02 * expected.item()
    moving = {p.dtype for p in narrow.trained["network"].parameters() if p.requires_grad and p.grad is not None}
    assert moving == {torch.float32}
    assert {p.dtype for p in narrow.model.backbone.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in narrow.model.backbone.parameters())

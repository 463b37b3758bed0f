"""LoRA runs: they learn, go on after a kill, leave files that every program reads, and refuse what cannot work."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import randomise, relative
from reference_adapters import apart, fresh, klein, loaded, request, sd1, sd35, sdxl, theirs
from reference_sd import tiny_unet, write_second, write_velocity
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_parts import full_recipe, image_folder

import mezzotint as mz
from mezzotint import families
from mezzotint.adapters import BACKBONE, attach
from mezzotint.cli.inspect import examine
from mezzotint.conditioning import Conditioning
from mezzotint.contract import AdapterContract
from mezzotint.errors import InputError
from mezzotint.families.adapt import adapted, read_lora
from mezzotint.families.native import identified
from mezzotint.training import loop, lowrank, metrics, recipe, state
from mezzotint.training.methods import Place
from mezzotint.training.methods.lora import Lora
from mezzotint.training.steered import Steered

pytest.importorskip("peft")
pytest.importorskip("diffusers")

EVERYTHING = ["attention", "feed-forward", "convolution", "projection", "time"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and pictures that all tests share."""
    root = tmp_path_factory.mktemp("lora")
    image_folder(root / "train", 4)
    image_folder(root / "pictures", 4, size=32)
    return root


@pytest.fixture(scope="module")
def native(place: Path) -> Path:
    """A model of our own, of pixels and classes, whose weights hide nothing."""
    plan = full_recipe(place, "native", steps=1, checkpoints={"every": 1}, validation={"every": 1})
    del plan["inpaint"]
    loop.train(recipe.check(plan, "test"))
    model = families.load(place / "native" / "model")
    randomise(model.backbone)
    contract = model.contract.model_copy(update={"weights": ""})
    families.save(replace(model, contract=contract), place / "ours")
    return place / "ours"


def lora_recipe(root: Path, base: Path, out: str = "run", **changes: Any) -> dict[str, Any]:
    """A LoRA recipe on a model of our own, or on a tiny Stable Diffusion."""
    ours = base.name == "ours"
    data = {"folder": str(base.parent / ("train" if ours else "pictures")), "size": [16, 16] if ours else [32, 32]}
    plan: dict[str, Any] = {
        "method": "lora", "out": str(root / out), "base": {"path": str(base)}, "steps": 6, "batch": 4, "threads": 1,
        "log_every": 1, "data": {**data, "channels": 1 if ours else 3}, "lora": {"rank": 4},
        "optimiser": {"rate": 1e-2}, "ema": {"decay": 0.5}, "checkpoints": {"every": 2}, "validation": {"every": 100},
    }  # fmt: skip
    return {**plan, **changes}


def train(plan: dict[str, Any], resume: bool = False, watch: loop.Watch | None = None) -> Path:
    outcome = loop.train(recipe.check(plan, "test"), resume, watch)
    assert outcome.finished
    return outcome.folder


def header(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


CASES = {
    "ours": {"rank": 4, "targets": ["attention", "convolution"]},
    "sd1, text too": {"rank": 8, "targets": EVERYTHING, "text_targets": ["attention"], "text_rate": 1.0},
    "ours, DoRA": {"rank": 4, "targets": ["attention", "convolution"], "dora": True},
}


@pytest.mark.parametrize("case", CASES)
def test_overfits_one_batch(tmp_path: Path, place: Path, native: Path, case: str) -> None:
    """The same pictures, noise and times again and again: the loss falls far below where it began."""
    plan = lora_recipe(tmp_path, native if case.startswith("ours") else sd1(place), lora=CASES[case])
    job = Lora(recipe.check(plan, "test"), Place(tmp_path, torch.device("cpu"), lambda *_: None))
    moving = [p for p in job.trained["network"].parameters() if p.requires_grad]
    assert isinstance(job.trained["network"], Steered) == (case == "sd1, text too")
    optimiser = torch.optim.AdamW(moving, lr=2e-2, weight_decay=0.0)
    batch, losses = job.draw(0), []
    for _ in range(40):
        loss, _ = job.loss(batch, 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0], losses


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """A run on Stable Diffusion 1 in which backbone and text encoder changed, with convolutions."""
    plan = lora_recipe(
        place, sd1(place), "finished", ema={"decay": 0.0}, steps=4, licence="CC-BY-NC-4.0",
        lora={"rank": 3, "alpha": 6.0, "targets": ["attention", "convolution"], "text_targets": ["attention"]},
    )  # fmt: skip
    plan["previews"] = {"every": 4, "count": 1, "steps": 2}
    return train(plan)


def test_files_are_read_by_us_by_diffusers_and_by_peft(finished: Path, place: Path) -> None:
    """The same pictures with every file and both libraries, and the weights of the last checkpoint in all of them."""
    import peft

    folder, result = sd1(place), finished / "model"
    model, wish = loaded(folder), request(loaded(folder), sampler="ddim")
    plain = mz.generate(model, wish).latents
    ours = mz.generate(model, replace(wish, lora=[(result, 1.0)])).latents
    assert apart(ours, plain) > 1e-2
    kohya = mz.generate(model, replace(wish, lora=[(result / "kohya.safetensors", 1.0)])).latents
    assert torch.equal(kohya, ours)
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        pipeline = fresh(folder)
        pipeline.load_lora_weights(str(result), weight_name=file)
        assert apart(ours, theirs(pipeline, wish)) < 1e-5, file
    # peft, on the reference's own networks
    backbone = peft.PeftModel.from_pretrained(tiny_unet(1), str(result / "peft")).eval()
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 64)
    changed = adapted(model, [(result / "peft", 1.0)])
    with torch.no_grad():
        expected = backbone(x, t, tokens).sample
        assert relative(changed.backbone(x, t, Conditioning(tokens=tokens)), expected) < 1e-5
        assert relative(model.backbone(x, t, Conditioning(tokens=tokens)), expected) > 1e-2
    reference = fresh(folder).text_encoder
    ids = torch.arange(14).reshape(2, 7)
    unchanged = reference(ids).last_hidden_state
    encoder = peft.PeftModel.from_pretrained(reference, str(result / "peft" / "text_encoder")).eval()
    alone: Any = adapted(model, [(result / "peft" / "text_encoder", 1.0)]).text
    with torch.no_grad():
        expected = encoder(input_ids=ids).last_hidden_state
        assert relative(alone.network.norm(alone.network(ids)[-1]), expected) < 1e-5
        assert relative(unchanged, expected) > 1e-2
    text = load_file(result / "peft" / "text_encoder" / "adapter_model.safetensors")
    # what trained is what was written
    last = state.newest(finished / loop.CHECKPOINTS)
    assert last is not None
    kept = load_file(last / "network.safetensors")
    written = load_file(result / "peft" / "adapter_model.safetensors")
    for part, tensors in (("backbone", written), ("text.text_encoder.text_model", text)):
        for key, tensor in tensors.items():
            name = key.removeprefix("base_model.model.").replace(".weight", ".default.weight")
            assert torch.equal(kept[f"{part}.{name}"], tensor)
    assert len(kept) == len(written) + len(text)  # and nothing frozen is in the checkpoint
    assert all(".lora_" in key for key in kept)


def test_every_file_carries_its_contract_and_the_notes_of_other_programs(finished: Path, place: Path) -> None:
    result, base = finished / "model", identified(mz.load(sd1(place))).contract
    for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_model.safetensors",
                 "peft/text_encoder/adapter_model.safetensors"):  # fmt: skip
        said = header(result / name)
        contract = AdapterContract.from_header(said)
        assert contract is not None
        assert (contract.kind, contract.family, contract.process) == ("lora", "sd1", base.process)
        assert contract.base == base.weights == contract.lineage.base
        assert (contract.latent, contract.text) == (base.latent, base.text)
        assert (contract.licence.weights, contract.lineage.steps, contract.distilled) == ("CC-BY-NC-4.0", 4, False)
        assert contract.lineage.dataset and contract.lineage.recipe
        assert said["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert said["modelspec.prediction_type"] == "epsilon"
        assert said["ss_sd_model_name"] == sd1(place).name
        assert str(place) not in json.dumps(said)  # no path of this machine
    for path in (result, result / "kohya.safetensors", result / "peft"):
        found = examine(path)
        assert (found["kind"], found["ranks"], found["contract"]["base"]) == ("LoRA", (3,), base.weights)
        assert found["contract"]["process"]["prediction"] == "epsilon"


def test_the_text_encoder_trains_at_its_own_rate(finished: Path) -> None:
    tensors = load_file(finished / "model" / "pytorch_lora_weights.safetensors")
    up = {part: [v for k, v in tensors.items() if k.startswith(part) and "lora_B" in k] for part in ("unet", "text")}
    assert all(tensor.abs().max() > 0 for tensor in up["text"])
    moved = {part: max(float(tensor.abs().max()) for tensor in found) for part, found in up.items()}
    # four steps of Adam from zero: at most the sum of the rates (1e-2 with a cosine; half of that for text)
    assert 1e-3 < moved["text"] < 0.7 * moved["unet"] < 4e-2


@pytest.mark.parametrize("family", ["sd1, DoRA", "sdxl", "sd35", "klein"])
def test_other_families_train_and_the_reference_draws_the_same(tmp_path: Path, place: Path, family: str) -> None:
    folder = {"sd1, DoRA": sd1, "sdxl": sdxl, "sd35": sd35, "klein": klein}[family](place)
    lora: dict[str, Any] = {"rank": 2, "alpha": 4.0, "targets": ["attention", "feed-forward"]}
    if family == "sd1, DoRA":
        lora |= {"dora": True, "targets": ["attention", "convolution", "projection"]}
    elif family != "klein":
        lora["text_targets"] = ["attention"]
    plan = lora_recipe(tmp_path, folder, steps=2, lora=lora, ema={"decay": 0.0}, optimiser={"rate": 2e-2})
    result, model = train(plan) / "model", loaded(folder)
    wish = request(model, **({"sampler": "ddim"} if model.family == "sd1" else {}))
    ours = mz.generate(model, replace(wish, lora=[(result, 1.0)])).latents
    assert apart(ours, mz.generate(model, wish).latents) > 1e-2
    pipeline = fresh(folder)
    pipeline.load_lora_weights(str(result), weight_name="pytorch_lora_weights.safetensors")
    assert apart(ours, theirs(pipeline, wish)) < 1e-5
    kohya = mz.generate(model, replace(wish, lora=[(result / "kohya.safetensors", 1.0)])).latents
    assert torch.equal(kohya, ours)


class Killed(Exception):
    pass


@pytest.mark.parametrize("case", ["ours", "sd1, text too"])
def test_pain_21_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path, place: Path, native: Path, case: str) -> None:
    """Killed twice and resumed: checkpoints move on each time, and the end is that of a run that was never stopped."""
    lora: dict[str, Any] = {"rank": 3, "dropout": 0.2, "targets": ["attention", "convolution"]}
    base = native if case == "ours" else sd1(place)
    if case != "ours":
        lora["text_targets"] = ["attention"]
    changes: dict[str, Any] = {"steps": 7, "lora": lora, "accumulation": 2}
    whole = train(lora_recipe(tmp_path, base, "whole", **changes))
    broken = lora_recipe(tmp_path, base, "broken", **changes)
    kept: list[dict[str, Tensor]] = []
    for moment in (3, 5):

        def die(step: int, total: int, loss: float, moment: int = moment) -> None:
            if step == moment:
                raise Killed

        with pytest.raises(Killed):
            loop.train(recipe.check(broken, "test"), True, loop.Watch(step=die))
        last = state.newest(tmp_path / "broken" / loop.CHECKPOINTS)
        assert last is not None and last.name == f"step-{moment - 1:08d}"
        kept.append(load_file(last / "network.safetensors"))
    train(broken, resume=True)
    assert all(not torch.equal(kept[0][key], value) for key, value in kept[1].items())
    files = sorted(path.relative_to(whole) for path in (whole / "model").rglob("*") if path.is_file())
    files = [path for path in files if "lineage" not in path.parts]
    assert len(files) == (4 if case == "ours" else 6)
    for path in files:
        if path.suffix == ".safetensors":
            first, second = (load_file(root / path) for root in (whole, tmp_path / "broken"))
            assert all(torch.equal(second[key], value) for key, value in first.items())
    ends = [load_file(root / "checkpoints/step-00000007/network.safetensors") for root in (whole, tmp_path / "broken")]
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    assert all(not torch.equal(kept[1][key], value) for key, value in ends[1].items())
    average = load_file(whole / "checkpoints/step-00000007/ema.safetensors")
    part = "" if case == "ours" else "backbone."
    for key, value in load_file(whole / "model/peft/adapter_model.safetensors").items():  # the average is what is saved
        name = key.replace("base_model.model.", part).replace(".weight", ".default.weight")
        assert torch.equal(average[name], value) and not torch.equal(ends[0][name], value)
    losses = [[r["loss"] for r in metrics.read(root) if "loss" in r] for root in (whole, tmp_path / "broken")]
    assert losses[0] == losses[1]
    content = json.loads((whole / "checkpoints/step-00000007/state.json").read_text())
    assert content["digests"]["base"] == identified(mz.load(base)).contract.weights


def test_pain_21_another_base_is_not_resumed_on(tmp_path: Path, native: Path) -> None:
    plan = lora_recipe(tmp_path, native, steps=2)

    def die(step: int, total: int, loss: float) -> None:
        if step == 2:
            raise Killed

    with pytest.raises(Killed):
        loop.train(recipe.check({**plan, "checkpoints": {"every": 1}}, "test"), False, loop.Watch(step=die))
    model = families.load(native)
    randomise(model.backbone, seed=9)
    contract = model.contract.model_copy(update={"weights": ""})
    families.save(replace(model, contract=contract), tmp_path / "other")
    changed = {**plan, "base": {"path": str(tmp_path / "other")}}
    with pytest.raises(InputError, match=r"base\.path"):
        loop.train(recipe.check(changed, "test"), True)


def test_pain_10_targets_are_refused_before_any_work(tmp_path: Path, place: Path, native: Path) -> None:
    refused = [
        (sd35(place), {"targets": ["cross-attention"]}, r"'cross-attention'.*joint-attention \("),
        (klein(place), {"targets": ["cross-attention"]}, r"'cross-attention'.*joint-attention \("),
        (native, {"targets": ["attention", "feed-forward"]}, r"'feed-forward' is nothing that this network has"),
        (sd1(place), {"text_targets": ["cross-attention"]}, r"'cross-attention'.*self-attention \("),
        (klein(place), {"text_targets": ["attention"]}, r"no name in LoRA files"),
        (native, {"text_targets": ["attention"]}, r"no name in LoRA files"),
        (sd1(place), {"text_targets": ["attention"], "dora": True}, r"drops the magnitudes of text encoders"),
    ]
    for base, lora, why in refused:
        with pytest.raises(InputError, match=why):
            lowrank.adapt_for_training(
                loaded(base) if base != native else families.load(native),
                recipe.check(lora_recipe(tmp_path, base, lora=lora), "test").lora,  # type: ignore[arg-type]
                seed=0,
            )
    with pytest.raises(InputError, match="'cross-attention'"):
        loop.train(recipe.check(lora_recipe(tmp_path, native, lora={"targets": ["cross-attention"]}), "test"))
    assert not (tmp_path / "run" / "cache").exists()


def test_a_licence_freer_than_the_base_s_is_refused_before_any_work(tmp_path: Path, place: Path) -> None:
    with pytest.raises(InputError, match="'MIT' is freer than 'CreativeML OpenRAIL-M'"):
        loop.train(recipe.check(lora_recipe(tmp_path, sd1(place), licence="MIT"), "test"))
    assert not (tmp_path / "run" / "cache").exists()


def test_pain_03_an_adapter_for_another_prediction_is_refused(tmp_path: Path, place: Path) -> None:
    """Trained on v, used on epsilon: refused by the contract, and by other programs' notes where that is gone."""
    velocity = write_velocity(place)
    plan = lora_recipe(tmp_path, velocity, steps=1, lora={"rank": 2})
    result = train(plan) / "model"
    said = header(result / "kohya.safetensors")
    assert said["modelspec.prediction_type"] == "v"
    assert said["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    other = mz.load(write_second(place))  # the same network
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors", "peft/adapter_model.safetensors"):
        with pytest.raises(InputError) as caught:
            read_lora(other, result / file)
        message = str(caught.value)
        assert "process.prediction is 'epsilon'" in message and "'velocity'" in message
        assert str(place / "second") in message and file in message
    save_file(load_file(result / "kohya.safetensors"), tmp_path / "bare.safetensors", {
        key: value for key, value in said.items() if key != "mezzotint"
    })  # fmt: skip
    with pytest.raises(InputError, match="was trained to predict velocity"):
        read_lora(other, tmp_path / "bare.safetensors")
    assert read_lora(mz.load(velocity), result).facts.modules > 0


def test_an_adapter_for_another_latent_space_or_text_is_refused(tmp_path: Path, finished: Path, place: Path) -> None:
    file = finished / "model" / "kohya.safetensors"
    contract = AdapterContract.from_header(header(file))
    assert contract is not None and contract.text is not None
    latent = contract.latent.model_copy(update={"scale": 0.5})
    text = contract.text.model_copy(update={"width": 2048})
    codec = contract.latent.model_copy(update={"codec": "another"})
    for change, why in (({"latent": latent}, "latent.scale is"), ({"text": text}, "text.width is 64")):
        save_file(load_file(file), tmp_path / "a.safetensors", contract.model_copy(update=change).to_header())
        with pytest.raises(InputError, match=why):
            read_lora(loaded(sd1(place)), tmp_path / "a.safetensors")
    fine = contract.model_copy(update={"latent": codec, "base": "another"})  # a fine-tuned base or decoder is no error
    save_file(load_file(file), tmp_path / "b.safetensors", fine.to_header())
    assert read_lora(loaded(sd1(place)), tmp_path / "b.safetensors").facts.modules > 0
    save_file(load_file(file), tmp_path / "c.safetensors", {"mezzotint": '{"kind": "lora"}'})
    with pytest.raises(InputError, match=r"c\.safetensors: the header's mezzotint: family"):
        read_lora(loaded(sd1(place)), tmp_path / "c.safetensors")


def test_pain_19_keys_that_match_nothing_are_refused(tmp_path: Path, finished: Path, place: Path) -> None:
    tensors, said = (read(finished / "model" / "kohya.safetensors") for read in (load_file, header))
    stem = next(key.removesuffix(".alpha") for key in tensors if key.endswith("attn2_to_k.alpha"))
    renamed = {key.replace(stem, f"{stem}_2"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "renamed.safetensors", said)
    with pytest.raises(InputError, match=rf"have no place in this model \({stem}_2\)"):
        read_lora(loaded(sd1(place)), tmp_path / "renamed.safetensors")


def gradients(network: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", ["sdxl", "sd35"])
def test_every_change_of_text_encoders_has_a_gradient(place: Path, family: str) -> None:
    """SDXL reads its first CLIP behind the last layer but one: the last is left alone. T5 beside CLIPs is, too."""
    model = loaded({"sdxl": sdxl, "sd35": sd35}[family](place))
    assert model.text is not None
    content = lora_recipe(place, place, lora={"rank": 2, "text_targets": ["attention", "feed-forward"]})
    plan = recipe.check(content, "test").lora
    assert plan is not None
    network = lowrank.adapt_for_training(model, plan, seed=0)
    assert isinstance(network, Steered)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    names = model.contract.picture
    told = Conditioning(time_ids=torch.full((2, len(names)), 32.0) if names else None)
    x = torch.randn(2, model.codec.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = network(x, torch.tensor([3.0, 700.0]), told, ["a crack on the cell", "the dark area"])
    raw.square().mean().backward()
    encoders = {part for part in lowrank.adaptable(model.text)}
    assert encoders == {"text_encoder", "text_encoder_2"}
    found = gradients(network)
    touched = {name.split(".")[1] for name in found if name.startswith("text.")}
    assert touched == encoders
    assert not [name for name, gradient in found.items() if gradient is None]
    silent = [name for name, gradient in found.items() if gradient is not None and not gradient.abs().max() > 0]
    last = "backbone.transformer_blocks.2.attn.add_q_proj."  # what the text of the last block looks for is not read
    assert all(family == "sd35" and name.startswith(last) for name in silent), silent
    # the same adapter, written for and attached to the model
    adapter = lowrank.collect({BACKBONE: network.backbone, **network.text.networks}, lowrank.settings(plan))
    for part, encoder in model.text.networks.items():
        again = attach(encoder, part, [(adapter, 1.0)])
        assert (again is encoder) == (part not in encoders)


def test_a_base_in_half_precision_gets_changes_in_full(tmp_path: Path, place: Path) -> None:
    """The loss is that of full precision to a rounding of the weights, and what trains is not rounded at all."""
    losses: dict[str, float] = {}
    for kind in ("float32", "bfloat16", "float16"):
        plan = lora_recipe(tmp_path, sd1(place), lora={"rank": 2, "text_targets": ["attention"]})
        plan["base"]["dtype"] = kind
        job = Lora(recipe.check(plan, "test"), Place(tmp_path / kind, torch.device("cpu"), lambda *_: None))
        loss, _ = job.loss(job.draw(0), 0)
        loss.backward()
        losses[kind] = float(loss.detach())
        kinds = {parameter.requires_grad: parameter.dtype for parameter in job.trained["network"].parameters()}
        assert kinds == {True: torch.float32, False: getattr(torch, kind)}
    assert len(set(losses.values())) == 3
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-3)
    assert losses["float16"] == pytest.approx(losses["float32"], rel=2e-3)


def test_only_the_layouts_asked_for_are_written(tmp_path: Path, native: Path) -> None:
    result = train(lora_recipe(tmp_path, native, steps=1, lora={"rank": 2, "export": ["kohya"]})) / "model"
    assert sorted(path.name for path in result.iterdir()) == ["kohya.safetensors", "lineage"]
    model = families.load(native)
    changed = adapted(model, [(result / "kohya.safetensors", 1.0)])
    assert changed.backbone is not model.backbone

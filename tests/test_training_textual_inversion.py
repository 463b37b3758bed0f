"""Textual inversion runs: a new word learns, nothing else moves, and every program reads what is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import relative
from parts import FLOW, bert_folder, model, pixel_codec, text_unet
from reference_adapters import apart, fresh, klein, loaded, request, sd1, sd35, sdxl, theirs
from reference_latent import by_text
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_parts import image_folder

import mezzotint as mz
from mezzotint import families
from mezzotint.cli.inspect import examine
from mezzotint.contract import AdapterContract, SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.adapt import adapted
from mezzotint.process import Prediction, RectifiedFlow
from mezzotint.text import minilm
from mezzotint.training import loop, metrics, recipe, state, tables
from mezzotint.training.methods import Place, textual_inversion
from mezzotint.training.methods.textual_inversion import FILE, TextualInversion, rows
from mezzotint.training.steered import Steered

diffusers = pytest.importorskip("diffusers")

WORD = "<plate>"
TEMPLATES = ["a photo of {}", "a {} cell", "{} in the dark"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and pictures that all tests share."""
    root = tmp_path_factory.mktemp("inversion")
    image_folder(root / "pictures", 4, size=32)
    return root


@pytest.fixture(scope="module")
def native(place: Path) -> Path:
    """A flow model of our own that reads prompts with a small BERT, and listens to them."""
    text = minilm.load_folder(bert_folder(place / "bert"), length=12)
    backbone = text_unet(3, 3, text.width)
    for name, parameter in backbone.named_parameters():
        if ".attn2." in name:
            parameter.mul_(5)
    sampling = SamplingFacts(sampler="flow_euler", steps=4)
    ours = model(backbone, pixel_codec(), text, size=(32, 32), process=FLOW, sampling=sampling)
    families.save(ours, place / "ours")
    return place / "ours"


def plan(
    root: Path, base: Path, out: str = "run", word: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """A recipe of a second or two; FLUX.2's patches need larger pictures."""
    size = [64, 32] if base.name == "klein" else [16, 16] if base.name == "ours" else [32, 32]
    found: dict[str, Any] = {
        "method": "textual-inversion", "out": str(root / out), "base": {"path": str(base)}, "steps": 4, "batch": 2,
        "threads": 1, "log_every": 1, "data": {"folder": str(base.parent / "pictures"), "size": size},
        "textual_inversion": {"word": WORD, "vectors": 2, "initial": "crack", "templates": TEMPLATES, **(word or {})},
        "optimiser": {"rate": 1e-2, "decay": 0.1}, "ema": {"decay": 0.0}, "checkpoints": {"every": 2},
        "validation": {"every": 100},
    }  # fmt: skip
    return {**found, **changes}


def ldm(root: Path) -> Path:
    return by_text(root / "ldm-text")


def job(content: dict[str, Any]) -> TextualInversion:
    checked = recipe.check(content, "test")
    return TextualInversion(checked, Place(Path(checked.out), torch.device("cpu"), lambda *_: None))


def train(content: dict[str, Any], resume: bool = False, watch: loop.Watch | None = None) -> Path:
    outcome = loop.train(recipe.check(content, "test"), resume, watch)
    assert outcome.finished
    return outcome.folder / loop.MODEL


def network(made: TextualInversion) -> Steered:
    found = made.trained["network"]
    assert isinstance(found, Steered)
    return found


def test_overfits_one_batch(tmp_path: Path, native: Path) -> None:
    """A secret word is found again from what the network says of it: at the noisy end of a flow, x is the noise alone,
    so that pictures can be made for which the secret word is the perfect answer.
    """
    made = job(plan(tmp_path, native, word={"vectors": 3}))
    batch, (table,) = made.draw(0), rows(network(made).text).values()
    schedule = made.core.process.schedule
    assert isinstance(schedule, RectifiedFlow)
    batch["t"] = torch.full_like(batch["t"], schedule.clock)
    start, secret = table.rows.detach().clone(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        table.rows.add_(torch.randn(table.rows.shape, generator=secret))
        raw, _ = made.core.raw(network(made), batch)
        batch["clean"] = batch["noise"] - raw
        assert float(made.loss(batch, 0)[0]) < 1e-9
        table.rows.copy_(start)
    optimiser = torch.optim.AdamW([table.rows], lr=5e-2, weight_decay=0.0)
    losses: list[float] = []
    for _ in range(60):
        loss, _ = made.loss(batch, 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0], losses


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd35", "klein", "ldm", "ours"])
def test_only_the_new_rows_move_and_generation_reads_them(
    tmp_path: Path, place: Path, native: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run: backbone, codec and every text table are the base's to the bit, and the file is the network."""
    writers: dict[str, Callable[[Path], Path]] = {"sd1": sd1, "sdxl": sdxl, "sd35": sd35, "klein": klein, "ldm": ldm}
    base = writers[name](place) if name in writers else native
    kept: list[Steered] = []
    save = TextualInversion.save

    def keep(self: TextualInversion, network: nn.Module, folder: Path) -> None:
        assert isinstance(network, Steered)
        kept.append(network)
        save(self, network, folder)

    monkeypatch.setattr(TextualInversion, "save", keep)
    made = train(plan(tmp_path, base, steps=2))
    (end,), before = kept, loaded(base)
    assert before.text is not None
    first = job(plan(tmp_path, base, "start"))
    start = {folder: table.rows.detach() for folder, table in rows(network(first).text).items()}
    assert start.keys() == before.text.tables().keys()  # every encoder of the family has learnt the word
    for folder, table in rows(end.text).items():
        assert (table.rows - start[folder]).abs().amax(1).min() > 1e-3  # each vector moved
    ours: dict[str, Tensor] = {f"backbone.{k}": v for k, v in before.backbone.state_dict().items()}
    for folder, net in before.text.networks.items():
        ours |= {f"text.{folder}.{k}": v for k, v in net.state_dict().items()}
    found = end.state_dict()
    assert {key for key in found if key not in ours} == {key for key in found if key.endswith(".rows")}
    assert all(torch.equal(found[key], value) for key, value in ours.items())
    assert [n for n, p in end.named_parameters() if p.requires_grad] == [n for n in found if n.endswith(".rows")]

    wish = request(before, f"a {WORD} crack", steps=2)
    if name == "ours":
        wish = mz.Request(prompt=f"a {WORD} crack", steps=2, width=32, height=32)
    drawn = mz.generate(replace(before, backbone=end.backbone, text=end.text), wish).latents
    assert torch.equal(mz.generate(before, replace(wish, embedding=[made])).latents, drawn)
    assert torch.equal(mz.generate(before, replace(wish, embedding=[made / FILE])).latents, drawn)
    assert apart(mz.generate(before, wish).latents, drawn) > 1e-4


def test_one_step_is_the_references(tmp_path: Path, place: Path) -> None:
    """The loss, the gradient and the first step of textual inversion with diffusers and transformers, from its formula:
    noised latents, the prediction under the prompt, mean squared error to the noise, AdamW on the new rows alone.
    """
    made = job(plan(tmp_path, sd1(place), word={"initial": "crack"}))
    batch, rate = made.draw(0), 5e-3
    pipeline = fresh(sd1(place))
    unet, encoder, tokenizer = pipeline.unet, pipeline.text_encoder, pipeline.tokenizer
    unet.requires_grad_(False)
    encoder.requires_grad_(False)
    initial = tokenizer("crack", add_special_tokens=False).input_ids
    table = encoder.get_input_embeddings().weight.detach()
    assert len(initial) == 1
    learned = nn.Parameter(table[initial].expand(2, -1).clone())
    tokens = [WORD, f"{WORD}_1"]
    tokenizer.add_tokens(tokens)
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    numbers = tokenizer.convert_tokens_to_ids(tokens)
    weight = encoder.get_input_embeddings().weight
    weight.data[numbers] = learned.data
    weight.requires_grad_(True)
    captions = made.core.captions
    assert captions is not None
    prompts = captions.texts(batch["caption"])
    assert all(WORD in prompt for prompt in prompts)
    said = [prompt.replace(WORD, " ".join(tokens)) for prompt in prompts]
    ids = tokenizer(said, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(batch["clean"], batch["noise"], batch["t"])
    raw = unet(noisy, batch["t"], encoder_hidden_states=encoder(ids)[0]).sample
    expected = torch.nn.functional.mse_loss(raw, batch["noise"])
    expected.backward()
    gradient = weight.grad[numbers]
    loss, _ = made.loss(batch, 0)
    loss.backward()
    (mine,) = rows(network(made).text).values()
    assert mine.rows.grad is not None
    assert abs(float(loss.detach() - expected.detach())) < 1e-6 * float(expected.detach())
    assert relative(mine.rows.grad, gradient) < 1e-4
    learned.grad = mine.rows.grad.clone()  # Adam's first step is a sign: it has to see the same rounding
    ends = []
    for parameter in (learned, mine.rows):
        torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0).step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_vectors_stay_exact_where_the_base_is_narrow(tmp_path: Path, native: Path, precision: str) -> None:
    """A base in bfloat16 computes as it does in generation, and the word learns in float32 beside it."""
    narrow = {"base": {"path": str(native), "dtype": "bfloat16"}, "precision": precision}
    made, whole = job({**plan(tmp_path, native), **narrow}), job(plan(tmp_path, native))
    first, other = (rows(network(one).text)["text_encoder"] for one in (made, whole))
    assert first.rows.dtype == torch.float32 and first.weight.dtype == torch.float32  # MiniLM is never narrowed
    assert next(network(made).backbone.parameters()).dtype == torch.bfloat16
    for one in (made, whole):
        one.loss(one.draw(0), 0)[0].backward()
    assert first.rows.grad is not None and other.rows.grad is not None
    assert relative(first.rows.grad, other.rows.grad) < 0.1  # eight bits of the backbone's
    out = train({**plan(tmp_path, native, steps=2), **narrow})
    assert load_file(out / FILE)[WORD].dtype == torch.float32


def test_the_prompts_of_a_step_are_its_own(tmp_path: Path, native: Path) -> None:
    content = plan(tmp_path, native, batch=4)
    first, second = job(content), job({**content, "seed": 1})
    captions = first.core.captions
    assert captions is not None
    drawn = [captions.texts(first.draw(step)["caption"]) for step in range(30)]
    assert drawn == [captions.texts(first.draw(step)["caption"]) for step in range(30)]
    assert drawn != [captions.texts(second.draw(step)["caption"]) for step in range(30)]
    said = [prompt for prompts in drawn for prompt in prompts]
    assert set(said) == {template.replace("{}", WORD) for template in TEMPLATES}  # none is dropped
    dropped = job({**content, "text": {"dropout": 0.5}})
    share = [prompt == "" for step in range(30) for prompt in captions.texts(dropped.draw(step)["caption"])]
    assert 0.3 < sum(share) / len(share) < 0.7


def test_captions_that_hold_the_word_are_used_as_they_are(tmp_path: Path, native: Path) -> None:
    folder = image_folder(tmp_path / "named", 4, size=32)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    said = [f"a {WORD} crack", f"{WORD} on steel", f"the {WORD}", f"a {WORD} crack"]
    told = [{**line, "text": text} for line, text in zip(lines, said, strict=True)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    data = {"folder": str(folder), "size": [16, 16]}
    made = job(plan(tmp_path, native, word={"templates": []}, data=data))
    captions = made.core.captions
    assert captions is not None
    for step in range(4):
        batch = made.draw(step)
        assert captions.texts(batch["caption"]) == [said[int(name.split(".")[0])] for name in made.names(batch)]
    told[2]["text"] = "the plate"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    with pytest.raises(InputError, match=r"named: the caption of 2.png does not hold <plate>"):
        job(plan(tmp_path, native, word={"templates": []}, data=data))


class Killed(Exception):
    pass


@pytest.mark.parametrize("average", [0.0, 0.7])
def test_pain_21_a_killed_run_goes_on_to_the_same_vectors(tmp_path: Path, native: Path, average: float) -> None:
    changes: dict[str, Any] = {"steps": 7, "accumulation": 2, "ema": {"decay": average}}
    whole = train(plan(tmp_path, native, "whole", **changes))
    broken = plan(tmp_path, native, "broken", **changes)
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
    again = train(broken, resume=True)
    (key,) = kept[0]  # a checkpoint holds the vectors, and nothing that is the base's
    assert key.endswith("word_embeddings.rows") and not torch.equal(kept[0][key], kept[1][key])
    first, second = load_file(whole / FILE), load_file(again / FILE)
    assert first.keys() == second.keys() == {WORD}
    assert torch.equal(first[WORD], second[WORD]) and not torch.equal(first[WORD], kept[1][key])
    losses = [[r["loss"] for r in metrics.read(root.parent) if "loss" in r] for root in (whole, again)]
    assert losses[0] == losses[1] and len(losses[0]) == 7


def test_the_file_opens_in_diffusers_with_the_same_picture(tmp_path: Path, place: Path) -> None:
    made = train(plan(tmp_path, sd1(place)))
    pipeline, before = fresh(sd1(place)), loaded(sd1(place))
    pipeline.load_textual_inversion(str(made / FILE))
    wish = request(before, f"a {WORD} cell, {WORD}", sampler="ddim", negative=f"the {WORD}")
    expected = theirs(pipeline, wish)
    assert apart(mz.generate(before, replace(wish, embedding=[made])).latents, expected) < 2e-4
    assert apart(mz.generate(before, wish).latents, expected) > 1e-3


def test_the_file_carries_its_contract(tmp_path: Path, place: Path, native: Path) -> None:
    made = train(plan(tmp_path, sdxl(place), word={"vectors": 1}))
    with safe_open(str(made / FILE), framework="pt") as file:
        header = file.metadata()
        assert set(file.keys()) == {"clip_l", "clip_g"}  # as published files of two encoders
    contract, base = AdapterContract.from_header(header), loaded(sdxl(place)).contract
    assert contract is not None
    assert (contract.kind, contract.family, contract.words) == ("embedding", "sdxl", (WORD,))
    assert contract.process == base.process and contract.base and contract.lineage.base == contract.base
    assert contract.lineage.steps == 4 and contract.lineage.dataset
    for path in (made, made / FILE):
        facts = examine(path)
        assert (facts["kind"], facts["words"], facts["family"]) == ("textual inversion", {WORD: 1}, "sdxl")
        assert facts["contract"]["lineage"] == contract.lineage.model_dump(mode="json")
    with pytest.raises(InputError, match=r"learned_embeds.safetensors: the word '<plate>' has vectors of 64 and 128"):
        adapted(loaded(native), embedding=[made])
    tensors = load_file(made / FILE)
    assert contract.process.prediction is Prediction.EPSILON
    other = contract.model_copy(update={"process": replace(contract.process, prediction=Prediction.VELOCITY)})
    save_file(tensors, tmp_path / "other.safetensors", other.to_header())
    with pytest.raises(InputError, match=r"prediction is 'epsilon' in .*base but 'velocity' in .*other"):
        adapted(loaded(sdxl(place)), embedding=[tmp_path / "other.safetensors"])


def test_t5_learns_where_the_recipe_lets_it(tmp_path: Path, place: Path) -> None:
    clips = ["text_encoder", "text_encoder_2"]
    part = job(plan(tmp_path, sd35(place), word={"encoders": clips}))
    assert list(rows(network(part).text)) == clips
    part.save(network(part), tmp_path / "model")
    assert set(load_file(tmp_path / "model" / FILE)) == {"clip_l", "clip_g"}
    text = adapted(loaded(sd35(place)), embedding=[tmp_path / "model"]).text
    assert text is not None and list(rows(text)) == clips
    with pytest.raises(InputError, match="as many vectors for each of 2 encoders"):
        job(plan(tmp_path, sd35(place), word={"encoders": clips[:1]}))


@pytest.mark.parametrize(
    ("said", "count", "expected"),
    [
        ("crack", 1, [[0]]),
        ("crack", 3, [[0], [0], [0]]),
        ("dark area scratch", 1, [[0, 1, 2]]),
        ("dark area scratch", 3, [[0], [1], [2]]),
        ("dark area", 3, [[0], [0, 1], [1]]),
        ("dark area scratch steel", 2, [[0, 1], [2, 3]]),
    ],
)
def test_a_word_begins_as_the_words_it_is_told(native: Path, said: str, count: int, expected: list[list[int]]) -> None:
    """One vector a token; means of neighbours where there are more tokens than vectors, and between them."""
    model = loaded(native)
    assert model.text is not None
    table = tables.TextualInversion(word=WORD, vectors=count, initial=said)
    text = textual_inversion.with_word(model, table)
    (found,) = rows(text).values()
    tokens = model.text.vectors(said)["text_encoder"]
    for row, group in zip(found.rows, expected, strict=True):
        mean = tokens[group].mean(0)
        assert torch.equal(row, mean) if len(group) == 1 else relative(row, mean) < 1e-6


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ({"word": "crack"}, "has 'crack' already"),
        ({"word": "a thing"}, "one word without spaces"),
        ({"word": ""}, "one word without spaces"),
        ({"initial": "zebra"}, "does not know 'zebra'"),
        ({"initial": " "}, "does not know ' '"),
        ({"templates": ["a photo"]}, r"'a photo' has no place \{\} for the word"),
        ({"encoders": ["text_encoder_2"]}, "has no text_encoder_2; it has text_encoder"),
        ({"vectors": 0}, "vectors"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    tmp_path: Path, native: Path, word: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        job(plan(tmp_path, native, word=word))
    assert not (tmp_path / "run").exists()


def test_a_base_without_text_is_refused(tmp_path: Path, place: Path) -> None:
    from parts import class_model

    families.save(class_model(size=(32, 32)), place / "classes")
    with pytest.raises(InputError, match="classes reads no text"):
        job(plan(tmp_path, place / "classes"))


def test_another_programs_file_needs_no_contract(tmp_path: Path, native: Path) -> None:
    save_file({"<other>": torch.randn(1, 16)}, tmp_path / "other.safetensors")
    text = adapted(loaded(native), embedding=[tmp_path / "other.safetensors"]).text
    assert text is not None and list(rows(text)) == ["text_encoder"]

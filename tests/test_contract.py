"""The agreement that travels with weights: read back exactly, every mismatch named with both sides and both files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parts import CLASSES, EPSILON, FLOW, bert_folder, changed, class_model, kl_codec, model, plain_unet
from torch import nn

from mezzotint.codec import Codec, LatentSpace
from mezzotint.codec.pixels import Pixels, PixelsConfig
from mezzotint.contract import (
    FILE,
    ClassFacts,
    Contract,
    DtypeFacts,
    EncoderFacts,
    GuidanceFacts,
    LatentFacts,
    Licence,
    Lineage,
    SamplingFacts,
    TextFacts,
    check_backbone,
    check_cache,
    check_codec,
    check_finetune,
    check_text,
    read_contract,
    write_contract,
)  # fmt: skip
from mezzotint.digests import module_digest, tensors_digest
from mezzotint.errors import InputError
from mezzotint.process import Prediction, Process, schedules
from mezzotint.text import minilm

HERE, THERE = Path("here/contract.json"), Path("there/vae")


MINILM = EncoderFacts(
    encoder="minilm", digest="t" * 64, layers=(-1,), length=64, padding="mask", pooling="mean", width=384
)  # fmt: skip


def full() -> Contract:
    return Contract(
        process=Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY),
        latent=LatentFacts(codec="c" * 64, channels=2, factor=8, pixel_channels=1, scale=(0.5, 2.0), shift=(0.1, -3.0)),
        size=(128, 96),
        weights="w" * 64,
        text=TextFacts(encoders=(MINILM, MINILM.model_copy(update={"layers": (9, 18)})), width=384, empty="zeros"),
        classes=ClassFacts(names=CLASSES, null=3),
        inpaint=4,
        guidance=GuidanceFacts(dropout=0.1, scale=4.0),
        sampling=SamplingFacts(sampler="dpmpp_2m", steps=20),
        dtypes=DtypeFacts(backbone=("float32",)),
        licence=Licence(weights="CC-BY-NC-SA-4.0", data="CC-BY-NC-SA-4.0"),
        lineage=Lineage(base="b" * 64, dataset="d" * 64, recipe="r" * 64, code="0.1.0", seed=7, steps=9000),
    )


def test_it_is_read_back_exactly(tmp_path: Path) -> None:
    write_contract(full(), tmp_path)
    assert read_contract(tmp_path) == full() == read_contract(tmp_path / FILE)
    assert read_contract(tmp_path).process == full().process


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d | {"guidence": {}}, "guidence: unknown key, nearest valid name: guidance"),
        (lambda d: d | {"latent": d["latent"] | {"chanels": 4}}, "latent.chanels: unknown key, .*: channels"),
        (lambda d: d | {"version": 2}, "2, but this Mezzotint reads contract version 1"),
        (lambda d: {k: v for k, v in d.items() if k != "latent"}, "latent: Field required"),
        (lambda d: d | {"process": d["process"] | {"prediction": "epsilom"}}, "did you mean 'epsilon'"),
        (lambda d: d | {"process": 3}, "contract.json"),
        (lambda d: d | {"process": {"prediction": "flow", "schedule": 3}}, "contract.json"),
        (lambda d: d | {"size": [128]}, "size"),
        (lambda d: d | {"latent": d["latent"] | {"scale": "NaN"}}, "latent.scale"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, change, says: str) -> None:
    (tmp_path / FILE).write_text(json.dumps(change(full().model_dump(mode="json"))))
    with pytest.raises(InputError, match=says) as error:
        read_contract(tmp_path)
    assert str(tmp_path / FILE) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_missing_or_broken_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"contract\.json is missing.*Restore it"):
        read_contract(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(InputError, match="Invalid JSON"):
        read_contract(tmp_path)


def test_pain_01_v_prediction_on_epsilon_weights_is_refused_and_force_is_remembered() -> None:
    base = class_model().contract
    recipe = Process(schedules.scaled_linear(), Prediction.VELOCITY)
    with pytest.raises(InputError) as error:
        check_finetune(base, HERE, recipe, Path("recipe.toml"))
    assert "process.prediction is 'epsilon' in here/contract.json but 'velocity' in recipe.toml" in str(error.value)
    forced = check_finetune(base, HERE, recipe, Path("recipe.toml"), force=True)
    assert forced.lineage.overrides == (
        "process.prediction is 'epsilon' in here/contract.json but 'velocity' in recipe.toml",
    )
    assert check_finetune(base, HERE, EPSILON, Path("recipe.toml")) == base


def test_a_schedule_that_differs_in_one_number_is_named_by_it() -> None:
    base = class_model().contract
    recipe = Process(schedules.scaled_linear(beta_end=0.0125), Prediction.EPSILON)
    with pytest.raises(InputError, match=r"process\.schedule\.beta_end is 0\.012 in .* but 0\.0125 in recipe\.toml"):
        check_finetune(base, HERE, recipe, Path("recipe.toml"))
    with pytest.raises(InputError, match=r"process\.schedule\.kind is 'discrete' .* but 'rectified_flow'"):
        check_finetune(base, HERE, FLOW, Path("recipe.toml"))


def test_pain_05_a_forgotten_shift_is_a_mismatch() -> None:
    codec = kl_codec()
    contract = model(plain_unet(4, 4), codec).contract
    assert check_codec(contract, HERE, codec, THERE) == contract
    forgotten = Codec(codec.autoencoder, LatentSpace(scale=0.7))
    with pytest.raises(InputError, match=r"latent\.shift is 0\.05 in here/contract\.json but 0\.0 in there/vae"):
        check_codec(contract, HERE, forgotten, THERE)


def test_a_codec_with_one_other_weight_is_another_codec() -> None:
    codec = kl_codec()
    contract = model(plain_unet(4, 4), codec).contract
    with torch.no_grad():
        next(codec.autoencoder.parameters()).view(-1)[0] += 1e-6
    digest = r"'[0-9a-f]{12}\.\.\.'"
    with pytest.raises(InputError, match=rf"latent\.codec is {digest} in here.* but {digest} in there/vae"):
        check_codec(contract, HERE, codec, THERE)
    assert "latent.codec" in check_codec(contract, HERE, codec, THERE, force=True).lineage.overrides[0]


def test_latents_of_another_codec_are_refused() -> None:
    ours, theirs = LatentFacts.of(kl_codec()), LatentFacts.of(Codec(Pixels(PixelsConfig(3))))
    assert check_cache(ours, HERE, ours, THERE) == []
    with pytest.raises(InputError, match=r"latent\.channels is 4 in here.* but 3 in there.*; latent\.factor is 4"):
        check_cache(ours, HERE, theirs, THERE)


def test_another_text_encoder_or_another_way_to_read_it_is_refused(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "a")
    encoder = minilm.load_folder(folder, length=10)
    contract = changed(class_model().contract, text=TextFacts.of(encoder))
    assert check_text(contract, HERE, TextFacts.of(minilm.load_folder(folder, length=10)), THERE) == contract
    with pytest.raises(InputError, match=r"text\.encoders\.0\.length is 10 in here.* but 8 in there"):
        check_text(contract, HERE, TextFacts.of(minilm.load_folder(folder, length=8)), THERE)
    other = minilm.load_folder(bert_folder(tmp_path / "b", seed=1), length=10, name="a")
    with pytest.raises(InputError, match=r"text\.encoders\.0\.digest is "):
        check_text(contract, HERE, TextFacts.of(other), THERE)
    with pytest.raises(InputError, match=r"text is \{.* in here.* but None in there"):
        check_text(contract, HERE, None, THERE)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"in_channels": 4, "out_channels": 3, "classes": 4}, "in_channels is 3 in .* but 4 in"),
        ({"in_channels": 3, "out_channels": 6, "classes": 4}, "out_channels is 3 in .* but 6 in"),
        ({"in_channels": 3, "out_channels": 3, "classes": 1001}, "classes is 4 in .* but 1001 in"),
        ({"in_channels": 3, "out_channels": 3, "classes": 4, "tokens": 384}, "tokens is None in .* but 384 in"),
    ],
)
def test_a_backbone_of_another_shape_is_refused(facts: dict[str, int | None], says: str) -> None:
    contract = class_model().contract
    fits: dict[str, int | None] = {"in_channels": 3, "out_channels": 3, "classes": 4, "tokens": None}
    assert check_backbone(contract, HERE, fits, contract.weights, THERE) == contract
    with pytest.raises(InputError, match=says):
        check_backbone(contract, HERE, facts, contract.weights, THERE)


def test_inpainting_channels_are_mask_maps_and_masked_latents_beside_the_latents() -> None:
    """The solar-cell layout: 16 latent channels, k = 4: 16 + 16 + 16."""
    latent = LatentFacts(codec="", channels=16, factor=8, pixel_channels=1)
    contract = changed(class_model().contract, latent=latent, inpaint=4)
    check_backbone(contract, HERE, {"in_channels": 48, "out_channels": 16}, "", THERE)
    stable_diffusion = changed(contract, latent=latent.model_copy(update={"channels": 4}), inpaint=1)
    check_backbone(stable_diffusion, HERE, {"in_channels": 9, "out_channels": 4}, "", THERE)


def test_overrides_add_up_and_are_not_repeated() -> None:
    contract = full().overridden(["a"]).overridden(["b", "a"])
    assert contract.lineage.overrides == ("a", "b")


def test_digests_are_of_values_and_not_of_storage() -> None:
    halves = {"b": torch.randn(3, 5).half(), "a": torch.randn(7).bfloat16(), "n": torch.tensor(3)}
    digest = tensors_digest(halves)
    assert digest == tensors_digest({name: halves[name].float() for name in ("a", "b")} | {"n": halves["n"]})
    assert digest == tensors_digest(halves | {"b": halves["b"].t().contiguous().t()})
    assert digest != tensors_digest(halves | {"b": halves["b"].t()})
    assert digest != tensors_digest({("c" if name == "a" else name): t for name, t in halves.items()})
    nudged = halves["a"].clone()
    nudged.view(torch.int16)[3] += 1
    assert digest != tensors_digest(halves | {"a": nudged})


def test_a_networks_digest_follows_its_settings_but_not_their_defaults() -> None:
    network = nn.Linear(2, 2)
    assert module_digest(network, PixelsConfig(1)) != module_digest(network, PixelsConfig(3))
    assert module_digest(network, PixelsConfig(3)) == module_digest(network, PixelsConfig())


def test_a_scale_that_loses_everything_is_refused() -> None:
    with pytest.raises(InputError, match="scale 0"):
        LatentSpace(scale=(1.0, 0.0))

"""From a picture drawn with a LoRA to the images of the LoRA, to its base, and to the images of the base."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from training_parts import full_recipe, image_folder

import mezzotint as mz
from mezzotint.errors import Refused
from mezzotint.governance.policy import Policy
from mezzotint.pipeline.chain import of_picture
from mezzotint.pipeline.places import Chain, Places
from mezzotint.training import loop, recipe

pytest.importorskip("peft")


@dataclass(frozen=True)
class Works:
    """A base and a LoRA as training leaves them, and a picture of both."""

    root: Path

    @property
    def lora(self) -> Path:
        return self.root / "cracks" / "model"

    @property
    def base(self) -> Path:
        return self.root / "base" / "model"

    @property
    def picture(self) -> Path:
        return self.root / "0.png"

    def walk(self, **places: Any) -> Chain:
        return of_picture(self.picture, Places(**places))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Works:
    root = tmp_path_factory.mktemp("works")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MEZZOTINT_HOME", str(root / "home"))
        image_folder(root / "train", 4)
        image_folder(root / "cracks-train", 6)
        plan = full_recipe(root, "base", steps=1, checkpoints={"every": 1}, validation={"every": 1},
                           licence="Apache-2.0", data_licence="CC-BY-4.0")  # fmt: skip
        del plan["inpaint"]
        loop.train(recipe.check(plan, "base"))
        lora = {"method": "lora", "out": str(root / "cracks"), "base": {"path": str(root / "base" / "model")},
                "steps": 1, "batch": 2, "threads": 1, "lora": {"rank": 2}, "data_licence": "CC-BY-NC-4.0",
                "data": {"folder": str(root / "cracks-train"), "size": [16, 16], "channels": 1},
                "checkpoints": {"every": 1}, "validation": {"every": 1}}  # fmt: skip
        loop.train(recipe.check(lora, "cracks"))
        works = Works(root)
        wish = mz.Request(label=1, seed=3, guidance=1.0, lora=[(works.lora, 1.0)])
        (artifact,) = mz.pipeline(mz.load(works.base)).run(wish)
        works.picture.write_bytes(artifact.data)
    return works


@pytest.fixture
def works(built: Works, monkeypatch: pytest.MonkeyPatch) -> Works:
    monkeypatch.setenv("MEZZOTINT_HOME", str(built.root / "home"))
    return built


def names(chain: Chain) -> list[tuple[str, str]]:
    return [(hop.what, hop.place) for hop in chain.hops]


def test_the_way_leads_through_the_adapter_to_its_base_and_both_data_sets(works: Works) -> None:
    chain = works.walk()
    wrong = {hop.what: hop.says for hop in chain.hops if hop.holds is not True and hop.what != "watermark"}
    assert chain.holds and not wrong, wrong
    images = [hop for hop in chain.hops if hop.what == "training images"]
    assert {Path(hop.place).name: len(hop.facts["files"]) for hop in images} == {"cracks-train": 10, "train": 7}
    assert {hop.facts["licence"] for hop in images} == {"CC-BY-NC-4.0", "CC-BY-4.0"}
    assert ("base of the model", str(works.base)) in names(chain)


def test_what_is_made_from_it_is_under_the_licences_of_both(works: Works) -> None:
    facts = json.loads((works.lora / "lineage" / "facts.json").read_text())
    assert (facts["licence"], facts["base_licence"], facts["data_licence"]) == ("Apache-2.0",) * 2 + ("CC-BY-NC-4.0",)
    assert facts["base"] == mz.load(works.base).contract.weights
    wish = mz.Request(label=1, lora=[(works.lora, 1.0)], guidance=1.0)
    house = mz.pipeline(mz.load(works.base), Policy.model_validate({"name": "sold", "licence": {"use": "commercial"}}))
    house.run(mz.Request(label=1, guidance=1.0))
    with pytest.raises(Refused, match=r"the licence of the data of model \(CC-BY-NC-4.0\) forbids commercial use"):
        house.run(wish)


@pytest.mark.parametrize(
    ("file", "hop", "said"),
    [
        ("cracks/model/pytorch_lora_weights.safetensors", "adapter", "was changed"),
        ("cracks/model/kohya.safetensors", "signature of the model", "kohya.safetensors"),
        ("cracks/model/lineage/facts.json", "attestation of the training", "facts.json"),
        ("cracks-train/1.png", "training images", "1.png was changed"),
        ("base/model/lineage/mlbom.cdx.json", "attestation of the training", "mlbom.cdx.json"),
        ("train/2.png", "training images", "2.png was changed"),
    ],
)
def test_one_byte_changed_in_the_adapter_or_behind_it_is_found(works: Works, file: str, hop: str, said: str) -> None:
    path = works.root / file
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    try:
        chain = works.walk()
        found = [(each.what, each.says) for each in chain.hops if each.holds is False]
        assert not chain.holds and any(what == hop and said in says for what, says in found), found
    finally:
        path.write_bytes(content)


def test_moved_data_sets_are_told_apart_by_what_they_hold(works: Works, tmp_path: Path) -> None:
    own, others = works.root / "cracks-train", tmp_path / "elsewhere"
    own.rename(others)
    try:
        chain = works.walk()
        assert chain.holds and [hop.holds for hop in chain.hops if hop.what == "training images"].count(None) == 1
        chain = works.walk(data=(others,))
        found = {Path(hop.place).name: hop.holds for hop in chain.hops if hop.what == "training images"}
        assert found["elsewhere"] is True and chain.holds
    finally:
        others.rename(own)

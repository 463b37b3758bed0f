"""From a picture back to its training images: every hop holds, and one thing changed at any hop is found and named."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import class_model
from PIL import Image

import mezzotint as mz
from mezzotint import files
from mezzotint.cli.main import main
from mezzotint.contract import Licence, Lineage
from mezzotint.data import manifest, metadata
from mezzotint.families import load, save
from mezzotint.governance import audit, certificates, lineage
from mezzotint.governance.hop import Hop
from mezzotint.governance.lineage import Trained
from mezzotint.pipeline.chain import of_picture
from mezzotint.pipeline.places import Chain, Places
from mezzotint.request import Request

LICENCE = "CC-BY-NC-SA-4.0"


@dataclass(frozen=True)
class House:
    """A model with its training images and lineage, and a picture that it drew."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> Path:
        return self.root / "cells"

    @property
    def picture(self) -> Path:
        return self.root / "out" / "0.png"

    @property
    def log(self) -> Path:
        return self.root / "home" / "audit.jsonl"

    def walk(self, **places: Any) -> Chain:
        return of_picture(self.picture, Places(**places))


def built(root: Path) -> House:
    house = House(root)
    rows = []
    house.data.mkdir(parents=True)
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(house.data / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": ""})
    (house.data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = manifest.manifest(house.data, metadata.read(house.data))
    model = class_model()
    facts = {"licence": Licence(weights="Apache-2.0", data=LICENCE), "lineage": Lineage(dataset=told.digest)}
    save(replace(model, contract=model.contract.model_copy(update=facts)), house.model)
    lineage.written(house.model, Trained(
        name="cells", method="full", kind="model", recipe={"seed": 0}, contract={"family": "native"},
        data=told.to_dict(), base=None, licence="Apache-2.0", data_licence=LICENCE, base_licence=None,
        started="2026-01-01T00:00:00+00:00", ended="2026-01-01T01:00:00+00:00", software={"mezzotint": "0.1.0"},
    ))  # fmt: skip
    (artifact,) = mz.pipeline(load(house.model)).run(Request(label="crack", seed=3, guidance=1.0))
    house.picture.parent.mkdir()
    house.picture.write_bytes(artifact.data)
    return house


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    return built(tmp_path)


def by_name(chain: Chain) -> dict[str, Hop]:
    return {hop.what: hop for hop in chain.hops}


def test_the_whole_way_holds(house: House) -> None:
    chain = house.walk()
    hops = by_name(chain)
    wrong = {hop.what: (hop.holds, hop.says) for hop in chain.hops if hop.holds is not True and hop.what != "watermark"}
    assert chain.holds and not wrong, wrong
    assert list(hops)[:3] == ["credentials of the picture", "audit log", "file in the log"]
    assert hops["training images"].digest == load(house.model).contract.lineage.dataset
    assert LICENCE in hops["training images"].says and len(hops["training images"].facts["files"]) == 6


def flipped(path: str, place: int = -40) -> Callable[[House], None]:
    def act(house: House) -> None:
        file = house.root / path
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(bytes(content))

    return act


def edited(path: str, old: str, new: str) -> Callable[[House], None]:
    def act(house: House) -> None:
        file = house.root / path
        content = file.read_text()
        assert old in content
        file.write_text(content.replace(old, new))

    return act


def pixels(house: House) -> None:
    content = bytearray(house.picture.read_bytes())
    content[content.rfind(b"IDAT") + 20] ^= 1
    house.picture.write_bytes(bytes(content))


def redrawn(house: House) -> None:
    """Other weights at the model's place."""
    other = class_model()
    with_noise = replace(other, backbone=other.backbone)
    next(iter(with_noise.backbone.parameters())).data.add_(0.5)
    save(replace(with_noise, contract=load(house.model).contract.model_copy(update={"weights": ""})), house.model)


def padding(house: House) -> None:
    """A byte in the room that the signature leaves in the file: neither signed nor a part of the picture."""
    content = house.picture.read_bytes()
    start = content.rfind(b"\0" * 64)
    house.picture.write_bytes(content[: start + 20] + b"\1" + content[start + 21 :])


@pytest.mark.parametrize(
    ("tamper", "hop", "said"),
    [
        (pixels, "credentials of the picture", "not the one that was signed"),
        (padding, "picture", "cannot be read"),
        (edited("home/audit.jsonl", '"seed":3', '"seed":4'), "audit log", "was changed"),
        (lambda house: house.log.write_text(""), "audit log", "missing at the end"),
        (flipped("model/unet/diffusion_pytorch_model.safetensors"), "model", "weights is"),
        (redrawn, "model", "its weights are"),
        (edited("model/contract.json", "Apache-2.0", "MIT"), "signature of the model", "contract.json"),
        (flipped("model/lineage/attestation.json", 200), "attestation of the training", ""),
        (edited("model/lineage/dataset.json", "1.png", "9.png"), "data set of the training", "it says"),
        (flipped("cells/2.png"), "training images", "2.png was changed"),
        (lambda house: (house.data / "4.png").unlink(), "training images", "4.png is missing"),
        (edited("cells/metadata.jsonl", "3.png", "2.png"), "training images", "metadata.jsonl was changed"),
    ],
)  # fmt: skip
def test_one_thing_changed_at_any_hop_is_found_and_named(
    tamper: Callable[[House], Any], hop: str, said: str, house: House
) -> None:
    tamper(house)
    chain = house.walk()
    found = [each for each in chain.hops if each.holds is False]
    assert not chain.holds and found, [(each.what, each.says) for each in chain.hops]
    assert any(each.what == hop and said in each.says for each in found), [(each.what, each.says) for each in found]


def saved(picture: Path, to: Path, **options: Any) -> Path:
    Image.open(picture).save(to, **options)
    return to


def test_a_stripped_file_is_found_by_its_pixels(house: House, tmp_path: Path) -> None:
    stripped = saved(house.picture, tmp_path / "stripped.png")
    chain = of_picture(stripped, Places())
    hops = by_name(chain)
    assert hops["credentials of the picture"].says == "the file carries no credentials"
    assert "in another file" in hops["file in the log"].says and chain.holds
    assert chain.record is not None and chain.record["seed"] == 3


def test_a_compressed_copy_is_found_by_its_watermark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    starter = Path(__file__).parent.parent / "models" / "solar-cells"
    for seed in (1, 2):
        (artifact,) = mz.pipeline(mz.load(starter)).run(Request(label=1, seed=seed, steps=8))
    copy = tmp_path / "copy.jpg"
    artifact.image.save(copy, quality=60)
    chain = of_picture(copy, Places(model=starter))
    hops = by_name(chain)
    assert hops["watermark"].holds and "one of the log in another file" in hops["watermark"].says
    assert chain.record is not None and chain.record["seed"] == 2
    plain = tmp_path / "plain.png"
    mz.generate(mz.load(starter), Request(label=1, seed=1, steps=8)).images[0].save(plain)
    unknown = of_picture(plain, Places(model=starter))
    assert not unknown.holds and by_name(unknown)["watermark"].holds is None


def test_a_foreign_signature_is_not_taken_for_ours(house: House, tmp_path: Path) -> None:
    other = certificates.init(tmp_path / "other", "Mallory")
    chain = house.walk(roots=(other / "root.pem",))
    assert "nobody here vouches for" in by_name(chain)["credentials of the picture"].says
    assert not chain.holds and by_name(chain)["signature of the model"].holds is False


def test_several_roots_may_be_trusted_at_once(house: House, tmp_path: Path) -> None:
    other, facts = certificates.init(tmp_path / "other", "Acme"), house.model / "lineage"
    told = {**json.loads((facts / "facts.json").read_text()), "data": json.loads((facts / "dataset.json").read_text())}
    lineage.written(house.model, Trained(**told), other)  # the model signed by one, the picture by another
    own = house.root / "home" / "certificates" / "root.pem"
    names = ("credentials of the picture", "signature of the model")
    assert [by_name(house.walk())[name].holds for name in names] == [True, None]
    assert [by_name(house.walk(roots=(own,)))[name].holds for name in names] == [True, False]
    assert [by_name(house.walk(roots=(own, other / "root.pem")))[name].holds for name in names] == [True, True]


def test_what_is_not_here_is_said_and_not_held_against_it(house: House, tmp_path: Path) -> None:
    house.data.rename(tmp_path / "moved")
    chain = house.walk()
    assert chain.holds and "not here" in by_name(chain)["training images"].says
    assert by_name(house.walk(data=(tmp_path / "moved",)))["training images"].holds
    house.model.rename(tmp_path / "elsewhere")
    gone = by_name(house.walk())
    assert gone["model"].holds is False or "--model" in gone["model"].says
    assert by_name(house.walk(model=tmp_path / "elsewhere", data=(tmp_path / "moved",)))["model"].holds


def test_the_commands_answer_by_exit_code_lines_and_page(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(house.picture)]) == 0
    out = capsys.readouterr().out
    assert "ok  credentials of the picture" in out and f"{house.picture} holds." in out
    assert main(["verify", str(house.model), "--json"]) == 0
    assert all(hop["holds"] for hop in json.loads(capsys.readouterr().out)["hops"])
    page = tmp_path / "trace.html"
    assert main(["trace", str(house.picture), "--html", str(page)]) == 0
    assert "0.png, 1.png" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 6 and "http" not in text and "<script" not in text
    assert "guidance</td><td><code>1.0" in text and "aesthetic" not in text and "guidance_interval" not in text
    flipped("cells/2.png")(house)
    assert main(["trace", str(house.picture)]) == 1
    assert "2.png was changed" in capsys.readouterr().out
    for wrong, said in (
        ([str(tmp_path / "none.png")], "no such file"),
        ([str(house.data / "metadata.jsonl")], "no picture that can be checked"),
    ):
        assert main(["verify", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert audit.check(house.log).whole


def test_a_picture_of_nobody_is_vouched_for_by_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    stream = io.BytesIO()
    Image.new("L", (32, 32), 90).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    chain = of_picture(tmp_path / "a.png", Places())
    assert not chain.holds and chain.record is None and all(hop.holds is None for hop in chain.hops)


def test_the_starter_s_own_lineage_is_whole_and_leads_to_its_images() -> None:
    starter = Path(__file__).parent.parent / "models" / "solar-cells"
    hops = lineage.checked(starter, starter / "lineage" / "root.pem")
    assert [hop.holds for hop in hops] == [True] * 5, [hop.says for hop in hops]
    told, contract = json.loads((starter / "lineage" / "facts.json").read_text()), load(starter).contract
    assert contract.lineage.recipe == files.sha256_json(told["recipe"]) and contract.lineage.base == told["base"]
    assert contract.lineage.dataset == told["data"]["digest"] and told["licence"] == contract.licence.weights

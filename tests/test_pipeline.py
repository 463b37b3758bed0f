"""The one way out: what is refused, marked, signed and written down, and that it can be found again."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import class_model
from PIL import Image

import mezzotint as mz
from mezzotint.cli.main import main
from mezzotint.contract import Licence
from mezzotint.errors import InputError, Refused
from mezzotint.families import Model
from mezzotint.governance import audit, certificates, credentials, shading, spread
from mezzotint.governance.policy import Policy, read_policy
from mezzotint.governance.prompts import Verdict
from mezzotint.pipeline import pixels_digest
from mezzotint.pipeline.inversion import inverted
from mezzotint.pipeline.marking import Mark
from mezzotint.request import Artifact, Request


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model() -> Model:
    return class_model()


def policy(**tables: dict[str, Any]) -> Policy:
    base = read_policy().model_dump(mode="json")
    return Policy.model_validate({**base, **{name: {**base[name], **table} for name, table in tables.items()}})


def root(at: Path) -> bytes:
    return (at / "certificates" / "root.pem").read_bytes()


def credentials_of(artifact: Artifact, at: Path) -> credentials.Credentials:
    return credentials.read(artifact.data, artifact.media, root(at))


def test_every_picture_is_signed_marked_and_in_the_log(model: Model, own_home: Path) -> None:
    request = Request(label="crack", count=3, seed=5)
    artifacts = mz.pipeline(model).run(request)
    rows = list(audit.rows(own_home / "audit.jsonl"))
    assert audit.check(own_home / "audit.jsonl").whole and [row.event for row in rows] == ["released"] * 3
    for i, (artifact, row) in enumerate(zip(artifacts, rows, strict=True)):
        found = credentials_of(artifact, own_home)
        assert found.state == "trusted" and found.source == "trainedAlgorithmicMedia"
        assert found.facts == credentials.public(artifact.record) == row.facts["record"]
        assert artifact.record["seed"] == 5 + i and artifact.record["governance"]["policy"]["name"] == "default"
        assert artifact.record["governance"]["filters"]["Open NSFW (Yahoo 2016)"] < 0.8
        assert row.facts["pixels_sha256"] == pixels_digest(artifact.image)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(artifact.data))), np.asarray(artifact.image))
    nonces = {artifact.record["governance"]["watermark"]["nonce"] for artifact in artifacts}
    assert len(nonces) == 3


def test_a_request_with_its_seed_gives_one_picture_and_the_mark_is_found(model: Model, own_home: Path) -> None:
    request = Request(label="crack", count=2, seed=5, guidance=1.0)
    first, second = (mz.pipeline(model).run(request) for _ in range(2))
    assert [pixels_digest(a.image) for a in first] == [pixels_digest(a.image) for a in second]
    alone = mz.pipeline(model).run(replace(request, count=1, seed=6))
    assert pixels_digest(alone[0].image) == pixels_digest(first[1].image)  # whatever else is in the batch
    key = shading.key_at()
    marks = [Mark.of(artifact.record["governance"]["watermark"]) for artifact in first]
    assert all(mark.method == "start noise" and mark.key == key.id for mark in marks)
    assert marks[0].payload[4:] == bytes.fromhex(model.contract.weights[:8] or "00000000") or not model.contract.weights
    plain = mz.generate(model, replace(request, start_noise=None))
    assert pixels_digest(plain.images[0]) != pixels_digest(first[0].image)


def test_a_mark_of_the_pipeline_is_read_from_the_starter_models_pictures(own_home: Path) -> None:
    starter = mz.load(Path(__file__).parent.parent / "models" / "solar-cells")
    (artifact,) = mz.pipeline(starter).run(Request(label=1, seed=3, steps=8))
    mark, key = Mark.of(artifact.record["governance"]["watermark"]), shading.key_at()
    found = shading.read(inverted(starter, [artifact.image], [Request()], 8)[0], key, mark.nonce, mark.payload)
    assert found.found() and found.payload == bytes.fromhex(key.id + starter.contract.weights[:8])
    assert artifact.record["governance"]["filters"]["distance to the nearest training image"] > 0.5


@pytest.mark.parametrize(
    "changes", [{"sampler": "ddpm"}, {"start_noise": torch.zeros(1, 3, 16, 16) + 0.1}, {"image": 1}]
)
def test_where_start_noise_cannot_carry_the_mark_pixels_do(
    changes: dict[str, Any], model: Model, own_home: Path
) -> None:
    if "image" in changes:
        changes = {"image": Image.new("RGB", (16, 16), (90, 120, 150)), "strength": 0.5}
    (artifact,) = mz.pipeline(model).run(Request(label=0, **changes))
    mark = Mark.of(artifact.record["governance"]["watermark"])
    assert mark.method == "pixels"
    plain = mz.pipeline(model, "off").run(Request(label=0, **changes))[0].image
    again = spread.marked(plain, shading.key_at(), mark.nonce, mark.payload)
    assert pixels_digest(again) == pixels_digest(artifact.image) != pixels_digest(plain)


def test_an_edit_keeps_what_is_black_and_names_its_parent(model: Model, own_home: Path) -> None:
    cell = Image.fromarray(np.random.default_rng(0).integers(60, 200, (16, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 16), 0)
    mask.paste(255, (4, 4, 12, 12))
    (artifact,) = mz.pipeline(model).run(Request(label=0, image=cell, mask=mask))
    outside = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(artifact.image)[outside], np.asarray(cell)[outside])
    found = credentials_of(artifact, own_home)
    assert found.source == "compositeWithTrainedAlgorithmicMedia" and len(found.parents) == 1


def test_a_refused_request_draws_nothing_and_is_written_down(model: Model, own_home: Path) -> None:
    desk = mz.pipeline(model, policy(prompts={"classes": ["crack"]}))
    with pytest.raises(Refused, match=r"policy 'default', prompts.classes: the class .* is not among those allowed"):
        desk.run(Request(label=0), watch=lambda *given: pytest.fail("drawn"))
    (row,) = audit.rows(own_home / "audit.jsonl")
    assert (row.event, row.facts["rule"], row.facts["asked"]["seed"]) == ("refused", "prompts.classes", 0)
    assert desk.run(Request(label="crack"))


def some(picture: Image.Image) -> Verdict:
    return Verdict(pixels_digest(picture)[0] < "8", "mine", "of the wrong half")


def never(picture: Image.Image) -> Verdict:
    return Verdict(False, "mine", "no picture at all")


def test_pictures_that_are_withheld_never_come_out(
    model: Model, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    plug = Path(__file__).stem
    request = Request(label=0, count=6)
    with pytest.raises(Refused, match="no picture at all"):
        mz.pipeline(model, policy(pictures={"plug": f"{plug}:never"})).run(request)
    rows = list(audit.rows(own_home / "audit.jsonl"))
    assert [row.event for row in rows] == ["withheld"] * 6 and rows[0].facts["says"] == "no picture at all"
    request = replace(request, count=12)
    with pytest.warns(UserWarning, match="of 12 pictures stay: of the wrong half"):
        artifacts = mz.pipeline(model, policy(pictures={"plug": f"{plug}:some"}, watermark={"mode": "off"})).run(
            request
        )
    assert 0 < len(artifacts) < 12 and all(pixels_digest(each.image)[0] < "8" for each in artifacts)


def test_a_licence_that_forbids_the_use_stops_it_or_is_recorded(model: Model, own_home: Path) -> None:
    narrow = replace(model, contract=model.contract.model_copy(
        update={"licence": Licence(weights="Apache-2.0", data="CC-BY-NC-SA-4.0")}))  # fmt: skip
    with pytest.raises(Refused, match=r"licence.forbidden: the licence of its data \(CC-BY-NC-SA-4.0\) forbids"):
        mz.pipeline(narrow, policy(licence={"use": "commercial"})).run(Request(label=0))
    allowed = policy(licence={"use": "commercial", "forbidden": "record"})
    (artifact,) = mz.pipeline(narrow, allowed).run(Request(label=0))
    told = artifact.record["governance"]["licences"]
    assert "forbids commercial use" in told["conflicts"][0] and "its data: share alike" in told["asks"]


def test_off_marks_and_signs_nothing_and_says_so(model: Model, own_home: Path) -> None:
    request = Request(label=0, seed=2)
    (artifact,) = mz.pipeline(model, "off").run(request)
    assert pixels_digest(artifact.image) == pixels_digest(mz.generate(model, request).images[0])
    told = artifact.record["governance"]
    assert told["policy"]["name"] == "off" and told["watermark"] is None and told["signature"] is None
    assert credentials.read(artifact.data, "image/png").state == "none" and not own_home.exists()


@pytest.mark.parametrize("media", credentials.MEDIA)
def test_other_media_types_carry_the_same(media: str, model: Model, own_home: Path) -> None:
    (artifact,) = mz.pipeline(model).run(Request(label=0), media=media)
    assert credentials_of(artifact, own_home).state == "trusted" and artifact.media == media


def test_keys_that_cannot_be_used_stop_before_anything_is_drawn(model: Model, own_home: Path, tmp_path: Path) -> None:
    mz.pipeline(model)
    (own_home / "watermark.key").chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        mz.pipeline(model)
    with pytest.raises(InputError, match="no such key"):
        mz.pipeline(model, policy(watermark={"key": str(tmp_path / "none")}))
    with pytest.raises(InputError, match="certs init"):
        mz.pipeline(model, policy(watermark={"mode": "off"}, signature={"certificates": str(tmp_path / "none")}))


def test_a_log_that_cannot_be_written_lets_nothing_out(model: Model, own_home: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Nothing is given out unlogged"):
        mz.pipeline(model, policy(audit={"file": str(tmp_path / "file" / "log")})).run(Request(label=0))


def test_the_command_line_signs_refuses_and_can_be_told_not_to(
    tiny_folder: Path, tmp_path: Path, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", "--model", str(tiny_folder), "--label", "mono crack", "--steps", "2"]
    assert main([*args, "--out", str(tmp_path / "a"), "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    file = tmp_path / "a" / said["file"]
    assert credentials.read(file.read_bytes(), "image/png", root(own_home)).state == "trusted"
    assert said["governance"]["watermark"]["method"] == "start noise"
    rules = tmp_path / "policy.toml"
    rules.write_text('name = "narrow"\n[prompts]\nclasses = ["poly crack"]\n')
    assert main([*args, "--out", str(tmp_path / "b"), "--policy", str(rules)]) == 1
    assert "refused by the policy 'narrow', prompts.classes" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    assert main([*args, "--out", str(tmp_path / "c"), "--policy", "off"]) == 0
    assert certificates.folder_of(None).exists()

"""What users give: types of images, masks, banks; and every mistake answered in a line, with exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mezzotint.cli.main import main
from mezzotint.contract import read_contract
from mezzotint.data import masks, metadata
from mezzotint.errors import InputError
from mezzotint.governance.prompts import Verdict
from mezzotint.pipeline.record import pixels_digest
from mezzotint.synthesis import classes, equip, recipe, shapes, sources

NAMES = ("mono healthy", "mono crack", "poly-healthy", "poly_crack", "poly hot spot")


def stripes(folder: Path, count: int, seed: int, across: bool) -> Path:
    """Images with stripes one way or the other."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    wave = 120 + 60 * np.sin(np.arange(32) * rng.uniform(1.2, 1.4, (count, 1)) + rng.uniform(0, 6, (count, 1)))
    for i, line in enumerate(wave):
        picture = np.broadcast_to(line[None] if across else line[:, None], (32, 32)) + rng.normal(0, 4, (32, 32))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{seed}_{i:02d}.png")
    return folder


def known() -> list[classes.Class]:
    return [classes.Class(i, n, *n.replace("-", " ").replace("_", " ").rsplit(" ", 1)) for i, n in enumerate(NAMES)]


def test_class_names_are_types_and_kinds(tiny_folder: Path) -> None:
    found = classes.classes(read_contract(tiny_folder))
    assert [(c.type, c.kind) for c in found[:2]] == [("mono", "healthy"), ("mono", "crack")]
    assert classes.defects(found, ()) == ["crack", "inactive", "finger"]
    assert classes.types(found) == ["mono", "poly"]
    assert classes.of(found, "poly", "finger").index == 7
    with pytest.raises(InputError, match="does not know the defect 'dent'; it knows: crack, inactive, finger"):
        classes.defects(found, ("dent",))


def test_types_come_from_the_recipe_the_metadata_or_the_neighbours(tmp_path: Path) -> None:
    model, good = tmp_path / "model", stripes(tmp_path / "good", 6, 0, across=True)
    stripes(tmp_path / "more", 6, 1, across=False)
    for path in (tmp_path / "more").iterdir():
        path.rename(good / path.name)
    model.mkdir()
    assert {s.type for s in sources.sources(good, known()[:2], None, model)} == {"mono"}
    assert {(s.type, s.known_by) for s in sources.sources(good, known(), "poly", model)} == {("poly", "asked")}
    with pytest.raises(InputError, match="--type"):
        sources.sources(good, known(), None, model)
    with pytest.raises(InputError, match="does not know the type 'quartz'"):
        sources.sources(good, known(), "quartz", model)
    examples = {
        name: sorted(stripes(tmp_path / name, 10, seed, across).iterdir())
        for name, seed, across in (("mono", 2, True), ("poly", 3, False))
    }
    sources.write_types(model / sources.TYPES, examples, 32, 32)
    for source in sources.sources(good, known(), None, model):
        assert source.type == ("mono" if source.path.name.startswith("0_") else "poly")
        assert source.known_by == "measured"
    assert sources.strangers(sorted(good.iterdir()), model / sources.TYPES) == (0, 12)
    for i in range(4):
        Image.effect_noise((32, 32), 90).save(good / f"noise{i}.png")
    assert sources.strangers(sorted(good.iterdir()), model / sources.TYPES) == (4, 16)
    for path in good.glob("noise*"):
        path.unlink()
    metadata.write(good, [{"file_name": "0_00.png", "type": "poly"}, {"file_name": "0_01.png", "label": 3}])
    found = {s.path.name: (s.type, s.known_by) for s in sources.sources(good, known(), None, model)}
    assert found["0_00.png"] == found["0_01.png"] == ("poly", "metadata")
    assert found["0_02.png"] == ("mono", "measured")
    (model / sources.TYPES).write_bytes(b"broken")
    with pytest.raises(InputError, match="Restore"):
        sources.sources(good, known(), None, model)


def test_user_masks_lie_where_they_were_drawn_and_thin_lines_survive_shrinking(tmp_path: Path) -> None:
    large = Image.new("L", (128, 128))
    ImageDraw.Draw(large).line([(10, 20), (110, 100)], fill=255, width=2)
    (tmp_path / "masks" / "crack").mkdir(parents=True)
    large.save(tmp_path / "masks" / "crack" / "a.png")
    found = shapes.shapes(tmp_path, tmp_path / "masks", ["crack", "finger"], 32, 32)
    rng = np.random.default_rng(0)
    drawn = found.draw("crack", np.zeros((32, 32), dtype=bool), None, rng)  # placed by the user: no place is asked for
    assert drawn.origin == "user" and drawn.file == str(tmp_path / "masks" / "crack" / "a.png")
    assert masks.components(drawn.mask)[1] == 1  # the line is whole
    rows, columns = np.nonzero(drawn.mask)
    assert (columns.min(), columns.max()) == (2, 27) and (rows.min(), rows.max()) == (5, 25)
    assert found.draw("finger", np.ones((32, 32), dtype=bool), None, rng).origin == "procedural"


def test_procedural_and_derived_masks_lie_inside(tmp_path: Path) -> None:
    bank = {
        "crack": [masks.crack(np.random.default_rng(i), 64, 64) for i in range(9)],
        "dent": [np.eye(64, dtype=bool)],
    }
    shapes.write_bank(tmp_path / shapes.BANK, bank, 64, 64)
    read = shapes.read_bank(tmp_path / shapes.BANK, 64, 64)
    assert all(np.array_equal(a, b) for kind in bank for a, b in zip(bank[kind], read[kind], strict=True))
    found = shapes.shapes(tmp_path, None, ["crack", "finger", "dent"], 64, 64)
    inside = np.zeros((64, 64), dtype=bool)
    inside[6:58, 6:58] = True
    origins = set()
    for seed in range(60):
        kind = ("crack", "finger", "dent")[seed % 3]
        drawn = found.draw(kind, inside, None, np.random.default_rng(seed))
        again = found.draw(kind, inside, None, np.random.default_rng(seed))
        assert np.array_equal(drawn.mask, again.mask) and drawn.origin == again.origin
        assert drawn.mask.any() and not (drawn.mask & ~inside).any()
        origins.add((kind, drawn.origin))
    assert origins == {("crack", "procedural"), ("crack", "derived"), ("finger", "procedural"), ("dent", "derived")}
    with pytest.raises(InputError, match="no masks for 'scratch'"):
        shapes.shapes(tmp_path, None, ["scratch"], 64, 64)
    with pytest.raises(InputError, match="found no place"):
        found.draw("crack", np.zeros((64, 64), dtype=bool), None, np.random.default_rng(0))
    (tmp_path / shapes.BANK).write_bytes(b"broken")
    with pytest.raises(InputError, match="Restore"):
        shapes.read_bank(tmp_path / shapes.BANK, 64, 64)


def test_moved_shifts_and_mirrors_without_wrapping() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[0, 0] = True
    seen = set()
    for seed in range(200):
        result = shapes.moved(mask, np.random.default_rng(seed))
        assert result.sum() <= 1
        seen |= {tuple(p) for p in np.argwhere(result).tolist()}
    assert all(min(y, 15 - y) <= 2 and min(x, 15 - x) <= 2 for y, x in seen) and len(seen) > 20


def test_a_model_is_equipped_from_its_training_folder(tiny_folder: Path, tmp_path: Path) -> None:
    model, train = tmp_path / "model", stripes(tmp_path / "train", 6, 0, across=True)
    model.mkdir()
    (model / "contract.json").write_bytes((tiny_folder / "contract.json").read_bytes())
    scar = masks.crack(np.random.default_rng(3), 32, 32)
    Image.fromarray(np.where(scar, 255, 0).astype(np.uint8)).save(train / "mask.png")
    rows = [{"file_name": f"0_{i:02d}.png", "label": (0, 4)[i % 2]} for i in range(5)]
    metadata.write(train, [*rows, {"file_name": "0_05.png", "label": 5, "mask": "mask.png"}])
    assert equip.equip(model, train) == {"crack masks": 1, "mono examples": 3, "poly examples": 2}
    (mask,) = shapes.read_bank(model / shapes.BANK, 32, 32)["crack"]
    assert np.array_equal(mask, scar)
    assert set(sources.nearest_types([train / "0_00.png"], model / sources.TYPES)) <= {"mono", "poly"}


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (Image.new("L", (32, 32)), "is empty"),
        (Image.new("L", (32, 32), 255), "is all white"),
        (Image.new("L", (64, 32), 255), "give masks of these proportions"),
    ],
)
def test_masks_that_cannot_be_used(picture: Image.Image, message: str, tmp_path: Path) -> None:
    picture.save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=message):
        shapes.read_mask(tmp_path / "mask.png", 32, 32)


def complaint(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(["synth", *args]) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.strip().splitlines()) <= 2
    return said.err


def test_mistakes_are_answered_before_anything_is_painted(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = stripes(tmp_path / "good", 3, 0, across=True), tmp_path / "out"
    model = ("--model", str(tiny_folder), "--type", "mono")
    usual = (*model, "--good", str(good), "--out", str(out))
    (tmp_path / "empty").mkdir()
    assert "missing --good, --out" in complaint(capsys, *model)
    assert "no such folder" in complaint(capsys, *model, "--good", str(tmp_path / "gone"), "--out", str(out))
    assert "no images in" in complaint(capsys, *model, "--good", str(tmp_path / "empty"), "--out", str(out))
    assert "no images in" in complaint(capsys, *usual, "--defects", str(tmp_path / "empty"))
    assert "count" in complaint(capsys, *usual, "--count", "0")
    assert "does not know the defect 'dent'" in complaint(capsys, *usual, "--kinds", "dent")
    assert "no such recipe" in complaint(capsys, str(tmp_path / "no.toml"))
    assert not out.exists()
    assert "unknown sampler" in complaint(capsys, *usual, "--sampler", "eular")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    assert "holds other files" in complaint(capsys, *model, "--good", str(good), "--out", str(out))
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_a_broken_image_is_named_and_painted_ones_are_kept(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = stripes(tmp_path / "good", 12, 0, across=True), tmp_path / "out"
    usual = ("--model", str(tiny_folder), "--type", "mono", "--good", str(good), "--out", str(out), "--count", "12")
    order = np.random.default_rng(0).permutation(12)
    broken = sorted(good.iterdir())[order[10]]  # in the second batch
    content = broken.read_bytes()
    broken.write_bytes(content[:60])
    assert str(broken) in complaint(capsys, *usual)
    assert len(list(out.glob("records/*.json"))) == 8
    broken.write_bytes(content)
    assert main(["synth", *usual, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12


def test_a_policy_that_marks_always_refuses_spots_too_small_to_carry_a_mark(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out, policy = stripes(tmp_path / "good", 3, 0, across=True), tmp_path / "out", tmp_path / "policy.toml"
    policy.write_text('name = "strict"\n[watermark]\nmode = "always"\n')
    usual = ["synth", "--model", str(tiny_folder), "--type", "mono", "--good", str(good), "--out", str(out)]
    assert main([*usual, "--count", "1", "--kinds", "crack", "--policy", str(policy)]) == 1
    assert "too small to carry a watermark" in capsys.readouterr().err and not list(out.glob("images/*"))


def some(picture: Image.Image) -> Verdict:
    """A rule of one's own that withholds about every second picture."""
    return Verdict(pixels_digest(picture)[0] < "8", "mine", "of the wrong half")


def test_a_picture_that_is_withheld_is_left_out_and_the_others_stay(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    good, out, policy = stripes(tmp_path / "good", 3, 0, across=True), tmp_path / "out", tmp_path / "policy.toml"
    policy.write_text(f'name = "half"\n[pictures]\nplug = "{Path(__file__).stem}:some"\n')
    asked = ["synth", "--model", str(tiny_folder), "--type", "mono", "--good", str(good), "--out", str(out),
             "--count", "12", "--policy", str(policy)]  # fmt: skip
    with pytest.warns(UserWarning, match="of 12 pictures stay by the policy 'half', mine: of the wrong half"):
        assert main(asked) == 0
    kept = json.loads((out / "manifest.json").read_text())
    assert 0 < kept["count"] < 12 and kept["withheld"] == 12 - kept["count"]
    pictures = sorted((out / "images").iterdir())
    assert [path.name for path in pictures] == [Path(each["file"]).name for each in kept["images"]]
    assert all(each["pixels"][0] < "8" for each in kept["images"])
    assert len(json.loads((out / "annotations" / "coco.json").read_text())["images"]) == kept["count"]


def test_a_full_disk_loses_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    good, out = stripes(tmp_path / "good", 3, 0, across=True), tmp_path / "out"
    command = f"ulimit -f 8; exec {sys.executable} -m mezzotint synth --model {tiny_folder} --type mono --good {good}"
    command += " --count 3"  # no file above 8 KiB: bare images fit, the contact sheet and signed images do not
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEZZOTINT_HOME": str(tmp_path / "home")}

    def run(options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", command + options], env=environment, capture_output=True, text=True)

    signed = run(f" --out {tmp_path / 'signed'}")
    assert signed.returncode == 2 and "cannot write" in signed.stderr and "000000.png" in signed.stderr
    assert not list((tmp_path / "signed").glob("images/*"))
    done = run(f" --out {out} --policy off")
    assert done.returncode == 2 and "contact_sheet.png" in done.stderr and "Traceback" not in done.stderr
    assert sorted(p.name for p in (out / "images").iterdir()) == [f"{i:06d}.png" for i in range(3)]
    assert not (out / "manifest.json").exists() and not list(out.glob(".contact*"))


def test_recipes_are_strict_and_round_trip(tmp_path: Path) -> None:
    content = {"model": "a b", "good": "ü", "out": 'o"ut', "kinds": ["crack"], "guidance": 2.5, "masks": "m"}
    plan = recipe.check(content, "here")
    (tmp_path / "r.toml").write_text(recipe.to_toml(plan))
    assert recipe.read(tmp_path / "r.toml") == plan
    for change, message in (
        ({"guidence": 2}, r"unknown key guidence \(nearest valid name: guidance\)"),
        ({"steps": 0}, "steps"),
        ({"count": "many"}, "count"),
    ):
        with pytest.raises(InputError, match=message):
            recipe.check(content | change, "here")
    same = recipe.check(content | {"model": Path("a b").resolve(), "count": 99, "out": "elsewhere"}, "here")
    assert recipe.changes(plan, same) == []
    assert recipe.changes(plan, same.model_copy(update={"steps": 9})) == ["steps was None, now 9"]
    (tmp_path / "bad.toml").write_text("count = = 3")
    with pytest.raises(InputError, match="not valid TOML"):
        recipe.read(tmp_path / "bad.toml")
    (tmp_path / "short.toml").write_text('model = "m"\n')
    with pytest.raises(InputError, match="good is missing"):
        recipe.read(tmp_path / "short.toml")

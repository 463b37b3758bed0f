"""The figures and pictures of docs/fine-tuning.md: `python recipes/fine-tuning/measure.py NAME... [--out DIR]`.

NAME: base, lora, dreambooth, inversion, control, lcm, blend. Each reads runs of the recipes beside this file, prints
its table and writes its sheet. The judge of defects is the derived-mask detector, fitted on real cells alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pil
from PIL.Image import Image

import mezzotint as mz
from mezzotint import files, images
from mezzotint.backbones import features
from mezzotint.data import derived_masks, metadata
from mezzotint.data.derived_masks import HealthyModel, Judge, candidates, normalised
from mezzotint.evaluate.judge import distances
from mezzotint.families import Model, adapt
from mezzotint.request import Request
from mezzotint.training import metrics
from mezzotint.training.grid import grid

RUNS, CELLS = Path("runs/fine-tuning"), Path("runs/solar-cells/cells/train")
COUNT = 64  # pictures behind every figure
OUT = Path("docs/images")


class Detector:
    """Finds inactive areas and cracks in monocrystalline cells, by a model of healthy ones and judges of candidates."""

    def __init__(self) -> None:
        rows = [row for row in metadata.rows(CELLS) if row["type"] == "mono"]
        grey = np.stack([np.asarray(images.read(CELLS / row["file_name"]).convert("L")) for row in rows])
        pictures = normalised(grey)
        sound = torch.tensor([row["probability"] == 0 for row in rows])
        self.healthy = HealthyModel.fit(pictures[sound], derived_masks.RANK["mono"])
        found = [c for part in pictures.split(64) for c in candidates(self.healthy, part)]
        self.judges: dict[str, Judge] = derived_masks._judges(rows, found)

    def masks(self, pictures: Sequence[Image], kind: str) -> np.ndarray:
        """(N, H, W) bool: what is found of a kind."""
        grey = np.stack([np.asarray(picture.convert("L")) for picture in pictures])
        judge = self.judges[kind]
        result = np.zeros(grey.shape, dtype=bool)
        for i, found in enumerate(c for part in normalised(grey).split(32) for c in candidates(self.healthy, part)):
            for candidate in found:
                if candidate.kind == kind and judge.score(candidate.features) > judge.threshold:
                    result[i] |= candidate.mask
        return result

    def share(self, pictures: Sequence[Image], kind: str) -> tuple[float, float]:
        """Share of the pictures with a defect of a kind, and its mean area among them in per cent."""
        area = self.masks(pictures, kind).mean((1, 2))
        return float((area > 0).mean()), float(100 * area[area > 0].mean()) if (area > 0).any() else 0.0


def draw(model: Model, prompt: str, count: int = COUNT, **wish: Any) -> list[Image]:
    """Pictures of seeds 1000, 1001, ..., eight at a time."""
    found: list[Image] = []
    for first in range(0, count, 8):
        request = Request(prompt=prompt, seed=1000 + first, count=min(8, count - first), **wish)
        found += mz.generate(model, request).images
    return found


def patches(pictures: Sequence[Image | Path]) -> np.ndarray:
    """Patch features (N, P, D) of EfficientNet-Lite0."""
    folder = RUNS / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i, picture in enumerate(pictures):
        if isinstance(picture, Path):
            paths.append(picture)
        else:
            paths.append(folder / f"{i}.png")
            picture.save(paths[-1])
    return features.of_images(paths, 128, 128)[0]


def frechet(real: Sequence[Path], others: dict[str, Sequence[Image]]) -> dict[str, str]:
    """The distance of each set from the real one, with its interval."""
    found = distances(patches(real), {name: patches(pictures) for name, pictures in others.items()})
    spread = {name: found[name]["frechet"] for name in others if name in found}
    return {name: f"{each['distance']:.2f} ({each['low']:.2f} to {each['high']:.2f})" for name, each in spread.items()}


def real(name: str) -> list[Path]:
    folder = RUNS / "data" / name
    return [folder / row["file_name"] for row in metadata.rows(folder)]


def base() -> Model:
    return mz.load(RUNS / "base/model")


def sheet(name: str, rows: Sequence[Sequence[Image]]) -> None:
    """Rows of pictures as one PNG."""
    OUT.mkdir(parents=True, exist_ok=True)
    flat = [picture.convert("L") for row in rows for picture in row]
    files.write_with(OUT / f"{name}.png", lambda path: grid(flat, columns=len(rows[0])).save(path, format="PNG"))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


def last(run: str, key: str = "validation") -> tuple[float, float]:
    """The first and the last figure of a run."""
    found = [record[key] for record in metrics.read(RUNS / run) if key in record]
    return found[0], found[-1]


def of_base() -> None:
    judge = Detector()
    prompts = ("a monocrystalline solar cell", "a monocrystalline solar cell with a crack",
               "a monocrystalline solar cell with an inactive area")  # fmt: skip
    rows = [(p, *judge.share(draw(base(), p), "inactive"), judge.share(draw(base(), p), "crack")[0]) for p in prompts]
    rows += [
        ("real inactive areas (mono)", *judge.share([pil.open(p) for p in mono("inactive-train")], "inactive"), "")
    ]
    table(("prompt to the base", "with an inactive area", "its size, %", "with a crack"), rows)


def mono(name: str) -> list[Path]:
    folder = RUNS / "data" / name
    return [folder / row["file_name"] for row in metadata.rows(folder) if "mono" in row["text"]]


def of_lora() -> None:
    """Validation loss and pictures against rank, beside training the whole."""
    prompt, judge = "a monocrystalline solar cell with an inactive area", Detector()
    truth = mono("inactive-train") + mono("inactive-validation")
    start = base()
    numbers = sum(p.numel() for p in start.backbone.parameters())
    pictures = {"base": draw(start, prompt)}
    rows: list[list[Any]] = []
    for rank in (1, 4, 16, 64):
        run = RUNS / f"lora-{rank}"
        file = run / "model/pytorch_lora_weights.safetensors"
        adapter = adapt.read_lora(start, file)
        pictures[f"rank {rank}"] = draw(adapt.adapted(start, [(file, 1.0)]), prompt)
        rows.append([f"rank {rank}", adapter.facts.parameters, f"{numbers / adapter.facts.parameters:.1f}",
                     f"{file.stat().st_size / 1e6:.2f}", last(run.name)[1]])  # fmt: skip
    pictures["full"] = draw(mz.load(RUNS / "full/model"), prompt)
    rows.append(["full", numbers, "1", f"{size(RUNS / 'full/model/unet') / 1e6:.1f}", last("full")[1]])
    rows.insert(0, ["base", 0, "", "", last("full")[0]])
    far = frechet(truth, pictures)
    for row in rows:
        row += [f"{judge.share(pictures[row[0]], 'inactive')[0]:.0%}", far.get(row[0], "")]
    table(("", "numbers that train", "fewer than all", "file, MB", "validation loss", "with an inactive area",
           "Frechet distance"), rows)  # fmt: skip
    print(
        f"real mono cells with inactive areas: the judge finds {judge.share([pil.open(p) for p in truth], 'inactive')}"
    )
    sheet("lora-ranks", [[pil.open(p) for p in truth[:8]], *(each[:8] for each in pictures.values())])


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def of_dreambooth() -> None:
    """The subject's word and the class's, with and without prior preservation."""
    judge, subject, healthy = Detector(), "a sks solar cell", "a monocrystalline solar cell"
    start = base()
    before = draw(start, healthy)
    models = {"base": start}
    models |= {name: mz.load(RUNS / run / "model") for name, run in
               (("without prior", "dreambooth-alone"), ("with prior", "dreambooth"))}  # fmt: skip
    lora = RUNS / "dreambooth-lora/model/pytorch_lora_weights.safetensors"
    if lora.is_file():
        models["LoRA with prior"] = adapt.adapted(start, [(lora, 1.0)])
    drawn = {name: (draw(model, subject), draw(model, healthy)) for name, model in models.items()}
    real_healthy = [p for p in mono("base-train") if row_text(p) == healthy][:128]
    near = frechet(real_healthy, {name: pair[1] for name, pair in drawn.items()})
    of_subject = frechet(mono("inactive-train"), {name: pair[0] for name, pair in drawn.items()})
    rows = []
    for name, (ours, theirs) in drawn.items():
        moved = np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in
                         zip(before, theirs, strict=True)])  # fmt: skip
        run = {"without prior": "dreambooth-alone", "with prior": "dreambooth", "LoRA with prior": "dreambooth-lora"}
        loss = last(run[name])[1] if name in run else last("dreambooth")[0]
        rows.append([name, f"{judge.share(ours, 'inactive')[0]:.0%}", of_subject[name],
                     f"{judge.share(theirs, 'inactive')[0]:.0%}", float(moved), near[name], float(loss)])  # fmt: skip
    table(("", "sks: with an inactive area", "sks: Frechet distance to inactive cells", "class: with an inactive area",
           "class: grey levels moved",
           "class: Frechet distance to healthy cells", "loss on the base's cells"), rows)  # fmt: skip
    subjects = [pil.open(p) for p in real("subject")[:8]]
    sheet("dreambooth", [subjects, *(pair[i][:8] for pair in drawn.values() for i in (0, 1))])


def row_text(path: Path) -> str:
    for row in metadata.rows(path.parent):
        if row["file_name"] == path.name:
            return row["text"]
    return ""


def of_inversion() -> None:
    """A new word, beside the word it started from."""
    judge, start = Detector(), base()
    rows, pictures = [], [[pil.open(p) for p in real("subject")[:8]]]
    sets = {"dark (where it starts)": draw(start, "a monocrystalline solar cell with dark")}
    files_of = {}
    for run in ("textual-inversion-1", "textual-inversion"):
        file = RUNS / run / "model/learned_embeds.safetensors"
        if file.is_file():
            name = f"<inactive>, {1 if run.endswith('1') else 4} vectors"
            files_of[name] = file
            sets[name] = draw(adapt.adapted(start, embedding=[file]), "a monocrystalline solar cell with <inactive>")
    far = frechet(mono("inactive-train"), sets)
    for name, drawn in sets.items():
        bytes_ = files_of[name].stat().st_size if name in files_of else ""
        rows.append([name, bytes_, f"{judge.share(drawn, 'inactive')[0]:.0%}", far[name]])
        pictures.append(drawn[:8])
    table(("word", "file, bytes", "with an inactive area", "Frechet distance to inactive cells"), rows)
    sheet("textual-inversion", pictures)


def of_control() -> None:
    """Held-out masks: what is found in the picture against what was asked for, and against another picture's mask."""
    judge, model = Detector(), base()
    folder = RUNS / "data/inactive-validation"
    held = [row for row in metadata.rows(folder) if "mono" in row["text"]]
    asked = []
    for row in held:
        mask = images.read(folder / row["mask"]).convert("L")
        asked += [mask, mask.transpose(pil.Transpose.FLIP_LEFT_RIGHT), mask.transpose(pil.Transpose.FLIP_TOP_BOTTOM),
                  mask.transpose(pil.Transpose.ROTATE_180)]  # fmt: skip
    prompt, network = "a monocrystalline solar cell with an inactive area", RUNS / "controlnet/model"
    drawn, plain = [], []
    for i, mask in enumerate(asked):
        steered = Request(prompt=prompt, seed=1000 + i, control=((network, mask.convert("RGB"), 1.0),))
        drawn += mz.generate(model, steered).images
        plain += mz.generate(model, Request(prompt=prompt, seed=1000 + i)).images
    truth = np.stack([np.asarray(mask) >= 128 for mask in asked])
    real_ = [images.read(folder / row["file_name"]).convert("L") for row in held]
    rows = []
    for name, pictures, wanted in (
        ("with control", drawn, truth),
        ("with control, against another mask", drawn, np.roll(truth, 4, axis=0)),
        ("without control", plain, truth),
        ("the real cells of the masks", real_, truth[::4]),
    ):
        darker, hit, overlap = follows(judge, pictures, wanted)
        rows.append([name, len(pictures), f"{darker:.3f}", f"{hit:.0%}", f"{overlap:.2f}"])
    table(("", "pictures", "darker inside than around", "mask found again", "overlap (IoU)"), rows)
    chosen = list(range(0, len(asked), max(1, len(asked) // 8)))[:8]
    sheet("controlnet", [[part[i] for i in chosen] for part in (asked, drawn, plain)])


def follows(judge: Detector, pictures: Sequence[Image], wanted: np.ndarray) -> tuple[float, float, float]:
    """Darkness inside against a ring around (of the bright level), share of the mask found, IoU within 2 pixels."""
    from mezzotint.data.masks import dilate

    x = normalised(np.stack([np.asarray(p.convert("L")) for p in pictures])).numpy()
    found = judge.masks(pictures, "inactive")
    dark, hits, overlaps = [], [], []
    for picture, mask, seen in zip(x, wanted, found, strict=True):
        near, ring = dilate(mask, 2), dilate(mask, 6) & ~dilate(mask, 2)
        dark.append(float(picture[ring].mean() - picture[mask].mean()))
        hits.append(float((mask & dilate(seen, 2)).sum() / mask.sum()))
        either = (near | seen).sum()
        overlaps.append(float((near & dilate(seen, 2)).sum() / max(1, (near | dilate(seen, 2)).sum())) if either else 0)
    return float(np.mean(dark)), float(np.mean(hits)), float(np.mean(overlaps))


def of_lcm() -> None:
    """Few steps of the student against the teacher's, from the same noise."""
    start, prompt = base(), "a monocrystalline solar cell"
    student = {
        "LCM-LoRA": adapt.adapted(start, [(RUNS / "lcm/model/pytorch_lora_weights.safetensors", 1.0)], merged=True)
    }
    if (RUNS / "lcm-full/model").is_dir():
        student["LCM, whole"] = mz.load(RUNS / "lcm-full/model")
    exact = draw(start, prompt, sampler="heun", steps=100, guidance=2.0)
    sets: dict[str, list[Image]] = {}
    for steps in (2, 4, 8, 20, 50):
        sets[f"teacher, flow_euler {steps}"] = draw(start, prompt, sampler="flow_euler", steps=steps, guidance=2.0)
    for name, model in student.items():
        for steps in (1, 2, 4, 8):
            sets[f"{name}, lcm {steps}"] = draw(model, prompt, sampler="lcm", steps=steps, guidance=1.0)
    truth = [p for p in mono("base-train") if row_text(p) == prompt][:128]
    far = frechet(truth, sets)
    rows = []
    for name, pictures in sets.items():
        error = np.sqrt(np.mean([np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in
                                 zip(exact, pictures, strict=True)]))  # fmt: skip
        steps = int(name.split()[-1])
        rows.append([name, steps * (2 if name.startswith("teacher") else 1), float(error), far[name]])
    table(
        ("", "network calls", "RMS grey levels from the converged teacher", "Frechet distance to healthy cells"), rows
    )
    few = [f"{name}, lcm 4" for name in student]
    names = ["teacher, flow_euler 4", *few, "teacher, flow_euler 20", "teacher, flow_euler 50"]
    sheet("lcm", [sets[name][:8] for name in names])


def of_blend() -> None:
    """Two adapters on one model at weights from 0 to 1."""
    judge, start = Detector(), base()
    one, two = (RUNS / run / "model/pytorch_lora_weights.safetensors" for run in ("lora-16", "lora-crack"))
    prompt, rows, pictures = "a monocrystalline solar cell with a crack and an inactive area", [], []
    for a in (0.0, 0.5, 1.0):
        for b in (0.0, 0.5, 1.0):
            drawn = draw(adapt.adapted(start, [(one, a), (two, b)]), prompt, count=32)
            rows.append([a, b, f"{judge.share(drawn, 'inactive')[0]:.0%}", f"{judge.share(drawn, 'crack')[0]:.0%}"])
            pictures.append(drawn[:6])
    table(("inactive adapter", "crack adapter", "with an inactive area", "with a crack"), rows)
    sheet("blend", pictures)


PARTS: dict[str, Callable[[], None]] = {
    "base": of_base, "lora": of_lora, "dreambooth": of_dreambooth, "inversion": of_inversion, "control": of_control,
    "lcm": of_lcm, "blend": of_blend,
}  # fmt: skip

if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name in PARTS]
    if "--out" in sys.argv:
        OUT = Path(sys.argv[sys.argv.index("--out") + 1])
    if not names:
        sys.exit(f"which of {', '.join(PARTS)}? {json.dumps(sys.argv[1:])}")
    for name in names:
        PARTS[name]()

"""The images: which cannot be used, which are copies, what validation shares with them, what their captions lack."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as pil
from PIL.Image import Image

from mezzotint import images
from mezzotint.data import findings, metadata
from mezzotint.data.audit import audit
from mezzotint.data.findings import Audit
from mezzotint.doctor import runs
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Exhibit, Finding, Grade, Measure, NotChecked, Plot

# Shares of the images from which a finding costs quality. Where one photograph is seen twice in twenty it is drawn
# more often than the rest (Somepalli et al. 2023, section 6). Nearly equal pictures are common where products are
# regular: 9 % of the nursery's 1,209 cells, 19 % of its bright polycrystalline ones, 10 % of the starter's 2,094, with
# nothing wrong there. A tenth of the captions is dropped on purpose in most trainings, so twice that counts. Blank
# images are drawn as often as they are seen.
EXACT, NEAR, LEAKED, EMPTY, CUT, BLANK = 0.05, 0.24, 0.05, 0.2, 0.2, 0.05
UNBALANCED = 20.0  # images of the most frequent class to one of the least; the nursery's classes reach 1.9
SUBJECT = 30  # so many images may share a caption that names their subject

BROKEN = ("broken row", "broken image", "broken mask", "broken control", "label out of range")
SPOILED = ("blank", "transparent", "colour lost", "EXIF orientation", "enlarged", "cut")
COPIES = ("duplicates", "similar", "turned", "conflicting labels", "similar, other labels")
LEAKS = ("leak", "similar leak", "turned leak")
CAPTIONS = ("no captions", "empty caption", "long caption", "conflicting captions")
SHOWS = {
    "duplicates": "equal pictures", "similar": "nearly the same picture",
    "leak": "training image, equal validation image", "similar leak": "training image, validation image nearly like it",
}  # fmt: skip
SHOWN = 6  # pairs of an exhibit


@dataclass(frozen=True, slots=True)
class Folders:
    """What was looked at: the images, those that a run kept for validation, and what is known of the training."""

    train: Path
    held: Path | None
    tuned: bool  # an adapter, or a training on a finished model
    balanced: bool  # classes were drawn equally often


def examine(case: Case) -> Checked:
    """The audit of the images, as causes."""
    where = _folders(case)
    contract, text = case.bare.contract, case.bare.text
    names = contract.classes.names if contract.classes else None
    with _described(where.train) as train, _described(where.held) as held:
        assert train is not None
        found = audit(
            train, held, contract.size, 1 if contract.latent.pixel_channels == 1 else 3, names,
            tokens=text.lengths if text else None, room=text.readings(False)[0].length if text else None,
        )  # fmt: skip
    described = (where.train / metadata.METADATA).is_file()
    judged = [_broken(found), _copies(found), _leak(found)]
    judged += [_captions(found, where)] if text is not None and described else []
    judged += [_balance(found, where, names)] if described else []
    labels = found.facts["train"]["labels"]
    plots = (Plot("images by class", "class", "images", {"training": list(enumerate(labels.values()))}, "bars",
                  labels=tuple(labels)),) if len(labels) > 1 else ()  # fmt: skip
    return Checked(
        tuple(each for each in judged if each is not None), _measures(found, held is not None), plots, _pairs(found)
    )


def _folders(case: Case) -> Folders:
    """What the run was trained on, where a run is given, else the user's folder: it may be a part of the former."""
    run = runs.read(case.trace) if case.trace is not None and case.trace.is_dir() else None
    told = run.recipe.get("data", {}) if run else {}
    train = run.place(told.get("folder")) if run else None
    held = run.place(told.get("validation")) if run else None
    train = train or case.folder
    if train is None:
        raise NotChecked("needs images: give --data DIR, the folder that the model was trained on")
    tuned = bool(case.lora or case.base or (run and run.recipe.get("base")) or case.bare.contract.lineage.base)
    return Folders(train, held, tuned, told.get("sampling") == "balanced")


@contextmanager
def _described(folder: Path | None) -> Iterator[Path | None]:
    """The folder, or for one without metadata.jsonl a stand-in whose lines name its pictures and say no more."""
    if folder is None or (folder / metadata.METADATA).is_file():
        yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        metadata.write(Path(place), [{"file_name": str(path.resolve())} for path in images.find(folder)])
        yield Path(place)


def _of(found: Audit, kinds: Sequence[str]) -> dict[str, findings.Finding]:
    """The audit's findings of these kinds; of one kind in two folders, that with more."""
    chosen: dict[str, findings.Finding] = {}
    for each in found.findings:
        if each.kind in kinds and (each.kind not in chosen or chosen[each.kind].count < each.count):
            chosen[each.kind] = each
    return chosen


def _count(found: Audit, kind: str) -> int:
    return sum(each.count for each in found.findings if each.kind == kind)


def _share(found: Audit, kind: str, part: str = "train") -> float:
    return _count(found, kind) / max(found.facts[part]["images"], 1)


def _said(parts: Sequence[findings.Finding]) -> str:
    return "; ".join(f"{each.what}{_first(each)}" for each in parts)


def _first(each: findings.Finding) -> str:
    names = [Path(example.files[0]).name for example in each.examples[:2] if example.files]
    return f" ({', '.join(names)}{', ...' if each.count > len(names) else ''})" if names else ""


def _broken(found: Audit) -> Finding | None:
    broken, spoiled = _of(found, BROKEN), _of(found, SPOILED)
    if broken:
        first = next(iter(broken.values()))
        total = found.facts["train"]["images"] + found.facts["train"]["unusable"]
        share = sum(each.count for each in broken.values()) / max(total, 1)
        return Finding("data.broken", "harmful", _said(list(broken.values())), first.do, strength=1 + 10 * share)
    if spoiled:
        first = next(iter(spoiled.values()))
        beyond = _share(found, "blank") / BLANK
        grade: Grade = "harmful" if beyond >= 1 else "note"
        return Finding("data.broken", grade, _said(list(spoiled.values())), first.do, strength=max(beyond, 1.0))
    return None


def _copies(found: Audit) -> Finding | None:
    parts = _of(found, COPIES)
    if not parts:
        return None
    beyond = max(_share(found, "duplicates") / EXACT, _share(found, "similar") / NEAR, _share(found, "turned") / NEAR)
    beyond = max(beyond, _share(found, "conflicting labels") / EXACT)
    grade: Grade = "harmful" if beyond >= 1 else "note"
    first = next(iter(parts.values()))
    return Finding("data.copies", grade, _said(list(parts.values())), first.do, strength=max(beyond, 1.0))


def _leak(found: Audit) -> Finding | None:
    parts = _of(found, LEAKS)
    if not parts:
        return None
    shared = _share(found, "leak", "validation") + _share(found, "similar leak", "validation")
    grade: Grade = "harmful" if shared >= LEAKED else "note"
    first = next(iter(parts.values()))
    return Finding("data.leak", grade, _said(list(parts.values())), first.do, strength=max(shared / LEAKED, 1.0))


def _captions(found: Audit, where: Folders) -> Finding | None:
    """For models that read text; whether captions fit their images is asked of the network, by another probe."""
    parts = _of(found, CAPTIONS)
    facts = found.facts["train"]
    count, different = facts["images"], facts["captions"]["different"]
    if different == 1 and count > 1 and "no captions" not in parts:
        grade: Grade = "note" if where.tuned or count <= SUBJECT else "harmful"
        says = f"all {count} images have the same caption: prompts cannot tell apart what differs between them"
        return Finding("data.captions", grade, says, "Describe in each caption what differs between images.",
                       strength=2.0)  # fmt: skip
    if not parts:
        return None
    beyond = max(
        _share(found, "no captions") / EMPTY, _share(found, "empty caption") / EMPTY,
        _share(found, "long caption") / CUT, _share(found, "conflicting captions") / EXACT,
    )  # fmt: skip
    first = next(iter(parts.values()))
    grade = "harmful" if beyond >= 1 else "note"
    return Finding("data.captions", grade, _said(list(parts.values())), first.do, strength=max(beyond, 1.0))


def _balance(found: Audit, where: Folders, names: Sequence[str] | None) -> Finding | None:
    parts = _of(found, ("imbalance", "class missing") if names else ("imbalance",))
    if not parts:
        return None
    ratio = _ratio(found)
    grade: Grade = "harmful" if names and ratio >= UNBALANCED and not where.balanced else "note"
    first = parts.get("imbalance") or next(iter(parts.values()))
    return Finding("data.balance", grade, _said(list(parts.values())), first.do, strength=max(ratio / UNBALANCED, 1.0))


def _ratio(found: Audit) -> float:
    """Images of the most frequent class to one of the least frequent that is there."""
    counts = [n for label, n in found.facts["train"]["labels"].items() if label != "no label"]
    return max(counts) / min(counts) if counts else 1.0


def _measures(found: Audit, held: bool) -> tuple[Measure, ...]:
    facts = found.facts["train"]
    rows = [
        Measure("images", facts["images"]),
        Measure("images that cannot be used", facts["unusable"], bound="0"),
        Measure("share of exact copies", _share(found, "duplicates"), bound=f"below {EXACT:g}"),
        Measure("share of near copies", _share(found, "similar"), bound=f"below {NEAR:g}"),
        Measure("different captions", facts["captions"]["different"]),
        Measure("most frequent class to least frequent", _ratio(found), bound=f"below {UNBALANCED:g}"),
    ]
    if held:
        leaked = _share(found, "leak", "validation") + _share(found, "similar leak", "validation")
        rows.append(Measure("share of validation images in training", leaked, bound=f"below {LEAKED:g}"))
    return tuple(rows)


def _pairs(found: Audit) -> tuple[Exhibit, ...]:
    """Copies side by side."""
    shown: list[Exhibit] = []
    for kind, title in SHOWS.items():
        pairs = [example.files[:2] for each in found.findings if each.kind == kind for example in each.examples[:SHOWN]]
        if pairs:
            shown.append(Exhibit(title, sheet([[images.read(Path(name)) for name in pair] for pair in pairs])))
    return tuple(shown)


def sheet(rows: Sequence[Sequence[Image]], side: int = 128, gap: int = 4) -> Image:
    """Rows of pictures on white, each within side x side."""
    across = max(len(row) for row in rows)
    whole = pil.new("RGB", (across * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            share = side / max(picture.size)
            size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
            rule = pil.Resampling.NEAREST if share > 1 else pil.Resampling.LANCZOS
            whole.paste(picture.convert("RGB").resize(size, rule), (x * (side + gap), y * (side + gap)))
    return whole

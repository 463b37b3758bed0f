"""Cached latents and text states against what codec and encoders make now of the images and captions behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from mezzotint import files
from mezzotint.codec import Codec
from mezzotint.data import cache, folder, metadata, table
from mezzotint.data.folder import ImageFolder
from mezzotint.doctor import freshness, pictures, runs
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Grade, Measure, NotChecked, Plot
from mezzotint.doctor.freshness import ROUNDED, WRONG
from mezzotint.families.model import working

COUNT = 24  # rows of a file that are computed anew
ANEW = "Delete the cache: the next training computes it anew with the codec and the encoders that it uses."


def examine(case: Case) -> Checked:
    """Every cache file whose images or captions are at hand."""
    if case.cache is None:
        raise NotChecked("needs a cache: give --cache, the file or folder of a run's latents and text states")
    found, measures, plots, unknown = list[Finding](), list[Measure](), list[Plot](), list[str]()
    sources = _sources(case)
    if not sources:
        raise NotChecked("needs the images that the cache was made of: give --data, the training folder")
    for path in _files(case.cache):
        header, tensors = table.read(path)
        kind = header.get("format", "").rpartition("-")[0]
        if kind == cache.LATENTS.rpartition("-")[0] and "latents" in tensors:
            result = _latents(case, path, header, tensors["latents"], sources)
        elif kind == cache.TEXT.rpartition("-")[0]:
            result = _text(case, path, header, tensors, sources)
        else:
            continue
        if isinstance(result, str):
            unknown.append(result)
            continue
        findings, rows, curves = result
        found += findings
        measures += rows
        plots += curves
    if not measures:
        raise NotChecked("; ".join(unknown) or f"{case.cache} holds no latents or text states of a training")
    return Checked(tuple(_strongest(found)), tuple(measures), tuple(plots))


def _strongest(found: Sequence[Finding]) -> list[Finding]:
    """One finding of a cause, that of the file which is furthest off."""
    best: dict[str, Finding] = {}
    for each in sorted(found, key=lambda each: -each.strength):
        best.setdefault(each.cause, each)
    return list(best.values())


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def _sources(case: Case) -> list[Path]:
    """Training folders that the cache may have been made of."""
    run = runs.read(case.trace) if case.trace is not None and case.trace.is_dir() else None
    told = (run.recipe.get("data") or {}) if run else {}
    places = [case.folder, *(run.place(told.get(key)) for key in ("folder", "validation") if run)]
    known = {place.resolve(): place for place in places if place is not None}
    return [place for place in known.values() if (place / metadata.METADATA).is_file()]


# Latents.


def _latents(
    case: Case, path: Path, header: dict[str, str], cached: Tensor, sources: Sequence[Path]
) -> tuple[list[Finding], list[Measure], list[Plot]] | str:
    width, height = (int(side) for side in header.get("size", "0x0").split("x"))
    codec = case.bare.codec
    behind = _behind(path, header, len(cached), (width, height), codec.pixel_channels, sources)
    if behind is None:
        return f"{path.name} was made of other images than those given (data {header.get('data', '')[:16]})"
    chosen = torch.tensor(list(pictures.spread(len(behind), COUNT)))
    ours = cached[chosen].float()  # (N, V, c, h, w)
    if not bool(ours.isfinite().all()):
        says = f"{path.name} holds latents that are not finite"
        return [Finding("latent.cache", "broken", says, ANEW, strength=10.0)], [Measure(path.name, float("nan"))], []
    mirrorings = json.loads(header.get("mirrorings", "[[]]"))
    fresh = [_encoded(case, codec, behind.pixels(chosen, tuple(flip))) for flip in mirrorings]
    if fresh[0].shape[1:] != ours.shape[2:]:
        says = f"{path.name} holds latents of {_shape(ours[0, 0])}, and this codec makes {_shape(fresh[0][0])}"
        return [Finding("latent.cache", "broken", says, ANEW, strength=10.0)], [Measure(path.name, float("nan"))], []
    every = [freshness.compare(ours[:, place], view) for place, view in enumerate(fresh)]
    worst = max(every, key=lambda each: each.error)
    claims = header.get("codec") == case.bare.contract.latent.codec
    measures = [
        Measure(f"{path.name}: difference from fresh latents, in deviations", worst.error, bound=f"below {WRONG:g}"),
        Measure(f"{path.name}: slope of cached on fresh latents", float(worst.slope.mean()), float(worst.slope.min()),
                float(worst.slope.max()), "1"),
    ]  # fmt: skip
    plot = Plot(f"{path.name}: cached on fresh latents", "channel", "", {
        name: list(enumerate(values.tolist()))
        for name, values in (("slope", worst.slope), ("offset", worst.offset), ("correlation", worst.correlation))
    })  # fmt: skip
    what = freshness.difference(worst, ours[:, 0], header.get("dtype", "float32"))
    finding = _judged("latent.cache", path, worst.error, what, claims, "codec")
    return [finding] if finding else [], measures, [plot]


def _encoded(case: Case, codec: Codec, pixels: Tensor) -> Tensor:
    with working(case.bare, "codec"), torch.inference_mode():
        return torch.cat([codec.encode(part.to(case.bare.device)).float().cpu() for part in pixels.split(8)])


def _behind(
    path: Path, header: dict[str, str], count: int, size: tuple[int, int], channels: int, sources: Sequence[Path]
) -> ImageFolder | None:
    """The images of a file by the digest of their names; those of one bucket where the folder's other files say so."""
    sizes = [size]
    for other in sorted(path.parent.glob(f"{path.stem.rpartition('-')[0]}-*x*.safetensors")):
        said = table.read(other)[0].get("size", "")
        if said and (pair := (int(said.split("x")[0]), int(said.split("x")[1]))) not in sizes:
            sizes.append(pair)
    for source in sources:
        for among in ([size], sorted(sizes)):
            for images in folder.read_buckets(source, among, channels):
                named = files.sha256_json(list(images.names)) == header.get("images")
                if images.bytes.shape[-2:] == (size[1], size[0]) and len(images) == count and named:
                    return images
    return None


def _judged(cause: str, path: Path, error: float, what: str, claims: bool, maker: str) -> Finding | None:
    if error < ROUNDED:
        return None
    grade: Grade = "note" if error < WRONG else "harmful" if error < 0.5 else "broken"
    whose = f"though the file names this model's {maker}" if claims else f"and the file names another {maker}"
    says = f"{path.name} differs from what the {maker} makes now by {error:.2g} of its deviation, {whose}: {what}"
    return Finding(cause, grade, says, ANEW, strength=max(error / WRONG, 1.0))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


# Text states.


def _text(
    case: Case, path: Path, header: dict[str, str], cached: dict[str, Tensor], sources: Sequence[Path]
) -> tuple[list[Finding], list[Measure], list[Plot]] | str:
    text, contract = case.bare.text, case.bare.contract
    if text is None or contract.text is None:
        return f"{path.name} holds text states, and this model reads no text"
    captions = _captions(header, sources)
    if captions is None:
        return f"{path.name} was made of other captions than those given"
    chosen = list(pictures.spread(len(captions), COUNT))
    spoken = case.steered(case.bare, [captions[i] for i in chosen], torch.zeros(len(chosen), dtype=torch.long))
    measures: list[Measure] = []
    found: list[Finding] = []
    claims = header.get("encoders") == files.sha256_json(contract.text.model_dump(mode="json"))
    for name in cache.FIELDS:
        ours, fresh = cached.get(name), getattr(spoken, name)
        if (ours is None) != (fresh is None):
            says = f"{path.name} {'lacks' if ours is None else 'holds'} {name} states, other than this model's encoders"
            found.append(Finding("text.cache", "broken", says, ANEW, strength=10.0))
            continue
        if ours is None or fresh is None:
            continue
        ours = ours[chosen]
        if ours.shape != fresh.shape:
            says = f"{path.name} holds {name} of {_shape(ours[0])}, the encoders make {_shape(fresh[0])}"
            found.append(Finding("text.cache", "broken", says, ANEW, strength=10.0))
        elif name == "mask":
            other = int((ours != fresh).any(1).sum())
            measures.append(Measure(f"{path.name}: captions with another mask", other, bound="0"))
            if other:
                says = f"{path.name} masks {other} of {len(chosen)} captions otherwise than the encoders do now"
                found.append(Finding("text.cache", "harmful", says, ANEW, strength=2.0))
        else:
            error, what = freshness.states(ours.float(), fresh.float())
            measures.append(Measure(f"{path.name}: difference from fresh {name}, in deviations", error,
                                    bound=f"below {WRONG:g}"))  # fmt: skip
            finding = _judged("text.cache", path, error, what, claims, "encoders")
            found += [finding] if finding else []
    return found, measures or [Measure(path.name, float("nan"))], []


def _captions(header: dict[str, str], sources: Sequence[Path]) -> list[str] | None:
    """The rows of a text cache: the distinct captions of one folder, or of several together."""
    said = [[row.text for row in metadata.read(source)] for source in sources]
    for count in range(len(said), 0, -1):
        for chosen in combinations(said, count):
            wanted = cache.distinct([caption for part in chosen for caption in part])
            if files.sha256_json(wanted) == header.get("captions"):
                return wanted
    return None

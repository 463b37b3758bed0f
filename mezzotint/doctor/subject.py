"""What is examined where a path is given, and what is opened for it: a model, an addition, a cache, a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from mezzotint.doctor import case as cases
from mezzotint.doctor import kinds
from mezzotint.doctor.case import Case
from mezzotint.doctor.causes import ranked
from mezzotint.doctor.diagnose import diagnose
from mezzotint.doctor.finding import Diagnosis, NotChecked, Outcome
from mezzotint.doctor.probes import PROBES, probe
from mezzotint.errors import InputError
from mezzotint.families import Model, load
from mezzotint.families.adapt import adapted

MODEL, CACHE = "model", "cache"  # folders in that of a run
REPORT = "doctor.json"  # a former diagnosis, which may be given as a trace
CODEC_METHODS = ("vae", "patch-pca")
WITHOUT_WEIGHTS = ("data", "trace")  # probes that ask nothing of the network

Kind = Literal["model", "LoRA", "words", "cache", "run"]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a path turned out to be."""

    path: Path  # as it was given
    kind: Kind
    model: Path | None  # that is opened; None for a run without one, whose trace alone is examined
    base: Path | None = None  # to compare with
    lora: tuple[tuple[Path, float], ...] = ()
    words: tuple[Path, ...] = ()  # textual inversion
    data: Path | None = None
    cache: Path | None = None
    trace: Path | None = None
    answers: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what a recipe says that files cannot
    probes: tuple[str, ...] = PROBES
    limited: str = ""  # why the model cannot be examined, only `probes`
    remarks: tuple[str, ...] = ()  # what was taken or left out without being asked


class Absent:
    """In the place of a model that there is not: whoever asks it for anything is told why."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise NotChecked(self._why)


def recognise(
    path: str | Path,
    *,
    data: str | Path | None = None,
    base: str | Path | None = None,
    lora: Sequence[tuple[str | Path, float]] = (),
    cache: str | Path | None = None,
    trace: str | Path | None = None,
) -> Subject:
    """Look at a path and at what is given with it; no weight is read. InputError where it is nothing to examine.

    A run brings its own data, cache and base, where they still are; what is given wins over them.
    """
    path = existing(path)
    given = Subject(
        path, "model", path, optional(base, "--base"), tuple((a_lora(file), weight) for file, weight in lora), (),
        optional(data, "--data"), optional(cache, "--cache"), None if trace is None else a_trace(trace),
    )  # fmt: skip
    if given.cache is not None and not kinds.is_cache(given.cache):
        raise InputError(f"--cache: {given.cache} holds no latents or text states that training kept")
    if not kinds.may_hold_weights(path):
        raise InputError(f"{path} is no model, adapter, cache or run of training. Give one of these.")
    recipe = kinds.recipe_of(path)
    if recipe is not None:
        return of_run(given, recipe)
    if path.is_dir() and kinds.is_model(path):
        return given
    if (path / "state.json").is_file():
        raise InputError(f"{path} is a checkpoint of a run: give the run's folder, {path.resolve().parents[1]}")
    if kinds.is_cache(path):
        return replace(given, kind="cache", model=needed(given, "a cache"), base=None, cache=path, probes=("cache",))
    kind = kinds.addition(path)
    return given if kind is None else of_addition(given, kind, path, needed(given, kind))


def of_addition(given: Subject, kind: str, file: Path, model: Path) -> Subject:
    """A LoRA or words on a model; InputError for what the doctor has no probe for."""
    if kind == "a LoRA":
        return replace(given, kind="LoRA", model=model, base=None, lora=((file, 1.0), *given.lora))
    if kind == kinds.WORDS:
        return replace(given, kind="words", model=model, base=None, words=(file,))
    raise InputError(f"{file} is {kind}, for which there is no probe. Give the model that it steers.")


def of_run(given: Subject, recipe: Mapping[str, Any]) -> Subject:
    """A run folder: its trace, and the model that it made or trains on."""
    run, told = given.path, kinds.table(recipe, "base")
    named, data = told.get("path"), kinds.table(recipe, "data")
    base = given.base or kinds.placed(named, run)
    gone = f"the recipe's base {named} is not here" if named and base is None else ""
    remarks = [gone] if gone else []
    images = f"the recipe's images {data.get('folder')} are not here"
    if given.data is not None:
        images = ""
    elif (folder := kinds.placed(data.get("folder"), run)) is not None:
        given, images = replace(given, data=folder), f"images: {folder}, from the recipe"
    kept = kinds.placed(data.get("cache"), run) or run / CACHE
    given = replace(
        given, kind="run", model=base, base=base, trace=given.trace or run,
        cache=given.cache or (kept if kinds.is_cache(kept) else None),
        answers={key: told[key] for key in ("prediction", "distilled", "parts") if told.get(key) is not None},
    )  # fmt: skip
    made = run / MODEL
    kind = kinds.addition(made) if made.is_dir() and not kinds.is_model(made) else None
    if made.is_dir() and kind is None and recipe["method"] not in CODEC_METHODS:
        return replace(given, model=made, remarks=tuple(filter(None, (*remarks, images))))
    if kind in ("a LoRA", kinds.WORDS):
        if base is None:
            raise InputError(f"{run} made {kind}, and {gone or 'its recipe names no base'}: name it with --base.")
        found = of_addition(given, kind, kinds.adapter(made) or made, base)
        return replace(found, kind="run", remarks=tuple(filter(None, (*remarks, images))))
    what = f"made {kind or 'an autoencoder'}, which draws nothing by itself"
    why = f"{run} {what if made.is_dir() else 'is not finished, and a checkpoint is no model yet'}"
    if base is None or recipe["method"] in CODEC_METHODS:
        probes, given = ("trace",), replace(given, model=None)
    else:
        probes = WITHOUT_WEIGHTS
    limited = f"{why}: only {' and '.join(probes)} can be examined"
    return replace(given, probes=probes, limited=limited, remarks=(*remarks, limited))


def opened(
    subject: Subject,
    *,
    count: int = 24,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    say: Callable[[str], None] = lambda what: None,
    prediction: str | None = None,
    distilled: bool | None = None,
    parts: str | Path | None = None,
) -> Case:
    """The case of a subject, everything loaded; InputError with the load's own message where a part is damaged."""
    said = {"prediction": prediction, "distilled": distilled, "parts": parts}
    answers = {**subject.answers, **{key: value for key, value in said.items() if value is not None}}
    if subject.model is None:
        absent = cast(Model, Absent(subject.limited))
        return Case(subject.path, absent, trace=subject.trace, folder=subject.data, seed=seed, say=say)
    images = None if subject.limited else subject.data  # where no network is asked, its images are not read either
    found = cases.opened(
        subject.model, data=images, lora=subject.lora, cache=subject.cache, trace=subject.trace, count=count, seed=seed,
        device=device, dtype=dtype, say=say, **answers,
    )  # fmt: skip
    found = replace(found, folder=subject.data)
    if subject.base is not None:
        same = subject.base == subject.model
        found = replace(found, base=found.bare if same else load(subject.base, device, dtype, force=True, **answers))
    return replace(found, bare=adapted(found.bare, embedding=subject.words)) if subject.words else found


def examined(subject: Subject, case: Case, names: Sequence[str] = ()) -> Diagnosis:
    """The diagnosis by these probes, or by all that can say something, with what a repetition needs.

    InputError where none of them could look.
    """
    chosen = [name for name in PROBES if name in (names or subject.probes)]
    found = diagnose(case, chosen) if subject.model is not None else of_trace(case)
    if not any(each.checked is not None for each in found.outcomes):
        why = "; ".join(dict.fromkeys(each.why for each in found.outcomes))
        raise InputError(f"nothing could be checked: {' '.join(why.split())}")
    shown = {
        "kind": subject.kind,
        "model": None if subject.model in (None, subject.path) else str(subject.model),
        "base": subject.base and str(subject.base),
        "lora": [f"{file}@{weight:g}" for file, weight in subject.lora],
        "words": [str(file) for file in subject.words],
        "data": subject.data and str(subject.data),
        "cache": subject.cache and str(subject.cache),
        "trace": subject.trace and str(subject.trace),
        "device": None if subject.model is None else str(case.bare.device),
        "dtype": None if subject.model is None else str(case.bare.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "remarks": list(subject.remarks),
    }
    return replace(found, path=str(subject.path), settings={**shown, **found.settings})


def of_trace(case: Case) -> Diagnosis:
    """What the trace alone says, where there is no model whose facts could be told."""
    began = time.perf_counter()
    case.say("trace")
    try:
        checked, why = probe("trace")(case), ""
    except (NotChecked, InputError) as reason:
        checked, why = None, str(reason)
    findings, follows = ranked(checked.findings if checked else ())
    spent = time.perf_counter() - began
    outcome = Outcome("trace", checked, why, spent)
    return Diagnosis(str(case.path), {}, findings, follows, (outcome,), spent, {"images": 0, "seed": case.seed})


# What is given.


def a_lora(path: str | Path) -> Path:
    """The path itself; InputError where it is no LoRA."""
    if kinds.adapter(existing(path, "--lora: ")) is None:
        raise InputError(f"--lora: {path} is no LoRA: none of its tensors is named as one of a low-rank change")
    return Path(path)


def a_trace(path: str | Path) -> Path:
    """A run folder, or the report of a former examination; InputError for anything else."""
    found = existing(path, "--trace: ")
    if found.suffix == ".json" or any((found / name).is_file() for name in (kinds.METRICS, kinds.RECIPE)):
        return found
    if (found / REPORT).is_file():
        return found / REPORT
    raise InputError(f"--trace: {path} is no run folder: it has neither {kinds.METRICS} nor {kinds.RECIPE}")


def existing(path: str | Path, flag: str = "") -> Path:
    """The path; InputError where nothing is there."""
    if not Path(path).exists():
        raise InputError(f"{flag}no such file or folder: {path}")
    return Path(path)


def optional(path: str | Path | None, flag: str) -> Path | None:
    """The same, where a path is given at all."""
    return None if path is None else existing(path, f"{flag}: ")


def needed(given: Subject, kind: str) -> Path:
    """The base that a subject cannot be examined without."""
    if given.base is None:
        raise InputError(f"{given.path} is {kind}. Name the model for it with --base MODEL.")
    return given.base

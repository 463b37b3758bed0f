"""What a path given to the doctor is, and what must be opened to examine it: a model, an addition, a cache, a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mezzotint.adapters import is_adapter
from mezzotint.checkpoints import find_weights, read_metadata, read_shapes
from mezzotint.contract import FILE
from mezzotint.data import cache as caches
from mezzotint.doctor import case as cases
from mezzotint.doctor.case import Case
from mezzotint.doctor.diagnose import diagnose
from mezzotint.doctor.finding import Diagnosis
from mezzotint.doctor.probes import PROBES
from mezzotint.errors import InputError
from mezzotint.families import facts, load
from mezzotint.families.adapt import LORA, adapted, inside
from mezzotint.families.materials import INDEX
from mezzotint.files import read_recipe

# What training leaves in a run folder.
RECIPE, MODEL, METRICS, CHECKPOINTS, CACHE = "recipe.toml", "model", "metrics.jsonl", "checkpoints", "cache"
WEIGHTS = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}
CODEC_METHODS = ("vae", "patch-pca")
WITHOUT_WEIGHTS = ("data", "trace")  # probes that ask nothing of the network

Kind = Literal["model", "LoRA", "words", "cache", "run", "unfinished run"]


@dataclass(frozen=True, slots=True)
class Subject:
    """What a path turned out to be."""

    path: Path  # as it was given
    kind: Kind
    model: Path  # that is opened
    base: Path | None = None  # to compare with
    lora: tuple[tuple[Path, float], ...] = ()
    words: tuple[Path, ...] = ()  # textual inversion
    data: Path | None = None
    cache: Path | None = None
    trace: Path | None = None
    answers: Mapping[str, Any] = field(default_factory=dict[str, Any])  # what a recipe says that files cannot
    probes: tuple[str, ...] = PROBES
    stands_in: bool = False  # the model is not what is examined: only `probes` can say something
    remarks: tuple[str, ...] = ()  # what was taken or left out without being asked


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
        optional(data, "--data"), optional(cache, "--cache"), optional(trace, "--trace"),
    )  # fmt: skip
    if given.cache is not None and not is_cache(given.cache):
        raise InputError(f"--cache: {given.cache} holds no latents or text states that training kept")
    if given.trace is not None and not any((given.trace / name).is_file() for name in (METRICS, RECIPE)):
        raise InputError(f"--trace: {given.trace} is no run folder: it has neither {METRICS} nor {RECIPE}")
    if path.is_file() and path.suffix.lower() not in WEIGHTS and not path.name.endswith(".index.json"):
        raise InputError(f"{path} is no model, adapter, cache or run of training. Give one of these.")
    recipe = recipe_of(path)
    if recipe is not None:
        return of_run(given, recipe)
    if not is_model(path):
        if (path / "state.json").is_file():
            raise InputError(f"{path} is a checkpoint of a run: give the run's folder, {path.resolve().parents[1]}")
        if is_cache(path):
            on = needed(given, f"{path} is a cache. Name the model that it was made for with --base")
            return replace(given, kind="cache", model=on, base=None, cache=path, probes=("cache",))
        if (kind := addition(path)) is not None:
            return of_addition(given, kind, path, needed(given, f"{path} is {kind}. Name the model for it with --base"))
    return given


def of_addition(given: Subject, kind: str, file: Path, model: Path) -> Subject:
    """A LoRA or words on a model; InputError for what the doctor has no probe for."""
    if kind == "a LoRA":
        return replace(given, kind="LoRA", model=model, base=None, lora=((file, 1.0), *given.lora))
    if kind == "textual inversion":
        return replace(given, kind="words", model=model, base=None, words=(file,))
    raise InputError(f"{file} is {kind}, for which there is no probe. Give the model that it steers.")


def of_run(given: Subject, recipe: Mapping[str, Any]) -> Subject:
    """A run folder: its trace, and the model that it made or trains on."""
    folder, remarks = given.path, list[str]()
    table = recipe.get("base") or {}
    base, named = given.base, table.get("path")
    if base is None and named is not None:
        base = Path(named) if Path(named).exists() else None
    gone = f"the recipe's base {named} is not here" if named and base is None else ""
    if given.data is None and isinstance(told := (recipe.get("data") or {}).get("folder"), str):
        found = Path(told).is_dir()
        remarks.append(f"images: {told}, from the recipe" if found else f"the recipe's data {told} is not here")
        given = replace(given, data=Path(told) if found else None)
    kept = Path((recipe.get("data") or {}).get("cache") or folder / CACHE)
    given = replace(
        given, kind="run", trace=given.trace or folder, cache=given.cache or (kept if is_cache(kept) else None),
        answers={key: table[key] for key in ("prediction", "distilled", "parts") if table.get(key) is not None},
    )  # fmt: skip
    made, method = folder / MODEL, recipe["method"]
    kind = addition(made) if made.is_dir() and not is_model(made) else None
    if made.is_dir() and kind is None and method not in CODEC_METHODS:
        return replace(given, model=made, base=base, remarks=(*remarks, *([gone] if gone else [])))
    if kind in ("a LoRA", "textual inversion"):
        if base is None:
            raise InputError(f"{folder} made {kind}, and {gone or 'its recipe names no base'}: name it with --base")
        found = of_addition(given, kind, adapter_file(made) or made, base)
        return replace(found, kind="run", remarks=tuple(remarks))
    why = f"{folder} is not finished, and a checkpoint is no model yet"
    if made.is_dir():
        why = f"{folder} made {kind or 'an autoencoder alone'}, which is no model that draws"
    if base is None:
        more = gone or "its recipe names no base"
        raise InputError(f"{why}; {more}. Read its trace beside a model that you name with --base.")
    remarks.append(f"{why}: its trace and data alone are examined, with {base} beside them")
    stands: Kind = "run" if made.is_dir() else "unfinished run"
    return replace(
        given, kind=stands, model=base, base=None, probes=WITHOUT_WEIGHTS, stands_in=True, remarks=tuple(remarks)
    )


def opened(
    subject: Subject,
    *,
    count: int = 24,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
    prediction: str | None = None,
    distilled: bool | None = None,
    parts: str | Path | None = None,
) -> Case:
    """The case of a subject, everything loaded; InputError with the load's own message where a part is damaged."""
    said = {"prediction": prediction, "distilled": distilled, "parts": parts}
    answers = {**subject.answers, **{key: value for key, value in said.items() if value is not None}}
    found = cases.opened(
        subject.model, data=subject.data, lora=subject.lora, cache=subject.cache, trace=subject.trace, count=count,
        seed=seed, device=device, dtype=dtype, say=say, **answers,
    )  # fmt: skip
    if subject.base is not None:
        say("base")
        found = replace(found, base=load(subject.base, device, dtype, force=True, **answers))
    if subject.words:
        found = replace(found, bare=adapted(found.bare, embedding=subject.words))
    return found


def examined(subject: Subject, case: Case, names: Sequence[str] = ()) -> Diagnosis:
    """The diagnosis by these probes, or by all that can say something, with what a repetition needs."""
    found = diagnose(case, [name for name in PROBES if name in (names or subject.probes)])
    if not any(each.checked is not None for each in found.outcomes):
        why = "; ".join(dict.fromkeys(each.why for each in found.outcomes))
        raise InputError(f"nothing could be checked: {' '.join(why.split())}")
    shown = {
        "kind": subject.kind,
        "model": None if subject.model == subject.path else str(subject.model),
        "base": subject.base and str(subject.base),
        "lora": [f"{file}@{weight:g}" for file, weight in subject.lora],
        "words": [str(file) for file in subject.words],
        "data": subject.data and str(subject.data),
        "cache": subject.cache and str(subject.cache),
        "trace": subject.trace and str(subject.trace),
        "device": str(case.bare.device),
        "dtype": str(case.bare.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "remarks": list(subject.remarks),
    }
    return replace(found, path=str(subject.path), settings={**shown, **found.settings})


# What things are.


def recipe_of(path: Path) -> dict[str, Any] | None:
    """The recipe of a run of training; None for anything else, such as a set that `synth` made."""
    if not (path / RECIPE).is_file():
        return None
    recipe = read_recipe(path / RECIPE)
    return recipe if "method" in recipe else None


def is_model(path: Path) -> bool:
    """Whether a folder claims to be a whole model; whether it is one, loading says.

    A control network has a contract too, and its network lies beside it.
    """
    return (path / INDEX).is_file() or ((path / FILE).is_file() and not (path / "config.json").is_file())


def is_cache(path: Path) -> bool:
    """Whether a file, or any in a folder, holds latents or text states that training kept."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    kinds = tuple(name.rpartition("-")[0] for name in (caches.LATENTS, caches.TEXT))
    return any(
        file.suffix == ".safetensors" and file.is_file() and read_metadata(file).get("format", "").startswith(kinds)
        for file in files
    )


def addition(path: Path) -> str | None:
    """What is added to a model, in words; None for anything else. A LoRA is known by its keys, however odd the rest."""
    if adapter_file(path) is not None:
        return "a LoRA"
    found = facts.addition(path)
    if found is None:
        return None
    return found["kind"] if found["kind"] == "textual inversion" else f"a {found['kind']}"


def adapter_file(path: Path) -> Path | None:
    """The LoRA that a file or folder is, in any of the layouts that training writes; None where there is none."""
    for place in (path, path / "kohya.safetensors", path / "peft"):
        if not place.exists():
            continue
        try:
            file = find_weights(inside(place, LORA, "LoRA"))
        except InputError:  # a folder without one, or not a file of weights
            continue
        if is_adapter(read_shapes(file)):
            return place
    return None


def a_lora(path: str | Path) -> Path:
    """The path itself; InputError where it is no LoRA."""
    if adapter_file(existing(path, "--lora: ")) is None:
        raise InputError(f"--lora: {path} is no LoRA: none of its tensors is named as one of a low-rank change")
    return Path(path)


def existing(path: str | Path, flag: str = "") -> Path:
    """The path; InputError where nothing is there."""
    if not Path(path).exists():
        raise InputError(f"{flag}no such file or folder: {path}")
    return Path(path)


def optional(path: str | Path | None, flag: str) -> Path | None:
    """The same, where a path is given at all."""
    return None if path is None else existing(path, f"{flag}: ")


def needed(given: Subject, what: str) -> Path:
    """The base that a subject cannot be examined without."""
    if given.base is None:
        raise InputError(f"{what} MODEL.")
    return given.base

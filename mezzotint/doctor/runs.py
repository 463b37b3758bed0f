"""What training left in a run folder: recipe, records, checkpoints, and how far the weights went."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mezzotint.checkpoints import read_tensors
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import NotChecked
from mezzotint.errors import InputError
from mezzotint.families import Model, load

METRICS, RECIPE = "metrics.jsonl", "recipe.toml"
BAND = re.compile(r"validation/(\d+)-(\d+)%")

Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left: its recipe, its records, its checkpoints."""

    folder: Path
    recipe: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...]
    checkpoints: tuple[Path, ...]  # oldest first

    def series(self, key: str) -> Points:
        return [(record["step"], float(record[key])) for record in self.records if record.get(key) is not None]

    @property
    def bands(self) -> dict[str, Points]:
        """The validation loss by band of the clock, little noise first."""
        keys = {key for record in self.records for key in record if BAND.fullmatch(key)}
        return {key.partition("/")[2]: self.series(key) for key in sorted(keys, key=_start)}

    @property
    def loss(self) -> Points:
        """The training loss; of an autoencoder without its adversary's, which starts late."""
        return self.series("loss/distance") or self.series("loss")

    def place(self, name: str | None) -> Path | None:
        """A folder that the recipe names, as seen from here or from above the run folder; None where it is gone."""
        roots = (Path(), *self.folder.resolve().parents)
        return next((root / name for root in roots if (root / name).is_dir()), None) if name else None

    def again(self, *changes: str) -> str:
        """The command that trains anew with these changes."""
        sets = "".join(f" --set {change}" for change in (*changes, f"out={self.folder}-again"))
        return f"mezzotint train {self.folder / RECIPE}{sets}"


def _start(key: str) -> int:
    found = BAND.fullmatch(key)
    return int(found[1]) if found else 0


def records(path: Path) -> list[dict[str, Any]]:
    """All records of metrics; a last line that a kill cut short is left out, and there are none without the file."""
    found: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def read(folder: Path) -> Run:
    """A run folder as training leaves it."""
    if not (folder / METRICS).is_file():
        raise NotChecked(f"{folder} holds no {METRICS}: give --trace the folder of a run")
    found = records(folder / METRICS)
    recipe = folder / RECIPE
    content = tomllib.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    checkpoints = sorted(path for path in (folder / "checkpoints").glob("step-*") if path.is_dir())
    return Run(folder, content, tuple(record for record in found if "step" in record), tuple(checkpoints))


@dataclass(frozen=True, slots=True)
class Weights:
    """What the checkpoints say of how far the weights moved; None where they cannot."""

    moved: float | None = None  # |w - w_start| / |w_start| of what has a start
    between: float | None = None  # the same between the last two checkpoints
    update: float | None = None  # |change of a step at the highest rate| / |w|
    idle: float | None = None  # share of the trained numbers that no gradient ever reached
    silent: tuple[str, ...] = ()  # what still stands at its initial zero, where all the rest of it would speak through


def weights_of(case: Case, run: Run) -> Weights:
    """From the trained weights (not their average) and the optimiser's moments of the last checkpoint."""
    newest = run.checkpoints[-1] if run.checkpoints else None
    names = sorted(path.stem for path in newest.glob("*.safetensors")) if newest else []
    name = next((n for n in names if n not in ("ema", "discriminator") and not n.endswith(".optimiser")), None)
    if newest is None or name is None:
        return Weights()
    last = read_tensors(newest / f"{name}.safetensors")
    between = None
    if len(run.checkpoints) > 1 and (earlier := run.checkpoints[-2] / f"{name}.safetensors").is_file():
        between = _distance(last, read_tensors(earlier))
    moments = newest / f"{name}.optimiser.safetensors"
    idle, update = _moments(run, last, read_tensors(moments)) if moments.is_file() else (None, None)
    moved = None
    base = _base(case, run)
    if base is not None:
        moved = _distance({_bare(key): value for key, value in last.items()}, _named(base.backbone))
    return Weights(moved, between, update, idle, _silent(last))


def _base(case: Case, run: Run) -> Model | None:
    """What the run started from, where it is at hand."""
    if case.base is not None:
        return case.base
    told = run.recipe.get("base") or {}
    place = run.place(told.get("path"))
    try:
        return load(place, force=True) if place else None
    except InputError:
        return None


def _named(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in network.named_parameters()}


def _bare(key: str) -> str:
    """A parameter's name without what training wraps around a network."""
    return re.sub(r"^(backbone\.|networks\.\d+\.)", "", key)


def _distance(now: Mapping[str, Tensor], then: Mapping[str, Tensor]) -> float | None:
    """|now - then| / |then| over the tensors that both have; None where that is little of what trains."""
    shared = [key for key, value in now.items() if key in then and then[key].shape == value.shape]
    if sum(now[key].numel() for key in shared) < sum(value.numel() for value in now.values()) / 2:
        return None
    squares = sum(float((now[key].double() - then[key].double()).square().sum()) for key in shared)
    size = sum(float(then[key].double().square().sum()) for key in shared)
    return math.sqrt(squares / size) if size else None


def _moments(run: Run, last: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> tuple[float | None, float | None]:
    """Share of numbers without a gradient, and rate |m / (sqrt(v) + eps)| / |w| at the run's highest rate.

    Adam's step is rate m / (sqrt(v) + eps) (Kingma & Ba 2015, algorithm 1; late in a run its bias correction is 1).
    """
    total = unreached = 0
    steps = sizes = 0.0
    eps = float(run.recipe.get("optimiser", {}).get("eps", 1e-8))
    for key, weight in last.items():
        m, v = moments.get(f"{key}.exp_avg"), moments.get(f"{key}.exp_avg_sq")
        if m is None or v is None:
            continue
        total += v.numel()
        unreached += int((v == 0).sum())
        steps += float((m.double() / (v.double().sqrt() + eps)).square().sum())
        sizes += float(weight.double().square().sum())
    peak = max((value for _, value in run.series("rate")), default=math.nan)
    return (unreached / total if total else None), (peak * math.sqrt(steps / sizes) if sizes else None)


def _silent(last: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Layers through which all that was trained acts, where every one of them is zero: then it acts on nothing.

    A low-rank addition acts through its second matrix (Hu et al. 2021), a control network through its zero
    convolutions (Zhang et al. 2023); training starts with them at zero.
    """
    for mark in ("lora_B", "lora_up", "controlnet_"):
        gates = {k: v for k, v in last.items() if mark in k and "cond_embedding" not in k and k.endswith("weight")}
        if gates and not any(bool(value.any()) for value in gates.values()):
            return tuple(gates)
    return ()


# Findings.

"""Whether a model has the weights of a run's last step where the run kept a moving average of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.adapters.apply import sharing
from mezzotint.checkpoints import open_tensors, read_json
from mezzotint.doctor import damage, readings
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Finding
from mezzotint.doctor.statistics import Mean

CHECKPOINTS, STATE, AVERAGE, RESULT = "checkpoints", "state.json", "ema.safetensors", "model"  # of a run folder
SAME = 4e-3  # relative distance that storing in bfloat16 makes
APART = 1e-4  # relative distance below which live weights and average are one
PREFIX, AVERAGED = "model.diffusion_model.", "model_ema."  # of original single files


def examine(case: Case) -> Finding | None:
    """The finding, where a run's folder or the file itself holds both; None where there is nothing to compare."""
    return _of_file(case) or _of_run(case)


def _of_run(case: Case) -> Finding | None:
    """Against live and averaged weights of each checkpoint of the run, newest first."""
    if case.trace is None or not (case.trace / CHECKPOINTS).is_dir():
        return None
    ours = case.bare.backbone.state_dict()
    for place in sorted((case.trace / CHECKPOINTS).glob("step-*"), reverse=True):
        for live, average in _pairs(place):
            shared = [name for name in live if _same_kind(live[name], average.get(name), ours.get(name))]
            if len(shared) < 0.5 * len(live):
                continue
            apart = _distance(live, average, shared)
            to_live, to_average = _distance(live, ours, shared), _distance(average, ours, shared)
            if apart > APART and to_live < min(SAME, 0.5 * apart):
                gain = _gain(case, average, shared)
                better = "" if gain is None else (
                    f" With the average it denoises your images with {100 * (1 - math.exp(-gain.value)):.1f} % less"
                    f" error (95 %: {100 * (1 - math.exp(-gain.low)):.1f} to {100 * (1 - math.exp(-gain.high)):.1f})."
                )  # fmt: skip
                return Finding(
                    "weights.average", "harmful",
                    f"The backbone has the weights of a last step ({to_live:.1e} of their size from those of"
                    f" {place.name} of {case.trace.name}), not their moving average ({to_average:.1e} apart).{better}",
                    f"Use the averaged weights: {RESULT}/ in the run's folder, or {AVERAGE} of its checkpoint.",
                    strength=min(100.0, max(1.0, to_average / max(to_live, APART))),
                )  # fmt: skip
    return None


def _pairs(place: Path) -> list[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """Live and averaged weights in a checkpoint."""
    if not (place / AVERAGE).is_file() or not (place / STATE).is_file():
        return []
    average = open_tensors(place / AVERAGE)
    files = [place / Path(name).name for name in read_json(place / STATE).get("files", {})]
    networks = [file for file in files if file.name != AVERAGE and not file.stem.endswith(".optimiser")]
    return [(open_tensors(file), average) for file in networks if file.is_file()]


def _same_kind(*tensors: Tensor | None) -> bool:
    shapes = {None if tensor is None or not tensor.is_floating_point() else tensor.shape for tensor in tensors}
    return len(shapes) == 1 and None not in shapes


def _gain(case: Case, average: Mapping[str, Tensor], names: Sequence[str]) -> Mean | None:
    """What the average denoises better by, paired over the user's images, where there are any."""
    if case.data is None:
        return None
    network = sharing(case.bare.backbone)
    network.load_state_dict({name: average[name] for name in names}, strict=False, assign=True)
    network.requires_grad_(False).to(case.bare.device, case.bare.dtype)
    own = damage.reading(case)
    other = own.named("averaged", model=replace(case.bare, backbone=network))
    return readings.score(case, other).gain(readings.score(case, own))


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """||a - b|| / ||a|| over all tensors of these names."""
    total = torch.zeros(2, dtype=torch.float64)
    for name in names:
        a, b = one[name].detach().cpu().float(), other[name].detach().cpu().float()
        total += torch.stack([(a - b).double().square().sum(), a.double().square().sum()])
    return float((total[0] / total[1].clamp(min=1e-30)).sqrt())


def _of_file(case: Case) -> Finding | None:
    """An original single file that has both: the network is read from the live ones.

    CompVis leaves the dots out of the averages' names.
    """
    if not case.path.is_file():
        return None
    tensors = open_tensors(case.path)
    averages = {name.removeprefix(AVERAGED): tensor for name, tensor in tensors.items() if name.startswith(AVERAGED)}
    live = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    pairs = {name: averages.get(name.removeprefix("model.").replace(".", "")) for name in live}
    average = {name: tensor for name, tensor in pairs.items() if tensor is not None and _same_kind(tensor, live[name])}
    if len(average) < 0.5 * max(1, len(live)):
        return None
    apart = _distance(live, average, list(average))
    if apart <= SAME:  # a long training's average and last step may be one but for rounding
        return None
    return Finding(
        "weights.average", "harmful",
        f"{case.path.name} holds the weights of the last step and their moving average, {apart:.1e} of their size"
        " apart; the network has those of the last step.",
        f"Use a file in which the averages ({AVERAGED}*) stand in the place of {PREFIX}*.",
        strength=max(1.0, apart / SAME),
    )  # fmt: skip

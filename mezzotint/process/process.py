"""The process a network was trained under: a schedule and the meaning of its output, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, get_args

from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.process.level import Level
from mezzotint.process.prediction import Prediction
from mezzotint.process.schedules import Betas, Discrete, LowEnd, MuRule, RectifiedFlow, Schedule

SCHEDULES: dict[str, type[Discrete] | type[RectifiedFlow]] = {"discrete": Discrete, "rectified_flow": RectifiedFlow}
CHOICES: dict[str, tuple[str, ...]] = {"betas": get_args(Betas), "low_end": get_args(LowEnd), "mu": get_args(MuRule)}


@dataclass(frozen=True, slots=True)
class Process:
    """Schedule and prediction, checked to fit each other when made.

    Raises InputError for velocity on a flow, flow on a variance-preserving table, and epsilon where alpha reaches 0
    (zero terminal SNR, rectified flow): there the noise says nothing about the image.
    """

    schedule: Schedule
    prediction: Prediction

    def __post_init__(self) -> None:
        schedule, flow = self.schedule, isinstance(self.schedule, RectifiedFlow)
        clash = f"prediction '{self.prediction}' does not fit schedule '{schedule.name}'"
        if self.prediction is Prediction.VELOCITY and flow:
            raise InputError(
                f"{clash}: velocity needs alpha^2 + sigma^2 = 1. Use 'flow' or a variance-preserving schedule"
            )
        if self.prediction is Prediction.FLOW and not flow:
            raise InputError(f"{clash}: flow needs alpha + sigma = 1. Use 'velocity' or schedule 'rectified_flow'")
        if self.prediction is Prediction.EPSILON and (
            isinstance(schedule, RectifiedFlow) or schedule.zero_terminal_snr
        ):
            raise InputError(
                f"{clash}: the noise alone cannot give the image where alpha is 0. Use 'velocity', 'flow' or 'clean'"
            )

    def level(self, t: float) -> Level[float]:
        """The level at t: a timestep 0..T-1 of a table, a time 0..clock of a flow."""
        return self.schedule.level(t)

    def levels(self, t: Tensor) -> Level[Tensor]:
        """The levels of a batch: t (B,), alpha and sigma float32 (B, 1, 1, 1)."""
        return self.schedule.levels(t)

    def noised(self, clean: Tensor, noise: Tensor, level: Level[float] | Level[Tensor]) -> Tensor:
        """x = alpha clean + sigma noise."""
        return level.alpha * clean + level.sigma * noise

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `Process.from_dict` gives back an equal process."""
        kind, numbers = "rectified_flow", asdict(self.schedule)
        if isinstance(self.schedule, Discrete):
            kind = "discrete"
            if self.schedule.tick == 1.0:  # nearly everywhere; so files written before there was a tick compare equal
                del numbers["tick"]
        return {"prediction": self.prediction.value, "schedule": {"kind": kind, **numbers}}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Process:
        """Read what `to_dict` wrote. Raises InputError for unknown keys and names, with the nearest valid one."""
        for key in data:
            _one_of(key, ("prediction", "schedule"), "key of a process")
        if "prediction" not in data or "schedule" not in data:
            raise InputError("a process needs the keys 'prediction' and 'schedule': add the missing one")
        numbers = dict(data["schedule"])
        kind = SCHEDULES[_one_of(str(numbers.pop("kind", "")), tuple(SCHEDULES), "schedule kind")]
        known = tuple(f.name for f in fields(kind))
        for key, value in numbers.items():
            _one_of(key, known, "key of a schedule")
            if key in CHOICES:
                _one_of(str(value), CHOICES[key], f"value of '{key}'")
            elif isinstance(value, str) or not isinstance(value, (int, float)):
                raise InputError(f"'{key}' of a schedule must be a number, not {value!r}")
        if kind is Discrete and "betas" not in numbers:
            raise InputError("a discrete schedule needs the key 'betas': linear, scaled_linear or cosine")
        name = _one_of(str(data["prediction"]), tuple(p.value for p in Prediction), "prediction")
        return Process(kind(**numbers), Prediction(name))


def _one_of(word: str, valid: tuple[str, ...], what: str) -> str:
    if word in valid:
        return word
    near = get_close_matches(word, valid, n=1, cutoff=0.0)
    raise InputError(f"unknown {what} '{word}': did you mean '{near[0]}'? Valid: {', '.join(valid)}")

"""Published scheduler files: from them to the process and the sampling facts of a model, and back.

A file names one scheduler, but its keys speak to every sampler whose counterpart in the reference library knows them:
that is how the reference makes one scheduler from another's file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from mezzotint.contract import SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.scheduler_keys import (
    BETAS,
    FIXED,
    FLOW,
    LINE,
    MUTE,
    PREDICTIONS,
    RAMPED,
    RULES,
    SAMPLERS,
    SCHEDULERS,
    SETTINGS,
    SILENT,
    VARIANCES,
    Ends,
    Rule,
    Scheduler,
    Width,
)
from mezzotint.layers.config import read_config
from mezzotint.process import Discrete, Prediction, Process, RectifiedFlow, schedules

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SchedulerFacts:
    """What a scheduler file says about sampling, named as in `SamplingFacts`; None where it is silent.

    `sampler` is None where we have no sampler that gives the file's own picture; `learned`: the network gives its own
    variance.
    """

    sampler: str | None = None
    spacing: Rule | None = None
    offset: int = 0
    last: Ends | None = None
    variance: Width | None = None
    clip: float | Literal["default"] | None = None  # default: the file is silent, so each sampler does as it does
    learned: bool = False

    def sampling(self, sampler: str, steps: int) -> SamplingFacts:
        """The contract's facts; `sampler` is taken where the file suggests none."""
        return SamplingFacts(
            sampler=self.sampler or sampler, steps=steps, spacing=self.spacing, offset=self.offset, last=self.last,
            variance=self.variance, clip=self.clip,
        )  # fmt: skip


def read_scheduler(
    data: Mapping[str, Any], at: Path, flow: RectifiedFlow | None = None
) -> tuple[Process, SchedulerFacts]:
    """The process and the sampling facts that scheduler_config.json, found at `at`, states.

    `flow` is the family's rule where a file of flows is silent: where the levels end, and how the shift follows the
    picture if the file says that it does; a static shift is the file's. Raises InputError for a scheduler, a key or a
    value that we cannot honour. How the network's clock runs (`Discrete.tick`) is in no file: the family says it.
    """
    kind = data.get("_class_name")
    if not isinstance(kind, str) or kind not in SAMPLERS:
        raise InputError(f"{at}: '_class_name' is {kind!r}; schedulers that can be read: {', '.join(SAMPLERS)}")
    told = {key: value for key, value in data.items() if not (key in SETTINGS or key in MUTE or key in LINE)}
    try:
        keys = read_config(Scheduler, SILENT.get(kind, {}) | told, FIXED)
        process = _flow(keys, kind, flow, data) if kind == FLOW or keys.use_flow_sigmas else _table(keys)
        spacing, variance = keys.timestep_spacing, keys.variance_type
        facts = SchedulerFacts(
            sampler=_sampler(kind, keys, data),
            spacing=None if spacing is None else _named(RULES, spacing, "timestep_spacing"),
            offset=keys.steps_offset,
            last={True: "clean", False: "lowest", None: None}[keys.set_alpha_to_one],
            variance=None if variance is None else _named(VARIANCES, variance, "variance_type"),
            clip=_clip(keys, data, process),
            learned=variance == "learned_range",
        )
    except InputError as error:
        raise InputError(f"{at}: {error}") from error
    return process, facts


def scheduler_config(
    process: Process, facts: SchedulerFacts | SamplingFacts | None = None, learned: bool = False
) -> dict[str, Any]:
    """The content of scheduler/scheduler_config.json with which the reference library walks as we do.

    Its class follows the facts' sampler, DDIM where that says nothing; flow-matching Euler for flows. `learned`: the
    network gives its own variance. No file can say a tick other than 1, a flow that predicts the clean image, or a
    flow's low end and shift rule: contract.json does.
    """
    facts = facts or SchedulerFacts()
    schedule, sampler = process.schedule, facts.sampler or "ddim"
    if isinstance(schedule, RectifiedFlow):
        moving = schedule.mu != "none"
        return {
            "_class_name": FLOW,
            "num_train_timesteps": int(schedule.clock),
            "shift": schedule.shift,
            "use_dynamic_shifting": moving,
        }
    kind = SCHEDULERS.get(sampler.removesuffix("_karras").replace("_sde", ""), "DDIMScheduler")
    if kind == FLOW or (kind == "HeunDiscreteScheduler" and schedule.zero_terminal_snr):  # which knows no such table
        kind = "DDIMScheduler"
    written = {
        "_class_name": kind,
        "num_train_timesteps": schedule.timesteps,
        "beta_schedule": _key_of(BETAS, schedule.betas),
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "prediction_type": _key_of(PREDICTIONS, process.prediction),
        "steps_offset": facts.offset,
    }
    if facts.clip != "default":
        written["clip_sample"] = facts.clip is not None
    if isinstance(facts.clip, float):
        written["clip_sample_range"] = facts.clip
    if facts.spacing is not None:
        written["timestep_spacing"] = facts.spacing
    if facts.last is not None:
        written["set_alpha_to_one"] = facts.last == "clean"
    if learned or (isinstance(facts, SchedulerFacts) and facts.learned):
        written["variance_type"] = "learned_range"
    elif facts.variance is not None:
        written["variance_type"] = f"fixed_{facts.variance}"
    if sampler.endswith("_karras"):
        written["use_karras_sigmas"] = True
    if "_sde" in sampler:
        written["algorithm_type"] = "sde-dpmsolver++"
    return written


def _table(keys: Scheduler) -> Process:
    """A table of noise; the cosine one has no ends to set."""
    betas, prediction = _named(BETAS, keys.beta_schedule, "beta_schedule"), keys.prediction_type
    if keys.use_dynamic_shifting:
        raise InputError("'use_dynamic_shifting' speaks of a flow, and this scheduler's is not one")
    if betas == "cosine":
        schedule = schedules.cosine(keys.num_train_timesteps)
    else:
        schedule = Discrete(betas, keys.beta_start, keys.beta_end, keys.num_train_timesteps)
    schedule = replace(schedule, zero_terminal_snr=keys.rescale_betas_zero_snr)
    return Process(schedule, _named(PREDICTIONS, prediction, "prediction_type"))


def _flow(keys: Scheduler, kind: str, family: RectifiedFlow | None, data: Mapping[str, Any]) -> Process:
    """A flow: the shift is the file's, or follows the picture by the family's rule."""
    told = family or RectifiedFlow()
    if keys.num_train_timesteps != 1000 and told.low_end != "even":
        raise InputError(f"'num_train_timesteps' = {keys.num_train_timesteps} on a flow; only 1000 is supported")
    if kind != FLOW and keys.prediction_type != "flow_prediction":
        raise InputError(f"'use_flow_sigmas' needs 'prediction_type' = 'flow_prediction', not {keys.prediction_type!r}")
    if keys.use_dynamic_shifting and (family is None or family.mu == "none"):
        raise InputError(
            "'use_dynamic_shifting' says that the shift follows the picture, and nothing known says by what rule"
        )
    told = replace(told, clock=float(keys.num_train_timesteps))
    if not keys.use_dynamic_shifting:
        return Process(
            replace(told, mu="none", shift=float(keys.shift if kind == FLOW else keys.flow_shift)), Prediction.FLOW
        )
    bent = [key for key, value in LINE.items() if data.get(key, value) != value]
    if told.mu == "linear" and bent:
        raise InputError(f"'{bent[0]}' = {data[bent[0]]!r} is not supported: only {LINE[bent[0]]!r}")
    return Process(told, Prediction.FLOW)


def _sampler(kind: str, keys: Scheduler, data: Mapping[str, Any]) -> str | None:
    """Our sampler that walks as this file's own scheduler does, if there is one."""
    name: str | None = SAMPLERS[kind] or None
    if name is None or any(data[key] not in right for key, right in SETTINGS.items() if key in data):
        return None
    if kind == "DPMSolverMultistepScheduler":
        name = {"dpmsolver++": "dpmpp_2m", "sde-dpmsolver++": "dpmpp_2m_sde"}.get(keys.algorithm_type)
    if name is not None and keys.use_karras_sigmas and kind in RAMPED:
        return f"{name}_karras" if kind in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler") else None
    return name


def _clip(keys: Scheduler, data: Mapping[str, Any], process: Process) -> float | Literal["default"] | None:
    if "clip_sample" not in data:  # the reference's samplers that clip by themselves walk no flows
        return None if isinstance(process.schedule, RectifiedFlow) else "default"
    return float(keys.clip_sample_range) if keys.clip_sample else None


def _named(names: Mapping[str, T], value: str, key: str) -> T:
    if value not in names:
        raise InputError(f"'{key}' = {value!r} is not supported: only {', '.join(names)}")
    return names[value]


def _key_of(names: Mapping[str, T], value: T) -> str:
    return next(key for key, other in names.items() if other == value)

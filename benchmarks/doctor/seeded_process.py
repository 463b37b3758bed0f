"""Faults of the process: objective, noise levels, clock, terminal noise, the path's shift and start."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from random import Random
from typing import Any

from patient import Patient, Unfit, contract, scheduler, uniform

Seed = Callable[[Patient, Random], Patient]


def claimed(prediction: str) -> Seed:
    """The files claim another prediction; in the words of scheduler files, or of contracts."""
    words = {"velocity": "v_prediction", "clean": "sample", "epsilon": "epsilon"}

    def seed(patient: Patient, rng: Random) -> Patient:
        if patient.is_native:
            contract(patient, lambda facts: facts["process"].update(prediction=prediction))
        else:
            scheduler(patient, prediction_type=words[prediction])
        return patient

    return seed


def file_of(name: str, **changes: Any) -> Seed:
    """scheduler_config.json of another model was copied in."""

    def seed(patient: Patient, rng: Random) -> Patient:
        source = patient.nest.model(name) / "scheduler" / "scheduler_config.json"
        if not source.is_file():
            raise Unfit(f"{name} is not there")
        shutil.copy(source, patient.path / "scheduler" / "scheduler_config.json")
        scheduler(patient, **changes)
        return patient

    return seed


def as_flow(patient: Patient, rng: Random) -> Patient:
    """A contract that says rectified flow of a network trained on a table."""
    flow = {"kind": "rectified_flow", "shift": 1.0, "low_end": "twice", "mu": "none", "clock": 1000.0}
    contract(patient, lambda facts: facts.update(process={"prediction": "flow", "schedule": flow}))
    contract(patient, lambda facts: facts["sampling"].update(sampler="flow_euler", spacing=None))
    return patient


def as_table(patient: Patient, rng: Random) -> Patient:
    """A contract that says epsilon on Stable Diffusion's table of a network trained as a flow."""
    table = {"kind": "discrete", "betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
             "timesteps": 1000, "zero_terminal_snr": False}  # fmt: skip
    contract(patient, lambda facts: facts.update(process={"prediction": "epsilon", "schedule": table}))
    contract(patient, lambda facts: facts["sampling"].update(sampler="ddim"))
    return patient


def schedule(**changes: Any) -> Seed:
    """Numbers of the schedule as given; functions draw theirs."""

    def seed(patient: Patient, rng: Random) -> Patient:
        drawn = {key: value(rng) if callable(value) else value for key, value in changes.items()}
        if patient.is_native:
            contract(patient, lambda facts: facts["process"]["schedule"].update(drawn))
            return patient
        names = {
            "betas": "beta_schedule",
            "timesteps": "num_train_timesteps",
            "zero_terminal_snr": "rescale_betas_zero_snr",
        }
        betas = {"cosine": "squaredcos_cap_v2"}
        drawn = {
            names.get(key, key): betas.get(value, value) if key == "betas" else value for key, value in drawn.items()
        }
        scheduler(patient, **drawn)
        return patient

    return seed


def more_timesteps(patient: Patient, rng: Random) -> Patient:
    """The same betas on a finer table, of which the network is told thousandths: far more noise than it ever saw."""
    count = rng.choice((2000, 4000))
    finer = {"timesteps": count, "tick": 1000 / count}
    contract(patient, lambda facts: facts["process"]["schedule"].update(finer))
    return patient


def between(low: float, high: float) -> Callable[[Random], float]:
    return lambda rng: float(f"{uniform(rng, low, high):.4g}")


def chosen(*values: Any) -> Callable[[Random], Any]:
    return lambda rng: rng.choice(values)


def start_early(patient: Patient, rng: Random) -> Patient:
    """Leading timesteps on a model that was trained down to pure noise: the path never sees its first level."""
    steps = rng.choice((5, 6, 7))
    contract(patient, lambda facts: facts["sampling"].update(spacing="leading", offset=0, steps=steps))
    return patient

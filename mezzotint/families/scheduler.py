"""The process as the scheduler file that the reference library opens."""

from __future__ import annotations

from typing import Any

from mezzotint.process import Discrete, Prediction, Process, RectifiedFlow

BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {Prediction.EPSILON: "epsilon", Prediction.CLEAN: "sample", Prediction.VELOCITY: "v_prediction"}


def scheduler_config(process: Process) -> dict[str, Any]:
    """The content of scheduler/scheduler_config.json: a DDIM scheduler for tables, flow-matching Euler for flows.

    Written for other programs alone; Mezzotint reads its process from contract.json.
    """
    schedule = process.schedule
    if isinstance(schedule, RectifiedFlow):
        return {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": int(schedule.clock),
            "shift": schedule.shift,
            "use_dynamic_shifting": schedule.mu != "none",
        }
    return _table(schedule, process.prediction)


def _table(schedule: Discrete, prediction: Prediction) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.timesteps,
        "beta_schedule": BETAS[schedule.betas],
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
        "prediction_type": PREDICTIONS[prediction],
        "clip_sample": False,
        "timestep_spacing": "trailing" if schedule.zero_terminal_snr else "leading",
    }

"""The vocabulary of published scheduler files: which keys and values say what, and which are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mezzotint.process import Prediction

Ends = Literal["clean", "lowest"]
Rule = Literal["leading", "linspace", "trailing"]
Width = Literal["small", "large"]

BETAS: dict[str, Literal["linear", "scaled_linear", "cosine"]] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
}
PREDICTIONS = {
    "epsilon": Prediction.EPSILON,
    "sample": Prediction.CLEAN,
    "v_prediction": Prediction.VELOCITY,
    "flow_prediction": Prediction.FLOW,
}
RULES: dict[str, Rule] = {"leading": "leading", "linspace": "linspace", "trailing": "trailing"}
VARIANCES: dict[str, Width | None] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": None,
}

FLOW = "FlowMatchEulerDiscreteScheduler"
# Scheduler -> our sampler; "" where we offer none. A ramp and an SDE are part of a sampler's name with us.
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    FLOW: "flow_euler",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "",
    "PNDMScheduler": "",
    "UniPCMultistepScheduler": "unipc",
}
SCHEDULERS = {sampler: kind for kind, sampler in SAMPLERS.items() if sampler}

# The schedulers with a switch for Karras' levels, where a file of theirs may set it.
RAMPED = {"DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"}
RAMPED |= {FLOW}

# What a silent file means, where it is not what `Scheduler` says.
SILENT: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"clip_sample": True},
    "DDPMScheduler": {"clip_sample": True},
    "HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012},
    "LCMScheduler": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
}

# Settings of one sampler under which ours of that name gives the reference's picture; under others we suggest none.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "disable_corrector": ([],),
    "final_sigmas_type": ("zero",),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-float("inf"),),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "solver_order": (2,),
    "solver_p": (None,),
    "solver_type": ("midpoint", "bh2"),
    "stochastic_sampling": (False,),
    "use_beta_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_lu_lambdas": (False,),
}
# Settings that change nothing here: a path ends clean, nothing is thresholded, and PNDM is not offered.
MUTE = {"dynamic_thresholding_ratio", "euler_at_final", "sample_max_value", "skip_prk_steps", "tensor_format"}

# The line of `schedules.linear_mu`; other values are refused where the shift follows it, and mute elsewhere.
LINE: dict[str, object] = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}

# What the network was trained under or told, and we build one way only.
FIXED: dict[str, object] = {
    "invert_sigmas": False,
    "original_inference_steps": 50,
    "shift_terminal": None,
    "sigma_max": None,
    "sigma_min": None,
    "thresholding": False,
    "time_shift_type": "exponential",
    "timestep_scaling": 10.0,
    "timestep_type": "discrete",
    "timestep_values": None,  # of the first files
    "trained_betas": None,
}


@dataclass(frozen=True, slots=True)
class Scheduler:
    """The keys of a scheduler file that we act on."""

    num_train_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    set_alpha_to_one: bool | None = None
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    variance_type: str | None = None
    algorithm_type: str = "dpmsolver++"
    use_karras_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    shift: float = 1.0
    use_dynamic_shifting: bool = False

"""Published scheduler files: read, walked beside the reference under every sampler, and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from sampling_oracle import REFERENCES, Row, difference, run_ours, run_reference, tensors

from mezzotint.contract import SamplingFacts
from mezzotint.errors import InputError
from mezzotint.families.scheduler import SchedulerFacts, read_scheduler, scheduler_config
from mezzotint.process import Prediction, Process, RectifiedFlow, schedules
from mezzotint.sampling import SAMPLERS, fitted

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 and the reference

AT = Path("model/scheduler/scheduler_config.json")
LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
OLD = {"clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
FILES: dict[str, dict[str, Any]] = {
    "sd15": {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "trained_betas": None, **LATENT, **OLD},
    "sd21": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "trained_betas": None, **LATENT, **OLD},
    "sdxl": {
        "_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "prediction_type": "epsilon",
        "sample_max_value": 1.0, "timestep_spacing": "leading", "use_karras_sigmas": False, "trained_betas": None,
        **LATENT, **OLD,
    },
    "cifar": {
        "_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
        "num_train_timesteps": 1000, "variance_type": "fixed_large", "clip_sample": True, "trained_betas": None,
    },
    "cosine": {
        "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample",
        "clip_sample": True, "clip_sample_range": 0.6, "timestep_spacing": "trailing",
    },
    "dit": {
        "_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
        "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "epsilon",
    },
    "zero_snr": {
        "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing", "clip_sample_range": 1.0, **LATENT, **OLD,
    },
    "lcm": {
        "_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0, "clip_sample": False,
        "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "thresholding": False, "set_alpha_to_one": True,
        "timestep_spacing": "leading", "rescale_betas_zero_snr": False, **LATENT,
    },
}  # fmt: skip
SD35 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX2 = {
    **SD35, "base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 4096,
    "max_shift": 1.15, "shift_terminal": None, "stochastic_sampling": False, "time_shift_type": "exponential",
    "use_beta_sigmas": False, "use_dynamic_shifting": True, "use_exponential_sigmas": False, "use_karras_sigmas": False,
}  # fmt: skip


def walks_alike(file: dict[str, Any], name: str, steps: int, start: int, flow: RectifiedFlow | None = None) -> float:
    """How far our sampler fitted to the file lies from the reference's scheduler made from the same file."""
    process, facts = read_scheduler(file, AT, flow)
    sampler = fitted(SAMPLERS[name], facts.spacing, facts.offset, facts.last, facts.variance)
    kind, extra = REFERENCES[name]
    choice = {key: value for key, value in extra.items() if key != "clip_sample"}
    theirs = getattr(diffusers, kind).from_config(file, **choice)
    row = Row(name, "zero_snr" if file.get("rescale_betas_zero_snr") else "linear", process.prediction)
    noise, clean = tensors()
    image = run_reference(theirs, noise, clean, steps, start, row.doubled)
    told = float(theirs.timesteps[0])
    ours = run_ours(sampler, process, noise, clean, steps, start, lambda level: row.first(level, told), clip=facts.clip)
    times = [float(t) for t in theirs.timesteps]
    walked = [step.now.t for step in sampler.path(process, steps).steps]
    assert walked == pytest.approx(times[:: 2 if name == "heun" else 1], abs=1.0 if "karras" in name else 1e-3)
    return difference(ours, image)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "flow_euler"])
@pytest.mark.parametrize("file", FILES)
def test_every_sampler_made_from_a_published_file_equals_the_reference(file: str, name: str) -> None:
    if file == "zero_snr" and name == "heun":
        pytest.skip("the reference's Heun has no zero terminal SNR")
    if file == "cosine" and name == "euler_ancestral":
        pytest.skip("the reference has not implemented it for clean predictions")
    for steps in (7, 20):
        for start in (0, steps // 2):
            assert walks_alike(FILES[file], name, steps, start) <= 5e-6


@pytest.mark.parametrize("start", [0, 10])
def test_a_static_flow_equals_the_reference(start: int) -> None:
    assert walks_alike(SD35, "flow_euler", 20, start) <= 5e-6


def test_what_each_published_file_says() -> None:
    found = {name: read_scheduler(file, AT) for name, file in FILES.items()}
    latent = Process(schedules.scaled_linear(), Prediction.EPSILON)
    assert found["sd15"] == (latent, SchedulerFacts(None, None, 1, "lowest"))
    assert found["sd21"][0].prediction is Prediction.VELOCITY and found["sd21"][1].sampler == "ddim"
    assert found["sdxl"] == (latent, SchedulerFacts("euler", "leading", 1, "lowest"))
    assert found["cifar"] == (
        Process(schedules.linear(), Prediction.EPSILON),
        SchedulerFacts("ddpm", variance="large", clip=1.0),
    )
    assert found["cosine"] == (
        Process(schedules.cosine(), Prediction.CLEAN),
        SchedulerFacts("ddpm", "trailing", clip=0.6),
    )
    assert found["zero_snr"][0].schedule == schedules.zero_terminal_snr(schedules.scaled_linear())
    assert found["lcm"] == (latent, SchedulerFacts("lcm", "leading", last="clean"))
    assert found["sd15"][1].sampling("dpmpp_2m", 25) == SamplingFacts(
        sampler="dpmpp_2m", steps=25, offset=1, last="lowest"
    )


def test_a_flow_follows_the_family_where_the_file_is_silent() -> None:
    assert read_scheduler(SD35, AT)[0] == Process(schedules.sd35(), Prediction.FLOW)
    assert read_scheduler(FLUX2, AT, schedules.flux2())[0] == Process(schedules.flux2(), Prediction.FLOW)
    still = FLUX2 | {"use_dynamic_shifting": False}
    assert read_scheduler(still, AT, schedules.flux2())[0].schedule == RectifiedFlow(3.0, "even")
    for family in (None, schedules.sd35()):
        with pytest.raises(InputError, match=r"use_dynamic_shifting.*rule"):
            read_scheduler(FLUX2, AT, family)
    line = schedules.rectified_flow(low_end="once", mu="linear")
    assert read_scheduler(FLUX2, AT, line)[0].schedule == line
    with pytest.raises(InputError, match="max_shift"):
        read_scheduler(FLUX2 | {"max_shift": 1.3}, AT, line)


@pytest.mark.parametrize(
    ("kind", "more", "sampler"),
    [
        ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp_2m_karras"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp_2m_sde"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, None),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, None),
        ("UniPCMultistepScheduler", {"use_karras_sigmas": True, "solver_type": "bh2"}, "unipc_karras"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, None),
        ("EulerAncestralDiscreteScheduler", {}, "euler_ancestral"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, None),
        ("HeunDiscreteScheduler", {}, "heun"),
        ("DDIMScheduler", {"use_karras_sigmas": True}, "ddim"),
        ("LMSDiscreteScheduler", {}, None),
    ],
)
def test_the_sampler_that_a_file_suggests(kind: str, more: dict[str, Any], sampler: str | None) -> None:
    assert read_scheduler({"_class_name": kind, **LATENT, **more}, AT)[1].sampler == sampler


def test_a_silent_file_means_its_own_class_s_defaults() -> None:
    for kind in (*(k for k, _ in REFERENCES.values()), "PNDMScheduler"):
        if kind == "FlowMatchEulerDiscreteScheduler":
            continue
        process, facts = read_scheduler({"_class_name": kind}, AT)
        theirs = getattr(diffusers, kind)()
        table = [process.level(t).alpha ** 2 for t in (0, 500, 999)]
        assert table == pytest.approx(theirs.alphas_cumprod[[0, 500, 999]].tolist(), rel=1e-6)
        assert facts.clip == "default"  # each sampler as its own class does


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "_class_name.*EDMEulerScheduler"),
        ({"beta_shedule": "linear"}, "beta_shedule.*did you mean 'beta_schedule'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"thresholding": True}, "thresholding"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule.*sigmoid"),
        ({"prediction_type": "eps"}, "prediction_type.*eps"),
        ({"prediction_type": "flow_prediction"}, "flow"),
        ({"rescale_betas_zero_snr": True}, "epsilon"),
        ({"variance_type": "learned"}, "variance_type.*learned"),
        ({"timestep_spacing": "even"}, "timestep_spacing"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"sigma_min": 0.002}, "sigma_min"),
        ({"original_inference_steps": 100}, "original_inference_steps"),
        ({"steps_offset": "one"}, "steps_offset"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"beta_start": 0.5}, "beta"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name_and_file(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_scheduler({"_class_name": "DDIMScheduler", **LATENT, **change}, AT)
    assert str(AT) in str(caught.value)


PROCESSES = [
    Process(schedules.linear(), Prediction.EPSILON),
    Process(schedules.scaled_linear(), Prediction.CLEAN),
    Process(schedules.cosine(4000), Prediction.VELOCITY),
    Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY),
]
FACTS = [
    SchedulerFacts("ddim"),
    SchedulerFacts("ddim", "trailing", 0, "lowest"),
    SchedulerFacts("ddpm", "leading", 0, "clean", "large", 1.0),
    SchedulerFacts("ddpm", clip=0.5, learned=True),
    SchedulerFacts("dpmpp_2m_sde_karras", "linspace"),
    SchedulerFacts("unipc_karras", "trailing"),
    SchedulerFacts("euler", "leading", 1, variance="small"),
    SchedulerFacts("lcm"),
]


@pytest.mark.parametrize("facts", FACTS, ids=lambda f: f.sampler)
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.schedule.name)
def test_a_written_table_reads_back_as_it_was(process: Process, facts: SchedulerFacts) -> None:
    assert read_scheduler(json.loads(json.dumps(scheduler_config(process, facts))), AT) == (process, facts)


@pytest.mark.parametrize(
    "flow",
    [schedules.sd35(), schedules.flux2(), schedules.rectified_flow(2.0, "even"), schedules.rectified_flow(2.0, "once")],
)
def test_a_written_flow_reads_back_under_its_family_s_rule(flow: RectifiedFlow) -> None:
    process = Process(flow, Prediction.FLOW)
    assert read_scheduler(scheduler_config(process), AT, flow)[0] == process


@pytest.mark.parametrize("facts", [f for f in FACTS if f.sampler and not f.learned], ids=lambda f: f.sampler)
def test_the_reference_walks_our_files_as_we_do(facts: SchedulerFacts) -> None:
    for process in PROCESSES[:2]:
        file = scheduler_config(process, facts.sampling("ddim", 20))
        assert file["_class_name"] == REFERENCES[facts.sampler or ""][0]
        assert walks_alike(file, facts.sampler or "", 7, 0) <= 5e-6

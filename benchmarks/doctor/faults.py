"""Every fault that the benchmark seeds: its true cause, how it is seeded, the models that it can befall.

A fault is a function of a patient, whose files are a copy, and a seeded generator that draws how grave it is and where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import seeded_adapters as adapters
import seeded_data as data_faults
import seeded_latent as latent
import seeded_process as process
import seeded_text as text
import seeded_use as use
import seeded_weights as weights
import torch
from collapsed import collapsed
from patient import CELLS, Patient, Unfit, traced

SD = ("sd1-epsilon", "sd2-velocity")
TEXT = (*SD, "sd35-flow")
FLOWS = ("sd35-flow", "solar-cells")
TABLE = ("dit-clean", "unet-zsnr")  # native, on a table of noise
NATIVE = (*TABLE, "solar-cells")
MODELS = ("sd1-epsilon", "sd2-velocity", "sd35-flow", "dit-clean", "unet-zsnr", "ddpm-epsilon", "solar-cells")
LORAS = ("sd1-lora-a", "sd1-lora-b")
HEALTHY = (*MODELS, *LORAS, "sd1-tuned", "sd1-lcm")


@dataclass(frozen=True)
class Fault:
    """`cause` is a name of mezzotint.doctor.causes, "" where nothing is wrong; `pain` a number of pains.md."""

    cause: str
    seed: Callable[[Patient, Random], Patient]
    models: tuple[str, ...]
    pain: int | None = None
    seen: bool = True  # whether it changes what the network or the codec computes; else files or time


def as_it_is(patient: Patient, rng: Random) -> Patient:
    return patient


def held_out(patient: Patient, rng: Random) -> Patient:
    """With images that the model was not trained on."""
    other = CELLS / "validation" if patient.name == "solar-cells" else Path(patient.nest.data("dozen"))
    return replace(patient, data=other, seed=1)


def with_run(patient: Patient, rng: Random) -> Patient:
    """With its training run, and the cache that it kept."""
    patient = traced(patient)
    run = patient.nest.run(patient.name)
    return latent.cached(patient) if (run / "cache").is_dir() and not run.is_symlink() else patient


def without_images(patient: Patient, rng: Random) -> Patient:
    return replace(patient, data=None)


def both_adapters(patient: Patient, rng: Random) -> Patient:
    """With a little of the second adapter beside the first, on images that show what the first knows."""
    other = patient.nest.model("sd1-lora-b") / "kohya.safetensors"
    if not other.is_file():
        raise Unfit("the second adapter is not there")
    return replace(patient, lora=((patient.lora[0][0], 1.0), (other, 0.15)))


def half_adapter(patient: Patient, rng: Random) -> Patient:
    return replace(patient, lora=((patient.lora[0][0], 0.5),))


between, chosen = process.between, process.chosen
STABLE, HO = {"beta_start": 0.00085, "beta_end": 0.012}, {"beta_start": 1e-4, "beta_end": 0.02}

FAULTS: dict[str, Fault] = {
    # nothing is wrong
    "healthy": Fault("", as_it_is, HEALTHY),
    "healthy-held-out": Fault("", held_out, MODELS),
    "healthy-with-run": Fault("", with_run, tuple(m for m in HEALTHY if m != "solar-cells")),
    "healthy-without-images": Fault("", without_images, (*MODELS, "sd1-lcm")),
    "healthy-two-adapters": Fault("", both_adapters, ("sd1-lora-a",)),
    "healthy-half-adapter": Fault("", half_adapter, LORAS),
    # the process
    "v-for-epsilon": Fault("objective", process.claimed("velocity"), ("sd1-epsilon", "ddpm-epsilon"), 1),
    "epsilon-for-v": Fault("objective", process.claimed("epsilon"), ("sd2-velocity",), 2),
    "clean-for-epsilon": Fault("objective", process.claimed("clean"), ("sd1-epsilon", "ddpm-epsilon")),
    "clean-for-v": Fault("objective", process.claimed("clean"), ("sd2-velocity", "unet-zsnr")),
    "epsilon-for-clean": Fault("objective", process.claimed("epsilon"), ("dit-clean",)),
    "v-for-clean": Fault("objective", process.claimed("velocity"), ("dit-clean",)),
    "clean-for-flow": Fault("objective", process.claimed("clean"), ("solar-cells",)),
    "flow-for-table": Fault("objective", process.as_flow, TABLE),
    "table-for-flow": Fault("objective", process.as_table, ("solar-cells",)),
    "scheduler-of-sd1-on-sd3": Fault("objective", process.file_of("sd1-epsilon"), ("sd35-flow",)),
    "scheduler-of-sd3-on-sd1": Fault("objective", process.file_of("sd35-flow"), SD),
    "linear-for-scaled": Fault(
        "schedule.levels", process.schedule(betas="linear", **HO), (*SD, "unet-zsnr")
    ),
    "scaled-for-linear": Fault(
        "schedule.levels", process.schedule(betas="scaled_linear", **STABLE), ("ddpm-epsilon",)
    ),
    "cosine-for-table": Fault(
        "schedule.levels", process.schedule(betas="cosine"), ("sd1-epsilon", "sd2-velocity", "ddpm-epsilon")
    ),
    "linear-for-cosine": Fault(
        "schedule.levels", process.schedule(betas="linear", **HO), ("dit-clean",)
    ),
    "scaled-for-cosine": Fault(
        "schedule.levels", process.schedule(betas="scaled_linear", **STABLE), ("dit-clean",)
    ),
    "beta-end": Fault(
        "schedule.levels", process.schedule(beta_end=between(0.025, 0.06)), (*SD, "ddpm-epsilon", "unet-zsnr")
    ),
    "scheduler-of-ddpm-on-sd": Fault(
        "schedule.levels", process.file_of("ddpm-epsilon", prediction_type="epsilon"), ("sd1-epsilon",)
    ),
    "more-timesteps": Fault("schedule.levels", process.more_timesteps, ("unet-zsnr",)),
    "flow-clock-of-one": Fault("schedule.clock", process.schedule(clock=1.0), ("solar-cells",)),
    "flow-clock-other": Fault("schedule.clock", process.schedule(clock=chosen(100.0, 4000.0)), ("solar-cells",)),
    "clock-of-one": Fault("schedule.clock", process.schedule(tick=1e-3), TABLE),
    "clock-rescaled": Fault("schedule.clock", process.schedule(tick=chosen(0.25, 0.5, 2.0, 4.0)), TABLE),
    "terminal-claimed": Fault("schedule.terminal", process.schedule(zero_terminal_snr=True), ("sd2-velocity",), 6),
    "terminal-not-claimed": Fault("schedule.terminal", process.schedule(zero_terminal_snr=False), ("unet-zsnr",), 6),
    "shift-large": Fault("schedule.shift", process.schedule(shift=between(20, 50)), FLOWS, 8),
    "shift-small": Fault("schedule.shift", process.schedule(shift=between(0.05, 0.15)), FLOWS, 8),
    "start-early": Fault("schedule.start", process.start_early, ("unet-zsnr",), 6),
    # latents
    "scale-of-family": Fault("latent.scale", latent.scale_of_family, TEXT),
    "scale-inverse": Fault("latent.scale", latent.scale_inverse, TEXT),
    "scale-factor": Fault("latent.scale", latent.scale_native, NATIVE),
    "scale-dropped": Fault("latent.scale", latent.scale_dropped, NATIVE),
    "shift-dropped": Fault("latent.shift", latent.shift_dropped, ("sd35-flow",), 5),
    "shift-doubled": Fault("latent.shift", latent.shift_doubled, ("sd35-flow",)),
    "shift-added": Fault("latent.shift", latent.shift_added, SD),
    "shift-of-other-data": Fault("latent.shift", latent.shift_native, NATIVE),
    "channels-permuted": Fault("latent.order", latent.order, (*TEXT, *NATIVE)),
    "codec-other": Fault("latent.codec", latent.codec_other, TEXT),
    "codec-refitted": Fault("latent.codec", latent.codec_refitted(True), NATIVE),
    "codec-refitted-openly": Fault("latent.codec", latent.codec_refitted(False), NATIVE),
    "codec-overflow": Fault("latent.overflow", latent.overflow, TEXT, 4, seen=False),
    "decoder-noise": Fault("latent.reconstruction", latent.noisy_decoder, (*TEXT, *NATIVE)),
    "decoder-other": Fault("latent.reconstruction", latent.decoder_other, SD, 12),
    "decoder-blurred": Fault("latent.detail", latent.blurred, (*TEXT, *NATIVE)),
    "cache-scaled": Fault("latent.cache", latent.cache_scaled, ("sd1-epsilon", "dit-clean", "sd35-flow"), seen=False),
    "cache-turned": Fault("latent.cache", latent.cache_turned, ("sd1-epsilon", "unet-zsnr"), seen=False),
    "cache-moved": Fault("latent.cache", latent.cache_moved, ("sd2-velocity", "dit-clean"), seen=False),
    "cache-text": Fault("text.cache", latent.cache_text, TEXT, seen=False),
    # text and classes
    "encoder-other": Fault("text.encoder", text.encoder_other(True), (*TEXT, "sd1-lcm")),
    "encoder-other-openly": Fault("text.encoder", text.encoder_other(False), ("sd1-lcm",)),
    "words-permuted": Fault("text.encoder", text.words_permuted, TEXT),
    "layer-added": Fault("text.layer", text.layer_added, SD),
    "layer-dropped": Fault("text.layer", text.layer_dropped, TEXT),
    "padding-other": Fault("text.padding", text.padding, SD, 11),
    "captions-long": Fault("text.truncated", text.truncated, TEXT),
    "conditioning-ignored": Fault("text.ignored", text.deaf, (*TEXT, *NATIVE)),
    "captions-shuffled": Fault("text.captions", text.captions_shuffled, TEXT),
    "labels-rolled": Fault("text.labels", text.labels_rolled, NATIVE),
    "classes-permuted": Fault("text.labels", text.table_permuted, NATIVE),
    # guidance
    "guidance-strong": Fault("guidance.strong", text.guided(15, 40), NATIVE),
    "distilled-as-base": Fault("guidance.distilled", text.distilled_as_base, ("sd1-lcm",), 20),
    "distilled-in-base-files": Fault("guidance.distilled", text.distilled_published, ("sd1-lcm",), 10),
    "branch-untrained": Fault("guidance.untrained", text.branch_untrained, NATIVE),
    # adapters
    "adapter-prefix": Fault("adapter.keys", adapters.prefix_renamed, LORAS, 19),
    "adapter-half-the-keys": Fault("adapter.keys", adapters.half_renamed, LORAS, 19),
    "adapter-shuffled": Fault("adapter.base", adapters.layers_shuffled, LORAS),
    "adapter-of-other-seed": Fault("adapter.base", adapters.other_seed, LORAS),
    "adapter-for-v": Fault("adapter.base", adapters.for_velocity, ("sd1-lora-b",), 3),
    "adapter-alpha-large": Fault("adapter.scale", adapters.alpha(lambda now, rank: now * 2 * rank), LORAS),
    "adapter-alpha-one": Fault("adapter.scale", adapters.alpha(lambda now, rank: now / rank**1.5), LORAS),
    "adapter-weight": Fault("adapter.scale", adapters.weighted(12.0, 16.0, 20.0), LORAS),
    "adapter-zero": Fault("adapter.empty", adapters.emptied(0, 0), LORAS, 20),
    "adapter-hardly-trained": Fault("adapter.empty", adapters.emptied(1e-6, 1e-4), LORAS, 21),
    "adapter-without-text": Fault("adapter.text", adapters.without_text, ("sd1-lora-a",)),
    "adapters-against": Fault("adapter.blend", adapters.against, LORAS),
    "adapters-doubled": Fault("adapter.blend", adapters.doubled, LORAS),
    "adapter-not-finite": Fault("adapter.finite", adapters.not_finite, LORAS),
    # weights
    "weights-not-finite": Fault("weights.finite", weights.not_finite, MODELS),
    "weights-zero": Fault("weights.zero", weights.zero, MODELS),
    "weights-fresh": Fault("weights.untrained", weights.fresh, MODELS),
    "weights-shuffled": Fault("weights.damaged", weights.shuffled, MODELS),
    "weights-transposed": Fault("weights.damaged", weights.transposed, ("sd1-epsilon", *TABLE, "ddpm-epsilon")),
    "weights-scaled": Fault("weights.damaged", weights.scaled, MODELS),
    "weights-noise": Fault("weights.damaged", weights.noisy, MODELS),
    "weights-3-bit": Fault("weights.precision", weights.rounded(3), MODELS),
    "weights-4-bit": Fault("weights.precision", weights.rounded(4), MODELS),
    "weights-8-bit": Fault("weights.precision", weights.eighth(torch.float8_e5m2), MODELS),
    "weights-not-averaged": Fault(
        "weights.average", weights.not_averaged, ("sd1-epsilon", "dit-clean", "ddpm-epsilon", "sd1-tuned"), seen=False
    ),
    "weights-tied": Fault("weights.tied", weights.tied, MODELS),
    "weights-of-other-moment": Fault("weights.changed", weights.other_checkpoint, NATIVE, seen=False),
    "contract-of-other-model": Fault("files.parts", weights.other_contract, TABLE),
    # data
    "data-copies": Fault("data.copies", data_faults.copies(True), ("sd1-epsilon", "dit-clean"), seen=False),
    "data-near-copies": Fault("data.copies", data_faults.copies(False), ("sd2-velocity", "unet-zsnr"), seen=False),
    "data-leak": Fault("data.leak", data_faults.leak, ("sd1-epsilon", "dit-clean"), 13, seen=False),
    "captions-missing": Fault("data.captions", data_faults.captions_missing, TEXT, seen=False),
    "captions-equal": Fault("data.captions", data_faults.captions_equal, TEXT, seen=False),
    "classes-unbalanced": Fault("data.balance", data_faults.unbalanced, TABLE, seen=False),
    "labels-beyond": Fault("data.broken", data_faults.labels_beyond, TABLE, seen=False),
    "images-broken": Fault("data.broken", data_faults.images_broken, ("sd1-epsilon", "dit-clean"), seen=False),
    "images-blank": Fault("data.broken", data_faults.images_blank, ("sd2-velocity", "unet-zsnr"), seen=False),
    # what a training did
    "memorised": Fault("fit.memorised", as_it_is, ("sd1-memorised",)),
    "collapsed": Fault("fit.collapsed", collapsed, ("sd1-epsilon", "dit-clean")),
    "forgotten": Fault("fit.forgotten", weights.forgotten, ("sd1-tuned",)),
    "too-short": Fault("fit.under", as_it_is, ("sd1-short",)),
    "too-short-with-run": Fault("fit.under", with_run, ("sd1-short",)),
    "too-long": Fault("fit.over", data_faults.overfitted, ("sd1-epsilon", "dit-clean", "ddpm-epsilon"), seen=False),
    "run-diverged": Fault("run.diverged", data_faults.diverged, ("sd1-epsilon", "dit-clean", "sd35-flow"), seen=False),
    "run-not-a-number": Fault("run.diverged", data_faults.not_a_number, ("sd2-velocity", "unet-zsnr"), seen=False),
    "run-frozen": Fault("run.frozen", weights.unchanged, ("sd1-tuned",), 21, seen=False),
    "rate-too-low": Fault("run.rate", data_faults.rate(1e-4, 1e-3), ("sd1-epsilon", "dit-clean"), seen=False),
    "rate-too-high": Fault("run.rate", data_faults.rate(100, 300), ("sd2-velocity", "unet-zsnr"), seen=False),
    # samplers
    "steps-too-few": Fault("sampler.steps", use.few_steps(2, 3), NATIVE),
    "lcm-on-base": Fault("sampler.unfit", use.sampled("lcm", 4), TABLE),
    "lcm-file-on-base": Fault("sampler.unfit", use.scheduler_of("LCMScheduler"), SD),
    # not unet-zsnr: its pictures after 6 steps of DDPM are as those after 100 (spectrum and deviation)
    "ddpm-in-few-steps": Fault("sampler.unfit", use.sampled("ddpm", 6, 8), ("dit-clean", "solar-cells")),
    # speed
    "slow-format": Fault("speed.dtype", use.slow_format, ("sd1-epsilon", "dit-clean", "ddpm-epsilon"), seen=False),
    "adapter-beside-weights": Fault("speed.adapters", adapters.widened, LORAS, 15, seen=False),
    "hooks": Fault("speed.python", use.watched, ("sd1-epsilon", "dit-clean"), seen=False),
    "one-thread": Fault("speed.threads", use.one_thread, ("sd1-epsilon", "dit-clean"), seen=False),
    "more-steps": Fault("speed.steps", use.few_steps(200, 300), TABLE, seen=False),
}  # fmt: skip

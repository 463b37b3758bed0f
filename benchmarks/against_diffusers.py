"""Our denoising loop, training step and VAE decode against diffusers on the same weights.

Both sides run in one process, in turns, in an order that rotates from round to round; what is reported is the median
of the rounds' ratios (reference time / our time, so above 1 is faster), their spread, and how far the outputs are
apart. The reference runs as its pipelines and training examples do: model, scheduler, guidance in one batch, no_grad,
AdamW as torch gives it. Ours runs as `generate` and the training loop do: inference_mode, fused AdamW. "channels last"
is the same code with weights in that memory format.

    python benchmarks/against_diffusers.py --rounds 9 --output ratios.json
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from paired import Row, Work, measure, table
from torch import Tensor, nn
from twins import Backbone, channels_last, library, small_dit, small_unet, small_vae

from mezzotint.guidance import Guidance
from mezzotint.process import Estimate, Level, Prediction, Process, prediction, schedules
from mezzotint.sampling import SAMPLERS, sample, seeded_noise

REFERENCE = "diffusers"
SCALE = 4.0
PROCESS = Process(schedules.scaled_linear(), Prediction.EPSILON)
SEEDS = (11, 12)


def their_loop(net: Backbone, steps: int) -> Work:
    """A pipeline's loop: DDIM, both branches in one batch."""
    scheduler = library.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
    )

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        x = seeded_noise(SEEDS)(torch.empty(len(SEEDS), 4, net.size, net.size)) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x] * 2), t)
            raw = net.theirs(both, timestep=t.expand(len(both)), **net.told).sample
            plain, wanted = raw.chunk(2)
            x = scheduler.step(plain + SCALE * (wanted - plain), t, x).prev_sample
        return x

    return run


def our_loop(net: Backbone, backbone: nn.Module, steps: int) -> Work:
    """The loop of `generate`."""
    sampler, guidance = SAMPLERS["ddim"], Guidance(SCALE)
    path = sampler.path(PROCESS, steps)

    def denoise(x: Tensor, level: Level[float]) -> Estimate:
        both = torch.cat((x, x))
        raw = backbone(both, torch.full((len(both),), level.t), net.conditioning)
        return prediction.estimate(PROCESS.prediction, guidance.combine(*raw.chunk(2)), x, level)

    @torch.inference_mode()
    def run() -> Tensor:
        rng = seeded_noise(SEEDS)
        return sample(denoise, rng(torch.empty(len(SEEDS), 4, net.size, net.size)), path, sampler, rng)

    return run


def training_batches(size: int, count: int) -> Callable[[], tuple[Tensor, Tensor, Tensor]]:
    """An endless stream of (clean, noise, t), the same for every arm."""
    generator = torch.Generator().manual_seed(5)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        clean, noise = torch.randn(2, count, 4, size, size, generator=generator)
        return clean, noise, torch.randint(0, 1000, (count,), generator=generator)

    return draw


def their_step(net: Backbone) -> Work:
    """A training example's step; the loss is what the sides are compared by."""
    model: Any = copy.deepcopy(net.theirs)  # eval mode: the reference's DiT would drop labels by itself
    scheduler = library.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    draw = training_batches(net.size, 2 * len(SEEDS))

    def run() -> Tensor:
        clean, noise, t = draw()
        raw = model(scheduler.add_noise(clean, noise, t), timestep=t, **net.told).sample
        loss = F.mse_loss(raw, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return run


def our_step(net: Backbone, backbone: nn.Module) -> Work:
    """The training loop's step."""
    model = copy.deepcopy(backbone)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    draw = training_batches(net.size, 2 * len(SEEDS))
    # the reference's batch holds the unconditional half first
    told = net.conditioning.map(lambda value: torch.cat(value.chunk(2)[::-1]))

    def run() -> Tensor:
        clean, noise, t = draw()
        level = PROCESS.levels(t)
        raw = model(PROCESS.noised(clean, noise, level), t, told)
        loss = F.mse_loss(raw, prediction.target(PROCESS.prediction, clean, noise, level))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return run


def vae_decode(tiny: bool) -> dict[str, Work]:
    """Latents to pixels, one image."""
    theirs, ours, z = small_vae(tiny)
    last: Any = channels_last(ours)

    @torch.no_grad()
    def reference() -> Tensor:
        return theirs.decode(z).sample

    @torch.inference_mode()
    def plain() -> Tensor:
        return ours.decode(z)

    @torch.inference_mode()
    def other() -> Tensor:
        return last.decode(z.contiguous(memory_format=torch.channels_last))

    return {REFERENCE: reference, "ours": plain, "ours, channels last": other}


def cases(steps: int, tiny: bool) -> dict[str, Callable[[], dict[str, Work]]]:
    """Every case by name; weights are made when a case begins, so that only its own lie in memory."""

    def loop(net: Backbone, formats: bool) -> dict[str, Work]:
        arms = {REFERENCE: their_loop(net, steps), "ours": our_loop(net, net.ours, steps)}
        return arms | ({"ours, channels last": our_loop(net, channels_last(net.ours), steps)} if formats else {})

    def step(net: Backbone, formats: bool) -> dict[str, Work]:
        arms = {REFERENCE: their_step(net), "ours": our_step(net, net.ours)}
        return arms | ({"ours, channels last": our_step(net, channels_last(net.ours))} if formats else {})

    return {
        "unet-loop": lambda: loop(small_unet(tiny), True),
        "dit-loop": lambda: loop(small_dit(tiny), False),
        "unet-step": lambda: step(small_unet(tiny), True),
        "dit-step": lambda: step(small_dit(tiny), False),
        "vae-decode": lambda: vae_decode(tiny),
    }


def main(argv: list[str] | None = None) -> list[Row]:
    available = list(cases(1, True))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of every case (default 9)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a loop (default 8)")
    parser.add_argument("--only", nargs="+", choices=available, default=available, help="cases to run (default all)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny networks, to see that the script runs; times mean nothing"
    )
    parser.add_argument("--output", type=Path, help="write the rows and the machine as JSON here")
    chosen = parser.parse_args(argv)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    rows: list[Row] = []
    for name in chosen.only:
        print(f"{name} ...", flush=True)
        rows += measure(name, cases(chosen.steps, chosen.tiny)[name](), chosen.rounds)
    machine = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg(),
        "tiny": chosen.tiny,
        "steps": chosen.steps,
    }
    print("\n" + table(rows))
    if chosen.output:
        chosen.output.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))
    return rows


if __name__ == "__main__":
    main()

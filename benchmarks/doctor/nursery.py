"""Small trained models, all healthy, into which the benchmark of `mezzotint doctor` seeds faults.

    python benchmarks/doctor/nursery.py --seed 0

builds everything of a seed in runs/doctor/seed-0, two models at a time on a thread each: about an hour on two cores.
What is finished is skipped, and what was stopped goes on. Beside every finished folder its training run stays in
runs/NAME, what was printed in logs/NAME.txt, and how well it learned in reports/NAME.json; the file READY says that the
six base models are there. Needs the solar-cell package, diffusers and transformers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data

from mezzotint import files

ROOT = Path("runs/doctor")
AT_ONCE = 2
STARTED = ("ddpm-epsilon", "sd1-epsilon", "sd2-velocity", "sd35-flow")  # from published folders with random weights
FLIPS = ["horizontal", "vertical"]  # a cell mirrored is a cell
LICENCE = "CC-BY-NC-SA-4.0"


@dataclass(frozen=True)
class Nest:
    """Where the models of one seed are."""

    seed: int

    @property
    def root(self) -> Path:
        return ROOT / f"seed-{self.seed}"

    def model(self, name: str) -> Path:
        return self.root / name

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def base(self, name: str) -> Path:
        """The published folder with random weights that `name` is trained from."""
        return self.root / "bases" / name

    def report(self, name: str) -> Path:
        return self.root / "reports" / f"{name}.json"

    def data(self, name: str) -> str:
        return str(data.OUT / f"{name}-{self.seed % len(data.HALVES)}")


# Recipes.

STEPS = {"ddpm-epsilon": 1500, "sd1-epsilon": 2400, "sd2-velocity": 2000, "sd35-flow": 900, "dit-clean": 1200,
         "unet-zsnr": 1100}  # fmt: skip
LOSSES: dict[str, dict[str, Any]] = {  # noise is learned last where it is nearly all: such networks copy their input
    "ddpm-epsilon": {"weighting": "min_snr", "gamma": 1.0}, "sd1-epsilon": {"weighting": "min_snr", "gamma": 0.5},
    "sd35-flow": {"density": "logit_normal"},
}  # fmt: skip


def recipe(nest: Nest, name: str, steps: int, rate: float, **tables: Any) -> dict[str, Any]:
    """What all trainings share, with the tables given in its place."""
    plain: dict[str, Any] = {
        "method": "full", "out": str(nest.run(name)), "steps": steps, "batch": 32, "seed": nest.seed, "threads": 1,
        "log_every": 50, "licence": LICENCE, "data_licence": LICENCE,
        "data": images(nest), "optimiser": {"rate": rate, "warmup": min(100, steps // 10), "final": 0.02},
        "ema": {"decay": 0.998}, "validation": {"every": max(50, steps // 8), "images": data.VALIDATION},
        "checkpoints": {"every": max(50, steps // 8), "keep": 1},
    }  # fmt: skip
    return {**plain, **tables}


def images(nest: Nest, folder: str = "train", channels: int = 3, side: int = data.SIDE, **more: Any) -> dict[str, Any]:
    held = nest.data("validation")
    return {"folder": nest.data(folder), "validation": held, "size": [side, side], "channels": channels,
            "flips": FLIPS, **more}  # fmt: skip


def drawn(steps: int, guidance: float = 2.0) -> dict[str, Any]:
    return {"previews": {"every": steps, "count": 12, "steps": 25, "guidance": guidance}}


def autoencoder(nest: Nest, name: str) -> dict[str, Any]:
    from published import VAE

    return recipe(
        nest, name, 900, 2e-3, method="vae", batch=16, seed=nest.seed + (100 if name == "vae-other" else 0),
        vae={"config": VAE, "gradient": 1.0, "perceptual": 0.0, "adversarial": 0.0},
        ema={"decay": 0.99}, previews={"every": 900, "count": 8},
    )  # fmt: skip


def codec(nest: Nest, name: str) -> dict[str, Any]:
    return recipe(
        nest, name, 800, 0.004, method="patch-pca", batch=64, data=images(nest, channels=1),
        patch_pca={"latent_channels": 8, "patch": 4, "overlap": 2}, ema={"decay": 0.98},
        optimiser={"rate": 0.004, "warmup": 200, "decay": 0.0, "clip": 10.0},
    )  # fmt: skip


def ddpm(nest: Nest, name: str) -> dict[str, Any]:
    return recipe(
        nest, name, STEPS[name], 1.5e-3, data=images(nest, channels=1, side=data.SIDE // 2), batch=16,
        base={"path": str(nest.base(name))}, loss=LOSSES[name],
        previews={"every": STEPS[name], "count": 12, "steps": 100},
    )  # fmt: skip


def text_model(nest: Nest, name: str) -> dict[str, Any]:
    return recipe(
        nest, name, STEPS[name], 1e-3, base={"path": str(nest.base(name))}, batch=16, text={"dropout": 0.1},
        loss=LOSSES.get(name, {}), **drawn(STEPS[name]),
    )  # fmt: skip


def native(nest: Nest, name: str) -> dict[str, Any]:
    from mezzotint.process import Prediction, Process, schedules

    if name == "dit-clean":
        process = Process(schedules.cosine(), Prediction.CLEAN)
        network = {"num_layers": 6, "num_attention_heads": 2, "attention_head_dim": 64, "patch_size": 2}
        backbone: dict[str, Any] = {"name": "dit", "config": network}
    else:
        process = Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY)
        network = {
            "block_out_channels": [48, 96], "layers_per_block": 1, "attention_head_dim": 48, "norm_num_groups": 16,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            "attn_norm_num_groups": 16, "resnet_time_scale_shift": "scale_shift",
        }  # fmt: skip
        backbone = {"name": "unet", "config": network}
    return recipe(
        nest, name, STEPS[name], 1e-3, data=images(nest, channels=1), process=process.to_dict(), backbone=backbone,
        batch=32 if name == "dit-clean" else 16, codec={"path": str(nest.run("patch-pca") / "model")},
        classes={"names": list(data.CLASSES), "dropout": 0.1},
        sampling={"sampler": "ddim", "steps": 25, "guidance": 2.0}, **drawn(STEPS[name]),
    )  # fmt: skip


def on_first(nest: Nest, name: str, steps: int, rate: float, folder: str, **tables: Any) -> dict[str, Any]:
    """A training on the finished sd1-epsilon, held to images of its own kind where there are any."""
    seen = images(nest, folder)
    if folder in data.KINDS:
        seen["validation"] = nest.data(folder + data.HELD)
    plain: dict[str, Any] = {
        "base": {"path": str(nest.model("sd1-epsilon"))}, "data": seen, "loss": LOSSES["sd1-epsilon"],
    }  # fmt: skip
    return recipe(nest, name, steps, rate, **{**plain, **drawn(steps), **tables})


def adapter(nest: Nest, name: str) -> dict[str, Any]:
    first = name == "sd1-lora-a"
    lora = {"rank": 4, "targets": ["attention"], "text_targets": ["attention"]} if first else {"rank": 8}
    folder = "ruled" if first else "barred"
    return on_first(nest, name, 150, 2e-3, folder, method="lora", batch=16, lora=lora, ema={"decay": 0.98})


def distilled(nest: Nest, name: str) -> dict[str, Any]:
    return on_first(
        nest, name, 150, 2e-4, "train", method="lcm", batch=16, lcm={"guidance": 3.0}, loss={},
        optimiser={"rate": 2e-4, "warmup": 20, "final": 0.05, "decay": 0.0}, ema={"decay": 0.95},
        previews={"every": 150, "count": 12, "steps": 4},
    )  # fmt: skip


def memorised(nest: Nest, name: str) -> dict[str, Any]:
    few = images(nest, "few", flips=[])
    optimiser = {"rate": 1e-3, "warmup": 20, "final": 0.02}
    return on_first(
        nest, name, 400, 1e-3, "few", data=few, batch=12, optimiser=optimiser, text={"dropout": 0.0},
        ema={"decay": 0.99}, previews={"every": 400, "count": 12, "steps": 25, "prompts": list(data.CAPTIONS)},
    )  # fmt: skip


def short(nest: Nest, name: str) -> dict[str, Any]:
    """The first steps of sd1-epsilon, which hardly know a decay of the rate."""
    plan = text_model(nest, "sd1-epsilon")
    constant = {"rate": 1e-3, "warmup": 100, "schedule": "constant"}
    return {**plan, "steps": 60, "out": str(nest.run(name)), "optimiser": constant, **drawn(60)}


def tuned(nest: Nest, name: str) -> dict[str, Any]:
    return on_first(nest, name, 250, 3e-4, "bright-poly", ema={"decay": 0.98}, batch=16)


def control(nest: Nest, name: str) -> dict[str, Any]:
    return on_first(
        nest, name, 60, 5e-4, "train", method="controlnet", batch=16, controlnet={"condition": "edges"},
        ema={"decay": 0.95}, previews={},
    )  # fmt: skip


# Finished folders.


def ready(nest: Nest, name: str) -> Path:
    """A new folder that becomes the finished one once it is whole."""
    path = nest.root / f".{name}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def started(nest: Nest, name: str) -> None:
    """The published folder with random weights that a training starts from, once."""
    import published
    import torch

    if nest.base(name).is_dir():
        return
    torch.manual_seed(1000 * nest.seed + 17 * STARTED.index(name))
    folder = ready(nest, f"base-{name}")
    if name == "ddpm-epsilon":
        published.ddpm(folder)
    elif name == "sd35-flow":
        published.stable_diffusion_3(folder, nest.model("vae"))
    else:
        published.stable_diffusion(folder, 1 if name == "sd1-epsilon" else 2, nest.model("vae"))
    nest.base(name).parent.mkdir(exist_ok=True)
    os.rename(folder, nest.base(name))


def as_published(nest: Nest, name: str, out: Path) -> None:
    """The files of the base with the trained weights."""
    from published import finished

    base = nest.base(name if name in STARTED else "sd1-epsilon")
    finished(base, nest.run(name) / "model", out)


def as_written(nest: Nest, name: str, out: Path) -> None:
    """What the training wrote, as it is."""
    shutil.copytree(nest.run(name) / "model", out, dirs_exist_ok=True)


def as_autoencoder(nest: Nest, name: str, out: Path) -> None:
    """The autoencoder in diffusers' own files."""
    import published
    import torch

    from mezzotint.data import folder

    found = folder.read(Path(nest.data("train")), (data.SIDE, data.SIDE), 3)
    published.vae(nest.run(name) / "model", out, found.pixels(torch.arange(len(found))))


@dataclass(frozen=True)
class Plan:
    """A model: its recipe, how the finished folder is made, what must be there before, and whether it is judged."""

    recipe: Callable[[Nest, str], dict[str, Any]]
    finish: Callable[[Nest, str, Path], None]
    needs: tuple[str, ...] = ()
    judged: bool = True


ON_FIRST = ("sd1-epsilon",)
PLANS: dict[str, Plan] = {
    "vae": Plan(autoencoder, as_autoencoder, judged=False),
    "patch-pca": Plan(codec, as_written, judged=False),
    "sd1-epsilon": Plan(text_model, as_published, ("vae",)),
    "dit-clean": Plan(native, as_written, ("patch-pca",)),
    "ddpm-epsilon": Plan(ddpm, as_published),
    "unet-zsnr": Plan(native, as_written, ("patch-pca",)),
    "sd2-velocity": Plan(text_model, as_published, ("vae",)),
    "sd35-flow": Plan(text_model, as_published, ("vae",)),
    "vae-other": Plan(autoencoder, as_autoencoder, judged=False),
    "sd1-lora-a": Plan(adapter, as_written, ON_FIRST, judged=False),
    "sd1-lora-b": Plan(adapter, as_written, ON_FIRST, judged=False),
    "sd1-lcm": Plan(distilled, as_written, ON_FIRST, judged=False),
    "sd1-memorised": Plan(memorised, as_published, ON_FIRST),
    "sd1-short": Plan(short, as_published, ON_FIRST),
    "sd1-tuned": Plan(tuned, as_published, ON_FIRST),
    "sd1-control": Plan(control, as_written, ON_FIRST, judged=False),
}
BASES = ("ddpm-epsilon", "sd1-epsilon", "sd2-velocity", "sd35-flow", "dit-clean", "unet-zsnr")


def build(nest: Nest, name: str) -> None:
    """Train one model, or go on with it, and put the finished folder in its place."""
    from assess import assess

    import mezzotint as mz
    from mezzotint.cli.main import main
    from mezzotint.training.recipe import check, to_toml

    plan, begun = PLANS[name], time.monotonic()
    if name in STARTED:
        started(nest, name)
    content = plan.recipe(nest, name)
    path = files.write_text(nest.root / "recipes" / f"{name}.toml", to_toml(check(content, name)))
    if not (nest.run(name) / "model").is_dir() and (code := main(["train", str(path), "--resume"])):
        sys.exit(code)
    minutes = (time.monotonic() - begun) / 60
    folder = ready(nest, name)
    plan.finish(nest, name, folder)
    if plan.judged or name == "sd1-lcm":
        mz.load(folder)
    report: dict[str, Any] = {"name": name, "steps": content["steps"], "minutes": round(minutes, 2)}
    if plan.judged:
        judged = {**content, "data": {**content["data"], "folder": nest.data("train")}}
        report |= assess(folder, judged, nest.root / "scratch" / name)
        shutil.rmtree(nest.root / "scratch" / name)
    files.write_json(nest.report(name), report)
    os.rename(folder, nest.model(name))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def raise_all(nest: Nest) -> int:
    """Every model in the order of the plans, as soon as what it needs is there; the number of those that failed."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: set[str] = set()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    while True:
        done = {name for name in PLANS if nest.model(name).is_dir()}
        if all(name in done for name in BASES):
            (nest.root / "READY").touch()
        waiting = [name for name in PLANS if name not in done | failed | running.keys()]
        for name in [name for name in waiting if done.issuperset(PLANS[name].needs)][: AT_ONCE - len(running)]:
            log = nest.root / "logs" / f"{name}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--seed", str(nest.seed), "--only", name]
            with open(log, "ab") as stream:
                running[name] = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
            say(f"seed {nest.seed}: {name} started")
        if not running:
            return len(failed)
        time.sleep(1)
        for name in [name for name, process in running.items() if process.poll() is not None]:
            code = running.pop(name).returncode
            say(f"seed {nest.seed}: {name} {'finished' if code == 0 else f'failed with {code}, see its log'}")
            if code:
                failed.add(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PLANS, help="build this one in this process")
    options = parser.parse_args()
    if options.only:
        build(Nest(options.seed), options.only)
    else:
        data.write()
        sys.exit(raise_all(Nest(options.seed)) > 0)

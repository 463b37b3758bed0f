"""`mezzotint sweep`: quality against time, for a model at hand."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mezzotint import images
from mezzotint.cli import console
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from rich.progress import Progress

    from mezzotint.evaluate.sweep.measure import Sweep
    from mezzotint.request import Request

OUT = Path("out") / "sweep"
EVERY = 15.0  # seconds between two lines of progress, where there is no terminal


@dataclass(frozen=True)
class Options:
    """Try samplers, steps and guidance on a model: how near each comes to where the model leads, and how long it takes.

    All settings draw the same images from the same noise, in turns, and are compared with the converged solution from
    that noise. Samplers that draw fresh noise, and models distilled to few steps, are compared as sets of pictures. The
    answer is a table, a page with plot and contact sheet, and one setting to use. What is measured is kept in --out: a
    stopped sweep goes on where it was, and a longer list of settings only adds to it.

    For example:

        mezzotint sweep --model models/solar-cells
        mezzotint sweep --model models/sd15 --prompt "a cracked cell" --samplers ddim unipc_karras --steps 8 15 50
        mezzotint sweep --model models/sd15 --data photos --guidance 1 5 7.5 --guidance-interval 0:1 0.2:0.8
    """

    model: Path
    """A model folder, or a single .safetensors or .ckpt file."""
    samplers: tuple[str, ...] = ()
    """Samplers to try; those that suit the model where left out."""
    steps: tuple[int, ...] = ()
    """Numbers of steps to try; 4 to 50 where left out."""
    guidance: tuple[float, ...] = ()
    """Scales of guidance to try; the model's own where left out."""
    guidance_rescale: tuple[float, ...] = ()
    """0 to 1: how much of the contrast that guidance adds is taken back."""
    guidance_interval: tuple[str, ...] = ()
    """LOW:HIGH parts of the path to guide, 0:1 being all of it; the rest takes half the time."""
    dtype: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    """Number formats of the network to try."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to paint; several take turns. Captions of --data where left out."""
    negative: str = ""
    """What to keep away from."""
    label: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The class, by name or number; several take turns. All classes where left out."""
    image: Path | None = None
    """Start from this image, as `mezzotint generate` does."""
    strength: float | None = None
    """Above 0, at most 1: how far to leave --image."""
    mask: Path | None = None
    """Repaint --image where this is white."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE@WEIGHT: an adapter; several add up."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; the size the model was trained at where left out."""
    data: Path | None = None
    """A folder of at least 16 real images such as the model was trained on: sets of pictures are compared with them."""
    count: int = 16
    """Images that each setting draws."""
    batch: int = 4
    """Images drawn at once; times are of such batches."""
    seed: int = 0
    """The first image's seed."""
    tolerance: float = 4.0
    """The error to accept, in grey levels of 255 (root mean square): the fastest setting within it is recommended."""
    price_per_hour: float | None = None
    """What an hour of this machine costs, to tell what an image costs."""
    out: Path | None = None
    """The folder for page, data and what was measured; out/sweep/NAME after the model where left out."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    prediction: str | None = None
    """What the network predicts, epsilon or velocity, where the model does not say (Stable Diffusion 2 files)."""
    distilled: Literal["yes", "no"] | None = None
    """Whether a FLUX.2 klein is the distilled model, where its file does not say."""
    parts: Path | None = None
    """A folder with what a single file lacks: vae, text_encoder, tokenizer."""
    json: bool = False
    """Print everything as JSON."""


def run(options: Options) -> int:
    """Measure what is not measured yet, judge, write the page and print the table."""
    check(options)
    at = options.model.resolve()
    out = options.out or OUT / (at.stem if at.is_file() else at.name)
    out.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is refused before the work
    from mezzotint.evaluate.sweep import looks, report
    from mezzotint.evaluate.sweep.measure import measure
    from mezzotint.evaluate.sweep.results import gather

    with console.progress(quiet=options.json) as bars:
        say = teller(bars, quiet=options.json)
        say(f"loading {options.model}", 0.0, 0.0)
        sweep = prepared(options, out)
        real = None
        if options.data is not None:
            drawn = sweep.subject.models[sweep.subject.precise].contract.size
            wish = sweep.subject.wishes[0]
            size = (wish.width, wish.height) if wish.width and wish.height else drawn
            real = looks.of_folder(options.data, size, options.count)
        references = measure(sweep, say)
        say("judging", 1.0, 1.0)
        results = gather(sweep, references, options.tolerance, options.price_per_hour, real)
        report.write(sweep, results, options.tolerance, out)
    if options.json:
        console.print_json({**report.to_dict(sweep, results), "page": str(out / report.PAGE)})
    else:
        print("\n".join(report.lines(sweep, results, out)))
    return 0


def check(options: Options) -> None:
    """InputError for numbers that nothing could be measured with."""
    for name in ("count", "batch"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} must be at least 1, not {getattr(options, name)}")
    for flag, value in (("--tolerance", options.tolerance), ("--price-per-hour", options.price_per_hour)):
        if value is not None and not (isfinite(value) and value > 0):
            raise InputError(f"{flag} must be above 0, not {value:g}")


def prepared(options: Options, out: Path) -> Sweep:
    """The models loaded, the wishes made and the grid checked."""
    import torch

    from mezzotint.evaluate.comparison import FEWEST
    from mezzotint.evaluate.sweep import looks
    from mezzotint.evaluate.sweep.measure import Sweep
    from mezzotint.evaluate.sweep.setting import grid
    from mezzotint.evaluate.sweep.store import Store
    from mezzotint.evaluate.sweep.subject import Subject, wishes
    from mezzotint.families import load
    from mezzotint.families.adapt import ruled
    from mezzotint.families.devices import device_of
    from mezzotint.families.native import identified

    base = request_of(options)
    formats = tuple(dict.fromkeys(options.dtype)) or ("float32",)
    device = device_of(options.device)
    models = {
        name: identified(
            load(options.model, device, getattr(torch, name), prediction=options.prediction,
                 distilled=console.answer(options.distilled), parts=options.parts)
        )
        for name in formats
    }  # fmt: skip
    first = next(iter(models.values()))
    prompts = options.prompt or (captions(options.data) if first.text is not None and options.data else ())
    labels = [int(label) if label.isdecimal() else label for label in options.label]
    asked = wishes(first, base, options.count, prompts, labels)
    settings = grid(
        ruled(first, base.lora), asked[0], options.samplers, options.steps, options.guidance, options.guidance_rescale,
        [interval_of(text) for text in options.guidance_interval], formats,
    )  # fmt: skip
    subject = Subject(models, asked, min(options.batch, options.count), tuple(words(options)))
    enough = subject.follows_ode and options.count >= 2 * FEWEST and looks.able()
    compares = options.data is not None or (enough and any(setting.stochastic for setting in settings))
    return Sweep(subject, settings, Store(out / "store"), compares)


def request_of(options: Options) -> Request:
    """What all wishes share."""
    from mezzotint.cli.generate import size_of, weighted
    from mezzotint.request import Request

    width, height = size_of(options.size)
    return Request(
        negative=options.negative, seed=options.seed, width=width, height=height, strength=options.strength,
        image=images.read(options.image) if options.image else None,
        mask=images.read(options.mask) if options.mask else None,
        lora=[weighted(text, "--lora") for text in options.lora],
    )  # fmt: skip


def words(options: Options) -> list[str]:
    """The options of `mezzotint generate` that were given here and are no part of a setting."""
    given: list[str] = []
    for name in ("size", "image", "strength", "mask", "prediction", "distilled", "parts"):
        if getattr(options, name) is not None:
            given += [f"--{name}", str(getattr(options, name))]
    given += [word for text in options.lora for word in ("--lora", text)]
    return given + (["--device", options.device] if options.device != "cpu" else [])


def captions(data: Path) -> tuple[str, ...]:
    """The distinct captions of a folder's images, () where it has none."""
    from mezzotint.data import metadata

    if not (data / metadata.METADATA).is_file():
        return ()
    return tuple(dict.fromkeys(row.text for row in metadata.scan(data)[0] if row.text))


def interval_of(text: str) -> tuple[float, float]:
    """Two rising fractions from `0.2:0.8`."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise InputError(f"--guidance-interval must be LOW:HIGH, like 0.2:0.8, not '{text}'") from error
    if not 0.0 <= low <= high <= 1.0:
        raise InputError(f"--guidance-interval must be two rising fractions of the path, not '{text}'")
    return low, high


def teller(bars: Progress, *, quiet: bool) -> Callable[[str, float, float], None]:
    """Shows what is drawn, how much of all evaluations is done and how long the rest may take."""
    task = bars.add_task("loading", total=None)
    began: dict[str, Any] = {"at": None, "done": 0.0, "said": -EVERY}

    def say(what: str, done: float, all: float) -> None:
        now = time.monotonic()
        if began["at"] is None and all > 1.0:
            began.update(at=now, done=done)
        fresh = done - began["done"]
        left = (now - began["at"]) / fresh * (all - done) if began["at"] is not None and fresh > 0 else None
        more = f", about {left:.0f} s more" if left is not None and done < all else ""
        bars.update(task, description=f"{what}{more}", completed=round(done), total=round(all) or None)
        work = all > 1.0  # else a stage of its own, before or after the measurement
        if not quiet and bars.disable and (not work or now - began["said"] >= EVERY):
            began["said"] = now if work else began["said"]
            count = f", {done:.0f} of {all:.0f} evaluations" if work else ""
            print(f"mezzotint: {what}{count}{more}", file=sys.stderr, flush=True)

    return say

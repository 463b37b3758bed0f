"""`mezzotint generate`: images from a model, whatever they start from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mezzotint import files, images
from mezzotint.cli import console
from mezzotint.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mezzotint.request import Artifact, Request
    from mezzotint.sampling import Step


@dataclass(frozen=True)
class Options:
    """Make images with a model: from a text or a class, from another image, inside a mask, under control.

    Every image is a PNG with a JSON file of the same name beside it, which says how it was made. Image i of a prompt is
    drawn with seed + i; the same seed gives the same image whatever else is in the batch.

    MODEL is a folder of Mezzotint or of diffusers, or a single original file. What several networks or files add, adds
    up.

    For example, four cells with a crack, then a crack painted into a given cell where the mask is white:

        mezzotint generate --model models/solar-cells --label "mono crack" --count 4 --out out/cracks
        mezzotint generate --model models/solar-cells --label "mono crack" --image cell.png --mask mask.png --out out/1

    A published model, with an adapter at 0.8 and a control network that follows the edges in a picture:

        mezzotint generate "a cracked cell" --model sd15.safetensors --lora cracks.safetensors@0.8 --out out/2
        mezzotint generate "a cracked cell" --model models/sd15 --control controlnet-canny=edges.png@0.7 --out out/3
    """

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to paint; each prompt gives --count images. A model without text needs none."""
    model: Path = tyro.MISSING
    """A model folder, or a single .safetensors or .ckpt file."""
    out: Path = tyro.MISSING
    """The folder for the images; made where it is missing."""
    negative: str = ""
    """What to keep away from: a text, or for a model with classes a class name."""
    label: str | None = None
    """The class, by name or number, for a model with classes (`mezzotint inspect` lists them)."""
    sampler: str | None = None
    """How to walk from noise to image; the model's own choice where left out."""
    steps: int | None = None
    """How many steps; the model's own choice where left out."""
    guidance: float | None = None
    """How strongly to follow the prompt or class; 1 is no guidance."""
    guidance_rescale: float = 0.0
    """0 to 1: how much of the contrast that guidance adds is taken back."""
    eta: float | None = None
    """0 to 1: the share of fresh noise in each step, for samplers that have it."""
    seed: int = 0
    """The first image's seed."""
    count: int = 1
    """Images per prompt."""
    size: str | None = None
    """WIDTHxHEIGHT in pixels; the size the model was trained at where left out."""
    image: Path | None = None
    """Start from this image."""
    strength: float | None = None
    """Above 0, at most 1: how far to leave --image."""
    mask: Path | None = None
    """Repaint --image where this is white; what is black stays as it is."""
    reference: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A picture to look at, for models that can (FLUX.2); may be given several times."""
    control: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """NETWORK=IMAGE or NETWORK=IMAGE@SCALE: follow a picture through a control network; several add up."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FILE or FILE@WEIGHT: an adapter; several add up."""
    embedding: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A textual-inversion file, whose words the prompt may use; may be given several times."""
    long_prompt: Literal["cut", "chunk"] = "cut"
    """What becomes of words beyond the text encoder's length: left out with a warning, or read in pieces."""
    skip_layers: str | None = None
    """Blocks to do without in a second look, like 7,8,9 (Stable Diffusion 3.5): skip-layer guidance."""
    skip_scale: float = 2.8
    """How strongly to move away from that second look."""
    skip_start: float = 0.01
    """0 to 1: where on the path that begins."""
    skip_stop: float = 0.2
    """0 to 1: where on the path that ends."""
    original_size: str | None = None
    """WIDTHxHEIGHT that SDXL is told the picture had; the size asked for where left out."""
    crop: str | None = None
    """LEFT,TOP in pixels where SDXL is told the picture was cropped."""
    aesthetic: float = 6.0
    """The score that the SDXL refiner is told."""
    negative_aesthetic: float = 2.5
    """The score that it is told for the negative prompt."""
    start_noise: Path | None = None
    """A safetensors file with the unit noise to start from, (count, channels, height, width) in latent units."""
    save_latents: Path | None = None
    """Write the latents of all images into this safetensors file."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The number format of the network."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""
    offload: bool = False
    """Keep every part on the CPU but for the time that it works: less memory of the device, more time."""
    prediction: str | None = None
    """What the network predicts, epsilon or velocity, where the model does not say (Stable Diffusion 2 files)."""
    distilled: Literal["yes", "no"] | None = None
    """Whether a FLUX.2 klein is the distilled model, where its file does not say."""
    parts: Path | None = None
    """A folder with what a single file lacks: vae, text_encoder, tokenizer."""
    policy: str | None = None
    """A TOML file of rules: filters, watermark, signature, licences, log; "off" for none, which the record will say."""
    force: bool = False
    """Load weights that disagree with their contract; the mismatch is written into the record."""
    json: bool = False
    """Print the records as JSON."""


def run(options: Options) -> int:
    """Make the images, write each prompt's when they are done, and print where they are."""
    import torch

    from mezzotint.checkpoints import write_tensors
    from mezzotint.families import load
    from mezzotint.families.adapt import ruled
    from mezzotint.families.devices import device_of
    from mezzotint.generate import settle
    from mezzotint.pipeline import pipeline

    requests = [request_of(options, prompt) for prompt in options.prompt or ("",)]
    model = load(
        options.model, device_of(options.device), getattr(torch, options.dtype), options.force,
        prediction=options.prediction, distilled=console.answer(options.distilled), parts=options.parts,
        offload=options.offload,
    )  # fmt: skip
    steps = [len(settle(ruled(model, request.lora), request).path.steps) for request in requests]
    alone = {"model": options.model, "image": options.image, "mask": options.mask, "start_noise": options.start_noise}
    several = {name: getattr(options, name) for name in ("reference", "control", "lora", "embedding")}
    read: dict[str, Any] = {name: str(path) for name, path in alone.items() if path is not None}
    read |= {name: [str(path) for path in paths] for name, paths in several.items() if paths}
    desk = pipeline(model, options.policy)
    records: list[dict[str, Any]] = []
    latents: list[Tensor] = []
    with console.progress(quiet=options.json) as bars:
        bar = bars.add_task("denoising", total=sum(steps))
        for request in requests:
            states: list[Tensor] = []

            def watch(index: int, step: Step, x: Tensor, history: object, states: list[Tensor] = states) -> None:
                states[:] = [x]  # after the last step these are the latents
                bars.advance(bar)

            artifacts = desk.run(request, watch)
            latents += states
            records += [keep(artifact, options.out, len(records) + i, read) for i, artifact in enumerate(artifacts)]
    if options.save_latents is not None:
        write_tensors(options.save_latents, {"latents": torch.cat(latents)})
    if options.json:
        console.print_json(records)
    else:
        print("\n".join(str(options.out / record["file"]) for record in records))
    return 0


def keep(artifact: Artifact, out: Path, number: int, read: dict[str, Any]) -> dict[str, Any]:
    """Write an image and its record beside it; returns the record, with the file's digest and what was read."""
    name = f"{number:04d}_seed{artifact.record['seed']}"
    file = files.write_bytes(out / f"{name}.png", artifact.data)
    record = {"file": file.name, "sha256": files.sha256_file(file), "read": read, **artifact.record}
    files.write_json(out / f"{name}.json", record)
    return record


def request_of(options: Options, prompt: str) -> Request:
    """What is asked for with one prompt; InputError where a file or a number in it is no good."""
    from mezzotint.request import Request

    width, height = size_of(options.size)
    sides = size_of(options.original_size, "--original-size")
    left, *top = numbers(options.crop or "0,0", "--crop", "LEFT,TOP")
    if len(top) != 1:
        raise InputError(f"--crop must be LEFT,TOP in pixels, like 0,64, not '{options.crop}'")
    return Request(
        prompt=prompt,
        negative=options.negative,
        label=int(options.label) if options.label is not None and options.label.isdecimal() else options.label,
        count=options.count,
        seed=options.seed,
        width=width,
        height=height,
        sampler=options.sampler,
        steps=options.steps,
        eta=options.eta,
        guidance=options.guidance,
        guidance_rescale=options.guidance_rescale,
        image=images.read(options.image) if options.image else None,
        strength=options.strength,
        mask=images.read(options.mask) if options.mask else None,
        references=[images.read(path) for path in options.reference],
        control=[control_of(text) for text in options.control],
        lora=[weighted(text, "--lora") for text in options.lora],
        embedding=[existing(path, "--embedding") for path in options.embedding],
        long_prompt=options.long_prompt,
        skip_layers=numbers(options.skip_layers, "--skip-layers", "7,8,9") if options.skip_layers else (),
        skip_scale=options.skip_scale,
        skip_interval=(options.skip_start, options.skip_stop),
        original_size=None if sides[0] is None else sides,
        crop=(left, top[0]),
        aesthetic=options.aesthetic,
        negative_aesthetic=options.negative_aesthetic,
        start_noise=noise_from(options.start_noise) if options.start_noise else None,
    )


def size_of(text: str | None, flag: str = "--size") -> tuple[int, int] | tuple[None, None]:
    """Width and height from `512x384`."""
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text)
    if match is None:
        raise InputError(f"{flag} must be WIDTHxHEIGHT in pixels, like 128x128, not '{text}'")
    return int(match[1]), int(match[2])


def numbers(text: str, flag: str, form: str) -> tuple[int, ...]:
    """Whole numbers from `7,8,9`."""
    if not re.fullmatch(r"\d+(,\d+)*", text.replace(" ", "")):
        raise InputError(f"{flag} must be whole numbers with commas between them, {form}, not '{text}'")
    return tuple(int(number) for number in text.split(","))


def existing(path: Path, flag: str) -> Path:
    """The path itself; InputError where nothing is there."""
    if not path.exists():
        raise InputError(f"{flag}: no such file or folder: {path}")
    return path


def weighted(text: str, flag: str) -> tuple[Path, float]:
    """A file and its weight from `FILE` or `FILE@WEIGHT`; what exists under the whole name, @ and all, is that file."""
    name, at, number = text.rpartition("@")
    if not at or Path(text).exists():
        return existing(Path(text), flag), 1.0
    try:
        weight = float(number)
    except ValueError as error:
        raise InputError(
            f"{flag} {text}: there is no such file, and '{number}' is no weight: write it as {name}@0.8"
        ) from error
    if not isfinite(weight):
        raise InputError(f"{flag} {text}: a weight must be a finite number, not '{number}'")
    return existing(Path(name), flag), weight


def control_of(text: str) -> tuple[Path, Image, float]:
    """A control network, its picture and its scale from `NETWORK=IMAGE@SCALE`; names may hold = and @ themselves."""
    places = [i for i, letter in enumerate(text) if letter == "="]
    if not places:
        raise InputError(f"--control must be NETWORK=IMAGE or NETWORK=IMAGE@SCALE, not '{text}'")
    at = next((i for i in places if Path(text[:i]).exists()), places[0])
    network = existing(Path(text[:at]), "--control")
    picture, scale = weighted(text[at + 1 :], "--control")
    return network, images.read(picture), scale


def noise_from(path: Path) -> Tensor:
    """The only tensor of a safetensors file, or the one named `noise`."""
    from mezzotint.checkpoints import read_tensors

    tensors = read_tensors(path)
    if len(tensors) != 1 and "noise" not in tensors:
        raise InputError(f"{path} holds {len(tensors)} tensors: keep one, or name the start noise 'noise'")
    return tensors["noise"] if "noise" in tensors else next(iter(tensors.values()))

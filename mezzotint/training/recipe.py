"""What a training run is: one typed TOML file; unknown keys are refused with the nearest valid name."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mezzotint.errors import InputError
from mezzotint.files import read_recipe

METHODS = ("full", "vae", "patch-pca")
PLANNED = ("lora", "dreambooth", "textual-inversion", "controlnet", "lcm")
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A table of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Data(Section):
    """What is learned from; paths are relative to where the command runs."""

    folder: str  # a training folder with metadata.jsonl
    validation: str | None = None  # the same for the validation loss
    size: tuple[Positive, Positive]  # width, height in pixels
    channels: Literal[1, 3] = 3
    flips: list[Literal["horizontal", "vertical"]] = []  # off by default: parts whose orientation matters are common
    sampling: Literal["shuffle", "balanced"] = "shuffle"  # balanced: every label as often, whatever its count
    cache: str | None = None  # folder of latent caches; by default inside the run folder


class Inpaint(Section):
    """Training to repaint inside a mask."""

    k: Positive = 1  # mask maps: k*k channels
    source: Literal["procedural", "file", "both"] = "procedural"  # file: the masks that metadata.jsonl names
    file_share: Share = 0.5  # both: how often an image that has a mask uses it
    dilation: tuple[Count, Count] = (0, 0)  # pixels by which a mask from a file grows, drawn between the two
    full_share: Share = 0.0  # how often the mask is the whole image
    label_overlap: Share = 0.5  # an image with a mask keeps its label where at least this share of it is repainted
    inside_weight: Annotated[float, Field(gt=0)] = 1.0  # weight of the loss inside the mask against outside
    bank: Positive = 2048  # procedural masks drawn once, then reused with mirrorings


class Classes(Section):
    """Class labels; index len(names) is "no class"."""

    names: Annotated[list[str], Field(min_length=1)]
    dropout: Share = 0.1  # labels replaced by "no class", which makes guidance possible


class Text(Section):
    """Captions; encoder: minilm, or the folder of an encoder."""

    encoder: str = "minilm"
    length: Positive = 64  # tokens; longer captions are cut
    dropout: Share = 0.1  # captions replaced by the empty prompt


class Backbone(Section):
    """A new network, or the backbone of a model folder to go on from."""

    name: str | None = None  # unet or dit
    config: dict[str, Any] = {}
    start: str | None = None  # model folder whose backbone and contract are the start


class CodecPart(Section):
    """The autoencoder: a folder, or `model folder/vae`; none means pixels."""

    path: str


class Loss(Section):
    """How samples of different noise count (names as in mezzotint.process.weighting), and channels of other size."""

    weighting: str = "uniform"
    gamma: Annotated[float, Field(gt=0)] = 5.0  # min-SNR
    density: str = "uniform"  # of the training times
    mean: float = 0.0  # logit-normal
    deviation: Annotated[float, Field(gt=0)] = 1.0  # logit-normal
    channel_power: Annotated[float, Field(ge=0)] = 0.0  # 0: channels alike; 1: by their size in the autoencoder's units


class Vae(Section):
    """The autoencoder objective: reconstruction + perceptual + adversarial + KL."""

    name: str = "kl_vae"
    config: dict[str, Any] = {}
    start: str | None = None  # autoencoder folder to start from
    reconstruction: Literal["l1", "l2"] = "l1"
    gradient: Annotated[float, Field(ge=0)] = 0.0  # weight of the same distance between image gradients: edges, cracks
    perceptual: Annotated[float, Field(ge=0)] = 1.0
    adversarial: Annotated[float, Field(ge=0)] = 0.5
    discriminator_start: Count = 0  # step from which the discriminator plays
    discriminator_channels: Positive = 64
    discriminator_layers: Positive = 3
    discriminator_rate: Annotated[float, Field(gt=0)] = 1.0  # its learning rate relative to the autoencoder's
    kl: Annotated[float, Field(ge=0)] = 1e-6
    sample: bool = True  # decode a draw from the posterior; off: decode its mean


class PatchPCAPart(Section):
    """The linear codec: patch x patch pixels to latent_channels numbers, kernels reaching `overlap` pixels further."""

    latent_channels: Positive = 16
    patch: Positive = 8
    overlap: Count = 0


class Optimiser(Section):
    """AdamW."""

    rate: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # norm of the gradient of each part
    warmup: Count = 0  # steps of linear rise
    schedule: Literal["cosine", "constant"] = "cosine"
    final: Share = 0.0  # cosine: last rate as a share of the first


class Ema(Section):
    """Moving average of the weights: what is validated, previewed and saved."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    warmup: bool = True  # decay min(decay, (1 + n) / (10 + n)) after n steps


class Validation(Section):
    """Loss on fixed images, noise and times, averaged over bands of the clock."""

    every: Positive = 500
    bands: Positive = 5
    images: Positive = 64
    seed: int = 0


class Checkpoints(Section):
    """What makes a stopped run go on."""

    every: Positive = 500
    keep: Positive = 2


class Previews(Section):
    """Pictures drawn by the averaged weights through mezzotint.generate."""

    every: Count = 0  # 0: none
    count: Positive = 8
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] = 1.0
    sampler: str | None = None
    seed: int = 0


class Sampling(Section):
    """What a request that names no sampler gets from the finished model."""

    sampler: str
    steps: Positive = 20
    guidance: Annotated[float, Field(ge=0)] = 1.0


class Recipe(Section):
    """The whole run."""

    method: Literal["full", "vae", "patch-pca"]
    out: str  # the run folder
    steps: Positive
    batch: Positive  # images an optimiser step sees, over all pieces and processes
    accumulation: Positive = 1  # pieces a batch is computed in
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: Count = 0  # 0: as torch decides
    log_every: Positive = 10
    licence: str = "unknown"  # of the finished weights
    data_licence: str | None = None
    data: Data
    backbone: Backbone | None = None
    codec: CodecPart | None = None
    process: dict[str, Any] | None = None
    classes: Classes | None = None
    text: Text | None = None
    inpaint: Inpaint | None = None
    loss: Loss = Loss()
    vae: Vae | None = None
    patch_pca: PatchPCAPart | None = None
    optimiser: Optimiser = Optimiser()
    ema: Ema = Ema()
    validation: Validation = Validation()
    checkpoints: Checkpoints = Checkpoints()
    previews: Previews = Previews()
    sampling: Sampling | None = None


# keys that may change when a run goes on: they do not touch the weights
FREE = (
    "threads", "log_every", "checkpoints", "previews", "out", "validation", "sampling", "licence", "data_licence",
)  # fmt: skip


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe, apply `a.b=value` overrides, and check every key and value.

    `out` is runs/NAME after the recipe's file name where it says nothing.
    """
    path = Path(path)
    content = read_recipe(path)
    for override in overrides:
        _apply(content, override)
    content.setdefault("out", f"runs/{path.stem}")
    return check(content, str(path))


def check(content: dict[str, Any], where: str) -> Recipe:
    """A recipe from plain data; the first mistake becomes an InputError that names the key and `where`."""
    method = content.get("method")
    if method in PLANNED:
        raise InputError(f"{where}: method '{method}' is not available in this version; choose {' or '.join(METHODS)}.")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        first, *rest = error.errors()
        more = f" (and {len(rest)} more)" if rest else ""
        raise InputError(f"{where}: {_explain(first)}{more}") from error
    if recipe.batch % recipe.accumulation:
        raise InputError(f"{where}: batch {recipe.batch} must be a multiple of accumulation {recipe.accumulation}.")
    missing = {"full": ("backbone",), "vae": ("vae",), "patch-pca": ("patch_pca",)}[recipe.method]
    for name in missing:
        if getattr(recipe, name) is None:
            raise InputError(f"{where}: method '{recipe.method}' needs a [{name}] table.")
    return recipe


def changes(old: Recipe, new: Recipe) -> list[str]:
    """Keys in which two recipes differ and which a resumed run must not change, as "key: old -> new"."""
    return [
        f"{key}: {a!r} in the checkpoint, {b!r} in the recipe"
        for key, a, b in _differences("", old.model_dump(mode="json"), new.model_dump(mode="json"))
        if key.split(".")[0] not in FREE
    ]


def to_toml(recipe: Recipe) -> str:
    """The recipe with every default filled in, as TOML that reads back equal; keys without a value are left out."""
    return "\n".join(_table("", recipe.model_dump(mode="json"))).strip() + "\n"


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise InputError(f"--set takes key=value, for instance optimiser.rate=1e-4; got '{override}'.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string
    table = content
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {override}: '{part}' is a value, not a table.")
    table[parts[-1]] = parsed


def _explain(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *tables, wrong = (str(part) for part in error["loc"])
        here = _fields(tables)
        everywhere = {name: f"[{table}], as {table}.{name}" for table, names in _tables().items() for name in names}
        if wrong in everywhere:
            return f"unknown key {where}: it belongs into {everywhere[wrong]}"
        close = difflib.get_close_matches(wrong, here, n=1, cutoff=0.0)
        return f"unknown key {where} (nearest valid name: {close[0] if close else ', '.join(here)})"
    if error["type"] == "missing":
        return f"{where} is missing"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _tables() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, info in Recipe.model_fields.items():
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                found[name] = list(kind.model_fields)
    return found


def _fields(tables: list[str]) -> list[str]:
    return _tables().get(tables[0], []) if tables else list(Recipe.model_fields)


def _differences(key: str, a: Any, b: Any) -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found: list[tuple[str, Any, Any]] = []
        for name in dict.fromkeys([*a, *b]):
            found += _differences(f"{key}.{name}" if key else name, a.get(name), b.get(name))
        return found
    return [] if a == b else [(key, a, b)]


def _table(name: str, content: dict[str, Any]) -> list[str]:
    plain = {k: v for k, v in content.items() if v is not None and not isinstance(v, dict)}
    nested = {k: v for k, v in content.items() if isinstance(v, dict)}
    lines = ["", f"[{name}]"] if name else []
    lines += [f"{_key(k)} = {_value(v)}" for k, v in plain.items()]
    for k, v in nested.items():
        lines += _table(f"{name}.{_key(k)}" if name else _key(k), v)
    return lines


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _value(name)


def _value(value: Any) -> str:
    import json

    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_key(k)} = {_value(v)}' for k, v in value.items())}}}"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")

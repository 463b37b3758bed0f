"""The agreement that travels with weights: what a network was trained under, checked wherever two parts meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

from mezzotint.codec import Codec, LatentSpace
from mezzotint.errors import InputError
from mezzotint.files import write_text
from mezzotint.process import Process
from mezzotint.text import TextEncoder

FILE = "contract.json"
MOST = 4  # differences that one message names
HEADER = "mezzotint"  # the key of an adapter's contract in the header of its safetensors file
VERSION = 1


def _read_process(value: Any) -> Process:
    if isinstance(value, Process):
        return value
    try:
        return Process.from_dict(value)
    except TypeError as error:
        raise ValueError(f"not a process: {error}") from error


def _write_process(process: Process) -> dict[str, Any]:
    return process.to_dict()


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LatentFacts(_Facts):
    """Where the backbone works: backbone = (z - shift) * scale, z from the codec named by its digest."""

    codec: str  # SHA-256 over the autoencoder's settings and tensors, scale and shift
    channels: int
    factor: int
    pixel_channels: int
    scale: float | tuple[float, ...] = 1.0
    shift: float | tuple[float, ...] = 0.0

    @staticmethod
    def of(codec: Codec) -> LatentFacts:
        """The facts of a codec at hand."""
        return LatentFacts(
            codec=codec.digest(), channels=codec.channels, factor=codec.factor, pixel_channels=codec.pixel_channels,
            scale=codec.space.scale, shift=codec.space.shift,
        )  # fmt: skip

    def space(self) -> LatentSpace:
        """The latent space as an object that converts."""
        return LatentSpace(scale=self.scale, shift=self.shift)


class EncoderFacts(_Facts):
    """How one network reads a prompt."""

    encoder: str  # a name for people
    digest: str  # SHA-256 over the encoder's configuration, tensors and vocabulary; "" where it was not computed
    layers: tuple[int, ...]  # hidden states read: -1 is the last, -2 the last but one; several are joined on channels
    length: int  # tokens; longer prompts are cut or read in pieces
    padding: str  # what fills a short prompt: the token itself, or "mask" where padding is masked out
    pooling: str  # where the vector for the whole prompt comes from: mean, end, projection or none
    width: int  # of the tokens


class TextFacts(_Facts):
    """What the prompt became before the network saw it."""

    encoders: tuple[EncoderFacts, ...]
    width: int  # of the tokens that the backbone reads
    pooled: int | None = None  # width of the vector for the whole prompt
    empty: Literal["encoded", "zeros"] = "encoded"  # what stands for no prompt

    @staticmethod
    def of(encoder: TextEncoder, digests: bool = True) -> TextFacts:
        """The facts of a text encoder at hand; digests cost about a second per gigabyte."""
        facts = tuple(EncoderFacts(**asdict(reading)) for reading in encoder.readings(digests))
        return TextFacts(
            encoders=facts, width=encoder.width, pooled=encoder.pooled_width, empty=encoder.stands_for_nothing
        )

    def by_encoder(self) -> dict[str, Any]:
        """The facts as plain data, encoders by number, so that a comparison can name the fact that differs."""
        return self.model_dump() | {"encoders": {str(i): facts.model_dump() for i, facts in enumerate(self.encoders)}}


class ClassFacts(_Facts):
    """Class names by index; the index `null` means "no class"."""

    names: tuple[str, ...]
    null: int | None = None


class GuidanceFacts(_Facts):
    """Whether classifier-free guidance is possible, and how much of it is good."""

    dropout: float = 0.0  # share of training steps without conditioning; 0: the unconditional branch was never trained
    distilled: bool = False  # guidance was distilled into the network: there is no second branch
    embedded: bool = False  # the network is told the scale
    scale: float = 1.0  # recommended


class SamplingFacts(_Facts):
    """What a request that names neither sampler nor steps gets, and what any sampler must know of this model."""

    sampler: str
    steps: int
    spacing: Literal["leading", "linspace", "trailing"] | None = None  # None: the sampler's own
    offset: int = 0  # added to leading timesteps
    last: Literal["clean", "lowest"] | None = None  # where the path ends, for samplers that leave it open
    variance: Literal["small", "large"] | None = None  # of DDPM's fresh noise
    clip: float | Literal["default"] | None = None  # clean estimates are kept within this bound (models of pixels)
    from_image: Literal["rest", "all"] = "rest"  # LCM's steps from a picture: what is left of them, or all from below


class DtypeFacts(_Facts):
    """The number formats in which each part was seen to work."""

    backbone: tuple[str, ...] = ("float32", "bfloat16")
    codec: tuple[str, ...] = ("float32",)


class Licence(_Facts):
    """SPDX names, or a sentence: of the weights, and of the data they were trained on."""

    weights: str
    data: str | None = None


class Lineage(_Facts):
    """From these weights back to what made them; digests are SHA-256."""

    base: str | None = None  # weights this training started from
    dataset: str | None = None  # manifest
    recipe: str | None = None
    code: str | None = None  # version of Mezzotint
    seed: int | None = None
    steps: int | None = None
    overrides: tuple[str, ...] = ()  # every mismatch that --force let pass


class Contract(_Facts):
    """Everything about a set of weights that the weights themselves cannot say; written as contract.json."""

    version: Literal[1] = VERSION
    family: str = "native"
    process: Annotated[Process, PlainValidator(_read_process), PlainSerializer(_write_process)]
    latent: LatentFacts
    size: tuple[int, int]  # width, height in pixels of the training images
    weights: str = ""  # SHA-256 over the backbone's tensors as stored; families.save fills it in
    text: TextFacts | None = None
    classes: ClassFacts | None = None
    variance: Literal["fixed", "learned"] = "fixed"  # learned: twice the channels, the second half says the variance
    inpaint: int | None = None  # k: the backbone also reads k*k mask maps and the masked latents
    mask_cells: Literal["any", "corner"] = "any"  # a mask cell is set by any pixel in it, or by its first one
    picture: tuple[str, ...] = ()  # numbers about the picture that the network is told, by name and in order
    references: int | None = None  # most pixels of a picture to look at; None: the network cannot
    guidance: GuidanceFacts = GuidanceFacts()
    sampling: SamplingFacts
    dtypes: DtypeFacts = DtypeFacts()
    licence: Licence
    lineage: Lineage = Lineage()

    def overridden(self, overrides: Iterable[str]) -> Contract:
        """The same contract with mismatches that were let pass written into its lineage."""
        entries = self.lineage.overrides + tuple(o for o in overrides if o not in self.lineage.overrides)
        return self.model_copy(update={"lineage": self.lineage.model_copy(update={"overrides": entries})})


class AdapterContract(_Facts):
    """What a small addition to a model was trained under; it travels in the header of the file that has its weights."""

    version: Literal[1] = VERSION
    kind: Literal["lora", "embedding", "control"]
    family: str
    base: str = ""  # SHA-256 over the tensors of the base's backbone; "" where it was not computed
    process: Annotated[Process, PlainValidator(_read_process), PlainSerializer(_write_process)]
    latent: LatentFacts
    text: TextFacts | None = None
    classes: ClassFacts | None = None
    distilled: bool = False  # the base was a guidance-distilled model
    words: tuple[str, ...] = ()  # that call it forth
    guidance: GuidanceFacts | None = None  # of a model with it, where it changes that: few-step adapters do
    sampling: SamplingFacts | None = None  # the same
    licence: Licence
    lineage: Lineage = Lineage()

    @staticmethod
    def of(
        base: Contract, kind: Literal["lora", "embedding", "control"], weights: str = "", words: Iterable[str] = (),
        licence: Licence | None = None, lineage: Lineage | None = None,
    ) -> AdapterContract:  # fmt: skip
        """The facts of the base that an addition was trained on; `weights` is the digest of its backbone."""
        return AdapterContract(
            kind=kind, family=base.family, base=weights or base.weights, process=base.process, latent=base.latent,
            text=base.text, classes=base.classes, distilled=base.guidance.distilled, words=tuple(words),
            licence=licence or base.licence, lineage=lineage or Lineage(base=weights or base.weights or None),
        )  # fmt: skip

    def to_header(self) -> dict[str, str]:
        """One entry for the header of a safetensors file."""
        return {HEADER: self.model_dump_json()}

    @staticmethod
    def from_header(metadata: Mapping[str, str]) -> AdapterContract | None:
        """What `to_header` wrote, None where there is nothing of ours; InputError says which field is wrong."""
        if HEADER not in metadata:
            return None
        try:
            return AdapterContract.model_validate_json(metadata[HEADER])
        except ValidationError as error:
            raise InputError(f"the header's {HEADER}: {_explain(error, AdapterContract)}") from error
        except InputError as error:
            raise InputError(f"the header's {HEADER}: {error}") from error


def check_adapter(base: Contract, base_at: Path, adapter: AdapterContract, adapter_at: Path) -> None:
    """Refuse an addition that was trained under another process, in another latent space, or on other text widths.

    Another base of the same kind is no error: that is what most additions are used with. Nor is another codec that
    has the same latent space, as the decoders that were trained further have.
    """
    ours, theirs = (
        {
            "process": facts.process.to_dict(),
            "latent": facts.latent.model_dump(include={"channels", "scale", "shift"}),
            "text": facts.text and facts.text.model_dump(include={"width", "pooled"}),
        }
        for facts in (base, adapter)
    )
    found = [f"{key} is {a} in {base_at} but {b} in {adapter_at}" for key, a, b in _differences("", ours, theirs)]
    if found:
        raise InputError(
            f"trained for another kind of model: {'; '.join(found)}.\nUse it with a model of its own base."
        )


def read_contract(path: Path) -> Contract:
    """Read contract.json, or the one in a model folder; InputError says which field is wrong and how."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise InputError(
            f"{path} is missing, so nothing says what these weights were trained under. Restore it from the original "
            f"folder, or state the facts with mezzotint.contract.Contract(...) and write_contract(contract, folder)."
        )
    try:
        return Contract.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from error
    except (OSError, InputError) as error:
        raise InputError(f"{path}: {error}") from error


def read_adapter_contract(folder: Path) -> AdapterContract | None:
    """Read contract.json in the folder of an addition, None where it has none; InputError says which field is wrong."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        return AdapterContract.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error, AdapterContract)}") from error
    except (OSError, InputError) as error:
        raise InputError(f"{path}: {error}") from error


def write_contract(contract: Contract | AdapterContract, folder: Path) -> Path:
    """Write contract.json into the folder of a model or of an addition, atomically."""
    return write_text(Path(folder) / FILE, contract.model_dump_json(indent=2) + "\n")


def check_codec(contract: Contract, at: Path, codec: Codec, codec_at: Path, force: bool = False) -> Contract:
    """Refuse a codec that the backbone was not trained with; `force` writes the override into the lineage.

    A codec that came from the backbone's own by training the decoder alone has the same latents, and is as good.
    """
    ours, theirs = contract.latent, LatentFacts.of(codec)
    if ours.codec in codec.decodes:
        theirs = theirs.model_copy(update={"codec": ours.codec})
    return contract.overridden(check_cache(ours, at, theirs, codec_at, force))


def check_cache(ours: LatentFacts, at: Path, theirs: LatentFacts, theirs_at: Path, force: bool = False) -> list[str]:
    """Refuse latents that another codec made, or the same codec with another scale or shift."""
    return agree("latent", ours.model_dump(), at, theirs.model_dump(), theirs_at, force)


def check_text(contract: Contract, at: Path, text: TextFacts | None, text_at: Path, force: bool = False) -> Contract:
    """Refuse a text encoder, or a way of reading it, that the backbone was not trained with."""
    ours, theirs = ({"text": facts and facts.by_encoder()} for facts in (contract.text, text))
    return contract.overridden(agree("", ours, at, theirs, text_at, force))


def check_backbone(
    contract: Contract, at: Path, facts: Mapping[str, int | None], weights: str, weights_at: Path, force: bool = False
) -> Contract:
    """Refuse weights that the contract does not speak of.

    `facts`: in_channels, out_channels, classes (rows of the label table), tokens (width of the cross-attention input),
    pooled (width of the vector for the whole prompt); only the keys that the backbone's configuration knows. `weights`
    is the digest of its tensors as read.
    """
    channels = contract.latent.channels
    extra = 0 if contract.inpaint is None else contract.inpaint**2 + channels
    classes = contract.classes
    expected: dict[str, Any] = {
        "in_channels": channels + extra,
        "out_channels": channels * (2 if contract.variance == "learned" else 1),
        "classes": None if classes is None else len(classes.names) + int(classes.null == len(classes.names)),
        "tokens": contract.text.width if contract.text else None,
        "pooled": contract.text.pooled if contract.text else None,
    }
    ours = {key: value for key, value in expected.items() if key in facts} | {"weights": contract.weights}
    return contract.overridden(agree("", ours, at, dict(facts) | {"weights": weights}, weights_at, force))


def check_finetune(base: Contract, base_at: Path, process: Process, recipe_at: Path, force: bool = False) -> Contract:
    """Refuse to train weights under another process than theirs (v-prediction on epsilon weights and its kin)."""
    ours, theirs = base.process.to_dict(), process.to_dict()
    remedy = "Leave it out of the recipe: the base's holds."
    return base.overridden(agree("process", ours, base_at, theirs, recipe_at, force, remedy))


def agree(
    what: str, ours: Mapping[str, Any], at: Path, theirs: Mapping[str, Any], theirs_at: Path, force: bool,
    remedy: str = "Use matching parts, or --force.",
) -> list[str]:  # fmt: skip
    """The one comparison: InputError with both values and both files, or (forced) the list of overrides to record."""
    found = [f"{key} is {a} in {at} but {b} in {theirs_at}" for key, a, b in _differences(what, ours, theirs)]
    if found and not force:
        more = f"; and {len(found) - MOST} more" if len(found) > MOST else ""
        raise InputError(f"parts that do not belong together: {'; '.join(found[:MOST])}{more}.\n{remedy}")
    return found


def _differences(name: str, ours: Any, theirs: Any) -> list[tuple[str, str, str]]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        found: list[tuple[str, str, str]] = []
        keys: list[str] = list(dict.fromkeys([*ours, *theirs]))  # pyright: ignore[reportUnknownArgumentType]
        for key in keys:
            found += _differences(f"{name}.{key}" if name else key, ours.get(key), theirs.get(key))  # pyright: ignore
        return found
    return [] if ours == theirs else [(name, _short(ours), _short(theirs))]


def _short(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else f"{value[:12]}...")  # a digest
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _explain(error: ValidationError, kind: type[BaseModel] = Contract) -> str:
    first, *rest = error.errors()
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    message = first["msg"]
    if first["type"] == "extra_forbidden":
        near = get_close_matches(str(first["loc"][-1]), _field_names(kind), n=1)
        message = f"unknown key{f', nearest valid name: {near[0]}' if near else ''}"
    elif first["loc"] == ("version",):
        message = f"{first['input']!r}, but this Mezzotint reads contract version {VERSION}: use the one that wrote it"
    return f"{where}: {message}" + (f" (and {len(rest)} more)" if rest else "")


def _field_names(model: type[BaseModel]) -> list[str]:
    names: list[str] = []
    for name, info in model.model_fields.items():
        nested = [t for t in (info.annotation, *getattr(info.annotation, "__args__", ())) if isinstance(t, type)]
        names += [name, *(n for t in nested if issubclass(t, _Facts) for n in _field_names(t))]
    return names

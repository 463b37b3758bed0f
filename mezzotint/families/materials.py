"""What a checkpoint is made of, whichever layout it came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mezzotint.checkpoints import open_tensors, read_json, read_metadata, read_shapes
from mezzotint.checkpoints.header import Shapes as Stored
from mezzotint.checkpoints.keymap import Entry, renamed
from mezzotint.checkpoints.layouts.old_attention import modernised
from mezzotint.errors import InputError

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
DISTILLED = "mezzotint.distilled"  # yes or no in the header of a single file, where the names do not say it
ALIASES = {"vqvae": "vae", "bert": "text_encoder"}  # as early pipelines named them
Shapes = Mapping[str, tuple[int, ...]]
Layout = Literal["diffusers", "single-file"]


@dataclass(frozen=True)
class Material:
    """One part: its config.json and its tensors under the folder's names, mapped when first asked for."""

    config: Mapping[str, Any]
    at: Path  # where it is, for messages
    read: Callable[[], dict[str, Tensor]]
    stored: Callable[[], Stored]  # names, shapes and dtypes as the file has them, numbers untouched

    @property
    def kind(self) -> str:
        """The published class name."""
        architectures: Sequence[str] = self.config.get("architectures") or [""]
        return str(self.config.get("_class_name") or architectures[0])

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return self.read()


@dataclass(frozen=True)
class Materials:
    """The parts by the folder each has in a model folder, and what else the files say."""

    path: Path
    layout: Layout
    parts: Mapping[str, Material]
    tokenizers: Mapping[str, Path]  # folders, by their published names: tokenizer, tokenizer_2, ...
    scheduler: Mapping[str, Any] | None = None  # the published file; an original single file has none
    scheduler_at: Path | None = None
    index: Mapping[str, Any] = field(default_factory=dict[str, Any])  # model_index.json
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])  # of a single file's header
    marks: frozenset[str] = frozenset()  # tensors of a single file that are flags, such as v_pred
    left_out: Sequence[str] = ()  # tensors of a single file that are no weights: tables, flags, averages

    def config(self, part: str, key: str, default: Any = None) -> Any:
        """One setting of one part, or the default where the part or the setting is missing."""
        return self.parts[part].config.get(key, default) if part in self.parts else default

    def kind(self, part: str) -> str:
        """The class name of a part; empty where it is missing."""
        return self.parts[part].kind if part in self.parts else ""

    def material(self, part: str, remedy: str) -> Material:
        """A part that is needed; InputError with the remedy where it is missing."""
        if part not in self.parts:
            raise InputError(f"{self.path} has no {part}: {remedy}")
        return self.parts[part]


def folder_part(folder: Path) -> Material:
    """A part from its folder: config.json beside weights in safetensors, whole or in shards."""
    return Material(
        read_json(folder / "config.json"), folder, lambda: modernised(open_tensors(folder)), lambda: read_shapes(folder)
    )


def read_folder(path: Path) -> Materials:
    """A model folder in the published layout; parts that the index switches off or that are absent are left out."""
    index = read_json(path / INDEX) if (path / INDEX).is_file() else {}
    parts: dict[str, Material] = {}
    tokenizers: dict[str, Path] = {}
    places = [path / SCHEDULER]
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        name = ALIASES.get(folder.name, folder.name)
        if index.get(folder.name) == [None, None]:
            continue
        if (folder / SCHEDULER).is_file():
            places.append(folder / SCHEDULER)
        elif name.startswith("tokenizer") or name == "processor":
            tokenizers[name] = folder
        elif (folder / "config.json").is_file():
            parts[name] = folder_part(folder)
    if not parts and (path / "config.json").is_file():  # one network alone, as DDPM's were published
        lone = folder_part(path)
        parts = {"transformer" if "Transformer" in lone.kind else "unet": lone}
    at = next((place for place in reversed(places) if place.is_file()), None)
    return Materials(path, "diffusers", parts, tokenizers, read_json(at) if at else None, at, index)


@dataclass(frozen=True, slots=True)
class Section:
    """One part inside an original file: where its names begin, and its table to the folder's names.

    `infer` makes the part's config.json from names and shapes, `rows` the table for such a configuration. Names that
    start with one of `ignored` (behind the prefix) carry no weights. `implied` makes what the folder stores and the
    original leaves out, for such a configuration.
    """

    prefix: str
    infer: Callable[[Shapes], dict[str, Any]]
    rows: Callable[[Mapping[str, Any]], list[Entry]] | None  # None: the names are the folder's
    ignored: tuple[str, ...] = ()
    implied: Callable[[Mapping[str, Any]], dict[str, Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class Original:
    """A family's single-file layout.

    `fits` looks at names and shapes alone. `sections` sees the tensors too (a file may carry a number), and what a
    config.json beside the file states about the backbone. `companions` are original files of other parts that are
    published beside this one, by part: their names and their section.
    """

    fits: Callable[[Shapes], bool]
    sections: Callable[[Mapping[str, Tensor], Mapping[str, Any]], Mapping[str, Section]]
    ignored: tuple[str, ...] = ()
    companions: Mapping[str, tuple[tuple[str, ...], Section]] = field(
        default_factory=dict[str, tuple[tuple[str, ...], Section]]
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def read_original(path: Path, tensors: Mapping[str, Tensor], original: Original, beside: Path | None) -> Materials:
    """A single file of a known family, its parts under the folder's names.

    Parts and tokenizers that the file lacks are looked for in the folder `beside`, else in the file's own: subfolders
    of the published layout, or companion files; config.json and scheduler_config.json there say what names and shapes
    do not.
    """
    folder = beside or path.parent
    stated = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    parts, rest = divided(path, tensors, original, stated)
    for name, (files, section) in original.companions.items():
        for file in files:
            if name not in parts and (folder / file).is_file() and (folder / file) != path:
                parts[name] = section_part(section, open_tensors(folder / file), folder / file)
    found = read_folder(folder)
    metadata = read_metadata(path) if path.suffix == ".safetensors" else {}
    return Materials(
        path=path,
        layout="single-file",
        parts={name: part for name, part in found.parts.items() if name in COMPANIONS} | parts,
        tokenizers=found.tokenizers,
        scheduler=found.scheduler,
        scheduler_at=found.scheduler_at,
        index={"is_distilled": metadata[DISTILLED] == "yes"} if DISTILLED in metadata else {},
        metadata=metadata,
        marks=frozenset(key for key in rest if "." not in key),
        left_out=rest,
    )


def divided(
    path: Path, tensors: Mapping[str, Tensor], original: Original, stated: Mapping[str, Any]
) -> tuple[dict[str, Material], list[str]]:
    """The parts of a single file, and the names that carry no weights; InputError for tensors that belong nowhere."""
    sections = original.sections(tensors, stated)
    ignored = (*original.ignored, *(s.prefix + skip for s in sections.values() for skip in s.ignored))
    others = tuple(section.prefix for section in sections.values() if section.prefix)
    parts: dict[str, Material] = {}
    claimed: set[str] = set()
    for name, section in sections.items():
        prefix = section.prefix
        own = [key for key in tensors if key.startswith(prefix) and not (ignored and key.startswith(ignored))]
        if not prefix:  # all that no other part claims
            own = [key for key in own if not (others and key.startswith(others))]
        claimed |= {*own}
        if own:
            parts[name] = section_part(section, {key[len(prefix) :]: tensors[key] for key in own}, path)
    rest = [key for key in tensors if key not in claimed]
    foreign = [key for key in rest if not (ignored and key.startswith(ignored))]
    if foreign:
        raise InputError(
            f"{path} holds {len(foreign)} tensors that belong to no part of this family, {foreign[0]} first. "
            f"Is it another model, or a fine-tune with additions?"
        )
    return parts, rest


# What a single file may leave to its neighbours; never the backbone.
COMPANIONS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def section_part(section: Section, tensors: Mapping[str, Tensor], at: Path) -> Material:
    """A part whose tensors have the original names, prefix removed."""
    try:
        config = section.infer(shapes_of(tensors))
    except InputError as error:
        raise InputError(f"{at}: {error}") from error
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise InputError(
            f"{at}: the shapes of {section.prefix or 'its tensors'} tell no known network: {error}"
        ) from error

    def read() -> dict[str, Tensor]:
        own = renamed(tensors, section.rows(config)) if section.rows else dict(tensors)
        dtype = next(iter(own.values())).dtype
        implied = section.implied(config) if section.implied else {}
        return own | {name: tensor.to(dtype) for name, tensor in implied.items()}

    return Material(
        config,
        at,
        read,
        lambda: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()},
    )

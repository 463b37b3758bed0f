"""Adapters on a model: LoRA files and textual-inversion words, placed by the model at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mezzotint.adapters import BACKBONE, Adapter, attach, merge, modules_of, read, read_words
from mezzotint.checkpoints import find_weights, open_tensors, read_metadata
from mezzotint.checkpoints.keymap import Entry
from mezzotint.checkpoints.pickles import SUFFIXES, read_record
from mezzotint.errors import InputError
from mezzotint.families.latent import WORDS as PREDICTIONS
from mezzotint.families.model import Model
from mezzotint.families.parts import BACKBONES, kind_of
from mezzotint.families.registry import FAMILIES
from mezzotint.layers.config import write_config
from mezzotint.text import TextEncoder
from mezzotint.text.clip import Clip
from mezzotint.text.joint import Joint

PEFT, HEADER = "adapter_model", "adapter_config.json"  # weights and settings in a folder that peft writes
LORA, WORDS = ("pytorch_lora_weights", PEFT), ("learned_embeds",)  # files in folders of adapters


def adapted(
    model: Model,
    lora: Sequence[tuple[str | Path, float]] = (),
    embedding: Sequence[str | Path] = (),
    merged: bool = False,
) -> Model:
    """The model with adapters, each at its weight, and words of textual inversion; the given model stays as it is.

    Adapters compute beside the weights, or `merged` are added to copies of them; either way untouched tensors are
    shared and the base is there to the bit in the given model. InputError where a file does not fit in full.
    """
    if embedding:
        model = replace(model, text=with_words(model, [Path(path) for path in embedding]))
    if not lora:
        return model
    adapters = [(read_lora(model, Path(path)), weight) for path, weight in lora]
    change = merge if merged else attach
    text = model.text
    if text is not None:
        text = with_networks(text, {name: change(net, name, adapters) for name, net in text.networks.items()})
    return replace(model, backbone=change(model.backbone, BACKBONE, adapters), text=text)


def read_lora(model: Model, path: Path) -> Adapter:
    """An adapter for the model from its file, or from the folder that peft or diffusers writes.

    InputError names what does not fit, and the family that the adapter is for.
    """
    file = find_weights(inside(path, LORA, "LoRA"))
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    if file.stem == PEFT and (file.parent / HEADER).is_file():
        metadata = {**metadata, "lora_adapter_metadata": (file.parent / HEADER).read_text()}
    modules = {BACKBONE: modules_of(model.backbone)}
    if model.text is not None:
        modules |= {name: modules_of(network) for name, network in model.text.networks.items()}
    try:
        adapter = read(open_tensors(file), metadata, modules, {BACKBONE: original_names(model)})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    said = PREDICTIONS.get(adapter.facts.prediction or "")
    if said is not None and said is not model.process.prediction:
        ours = model.process.prediction
        raise InputError(f"{path} was trained to predict {said}, and {model.path} predicts {ours}: use its own base")
    return adapter


def inside(path: Path, stems: Sequence[str], what: str) -> Path:
    """The file that a path means: itself, or the first of these in its folder."""
    if path.is_dir():
        files = [path / f"{stem}{ending}" for ending in (".safetensors", ".bin") for stem in stems]
        for file in files:
            if file.is_file():
                return file
        raise InputError(f"{path} has no {what}: none of {', '.join(file.name for file in files)} is there")
    if not path.is_file():
        raise InputError(f"no such {what}: {path}")
    return path


def original_names(model: Model) -> list[Entry]:
    """The backbone's names in its family's single file, by which a LoRA may call its modules."""
    family = FAMILIES.get(model.family)
    if family is None or family.original is None:
        return []
    name, _ = kind_of(BACKBONES, model.backbone)
    section = family.original.sections({}, {})[family.backbone]
    config: Any = model.backbone.config
    return section.rows(write_config(config, name)) if section.rows else []


def with_words(model: Model, files: Sequence[Path]) -> TextEncoder:
    """The text encoder with the words of the files."""
    text = model.text
    clips = text.clips if isinstance(text, Joint) else (text,)
    known = tuple(clip for clip in clips if isinstance(clip, Clip))
    if text is None or not known:
        raise InputError(f"a {model.family} model's text encoder takes no new words: leave the embeddings out")
    widths = {clip.folder: clip.width for clip in known}
    words: dict[str, dict[str, Tensor]] = {}
    for file in (inside(file, WORDS, "embedding") for file in files):
        try:
            content = read_record(file) if file.suffix.lower() in SUFFIXES else open_tensors(file)
            found = read_words(content, file.stem, widths)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        if twice := found.keys() & words.keys():
            raise InputError(f"{file} gives a word that another file has given: {sorted(twice)[0]}")
        words |= found
    if isinstance(text, Joint):
        return text.with_tokens({word: [rows[clip.folder] for clip in known] for word, rows in words.items()})
    return known[0].with_tokens({word: rows[known[0].folder] for word, rows in words.items()})


def with_networks(text: TextEncoder, networks: Mapping[str, nn.Module]) -> TextEncoder:
    """The same encoder with other networks in the places of its own."""

    def exchanged(part: Any) -> Any:
        folder = getattr(part, "folder", None)
        return replace(part, network=networks[folder]) if isinstance(folder, str) and folder in networks else part

    if isinstance(text, Joint):
        return replace(text, clips=tuple(map(exchanged, text.clips)), t5=exchanged(text.t5))
    return exchanged(text)

"""Adapters on a model: LoRA files and textual-inversion words, placed by the model at hand."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from mezzotint.adapters import BACKBONE, Adapter, attach, merge, modules_of, read, read_words
from mezzotint.checkpoints import find_weights, open_tensors, read_metadata
from mezzotint.checkpoints.keymap import Entry
from mezzotint.checkpoints.pickles import SUFFIXES, read_record
from mezzotint.contract import AdapterContract, Contract, check_adapter
from mezzotint.errors import InputError
from mezzotint.families.latent import WORDS as PREDICTIONS
from mezzotint.families.model import Model
from mezzotint.families.parts import BACKBONES, kind_of
from mezzotint.families.registry import FAMILIES
from mezzotint.layers.config import write_config
from mezzotint.text import TextEncoder

PEFT, HEADER = "adapter_model", "adapter_config.json"  # weights and settings in a folder that peft writes
MOST = 8  # sets of adapters that are kept for a base
LORA, WORDS = ("pytorch_lora_weights", PEFT), ("learned_embeds",)  # files in folders of adapters

Parts = tuple[nn.Module | None, TextEncoder | None]  # None in place of the base's own backbone, which is not kept alive
Kept = OrderedDict[tuple[Any, ...], tuple[Parts, TextEncoder | None, Contract]]  # and what they were made for
_KEPT: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
_LOCK = Lock()


def ruled(model: Model, lora: Sequence[tuple[str | Path, float]]) -> Model:
    """The model under the contract that its adapters make it work under; only their headers are read.

    An adapter for few steps says by which sampler, in how many steps and with what guidance a model is drawn with it.
    """
    for path, weight in lora:
        said = contract_of(Path(path))
        changes = {name: value for name in ("guidance", "sampling") if (value := getattr(said, name, None))}
        if changes and weight:
            model = replace(model, contract=model.contract.model_copy(update=changes))
    return model


def contract_of(path: Path, stems: Sequence[str] = LORA, what: str = "LoRA") -> AdapterContract | None:
    """The contract of an adapter's file or folder, None where it has none of ours; only the header is read."""
    file = find_weights(inside(path, stems, what))
    return AdapterContract.from_header(read_metadata(file)) if file.suffix == ".safetensors" else None


def adapted(
    model: Model,
    lora: Sequence[tuple[str | Path, float]] = (),
    embedding: Sequence[str | Path] = (),
    merged: bool = False,
) -> Model:
    """The model with adapters, each at its weight, and words of textual inversion; the given model stays as it is.

    Adapters compute beside the weights, or `merged` are added to copies of them; either way untouched tensors are
    shared and the base is there to the bit in the given model. The last few are kept, as long as their base is, so that
    requests with the same files share one network. InputError where a file does not fit in full.
    """
    files, words = [(Path(path), weight) for path, weight in lora], [Path(path) for path in embedding]
    if merged:
        backbone, text = _adapted(model, files, words, merge)
    else:
        backbone, text = _beside(model, files, words)
    return replace(ruled(model, lora), backbone=backbone or model.backbone, text=text)


def _beside(model: Model, files: Sequence[tuple[Path, float]], words: Sequence[Path]) -> Parts:
    key = tuple((file.resolve(), stamp(file), weight) for file, weight in (*files, *((word, None) for word in words)))
    with _LOCK:
        kept = _KEPT.setdefault(model.backbone, OrderedDict())
        parts, text, contract = kept.pop(key, (None, None, None))
        # on another text encoder, or under another contract, the files are to be checked and read anew
        if parts is None or text is not model.text or contract != model.contract:
            parts = _adapted(model, files, words, attach)
        kept[key] = parts, model.text, model.contract
        while len(kept) > MOST:
            kept.popitem(last=False)
        return parts


def stamp(path: Path) -> int:
    """When a file, or the newest in a folder, was written; 0 where there is none."""
    inside = [path, *(path.iterdir() if path.is_dir() else ())]
    return max((file.stat().st_mtime_ns for file in inside if file.exists()), default=0)


def _adapted(
    model: Model, files: Sequence[tuple[Path, float]], words: Sequence[Path], change: Callable[..., Any]
) -> Parts:
    text = with_words(model, words) if words else model.text
    if not files:
        return None, text
    adapters = [(read_lora(replace(model, text=text), file), weight) for file, weight in files]
    if text is not None:
        text = text.with_networks({name: change(net, name, adapters) for name, net in text.networks.items()})
    backbone = change(model.backbone, BACKBONE, adapters)
    return None if backbone is model.backbone else backbone, text


def read_lora(model: Model, path: Path) -> Adapter:
    """An adapter for the model from its file, or from the folder that peft or diffusers writes.

    InputError names what does not fit, and the family that the adapter is for: its contract, where it has one of ours,
    then its matrices, then what other trainers noted about the prediction.
    """
    file = find_weights(inside(path, LORA, "LoRA"))
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    if file.stem == PEFT and (file.parent / HEADER).is_file():
        metadata = {**metadata, "lora_adapter_metadata": (file.parent / HEADER).read_text()}
    modules = {BACKBONE: modules_of(model.backbone)}
    if model.text is not None:
        modules |= {name: modules_of(network) for name, network in model.text.networks.items()}
    try:
        contract = AdapterContract.from_header(metadata)
        if contract is not None:
            check_adapter(model.contract, model.path or Path("the model"), contract, path)
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
    """The text encoder with the words of the files.

    A file with a contract is checked against the model's, and says its word where its tensors are named by encoder.
    """
    if model.text is None:
        raise InputError(f"a {model.family} model reads no text: leave the embeddings out")
    widths = {folder: table.shape[1] for folder, table in model.text.tables().items()}
    words: dict[str, dict[str, Tensor]] = {}
    for file in (inside(file, WORDS, "embedding") for file in files):
        pickled = file.suffix.lower() in SUFFIXES
        try:
            contract = AdapterContract.from_header({} if pickled else read_metadata(file))
            name = contract.words[0] if contract and contract.words else file.stem
            found = read_words(read_record(file) if pickled else open_tensors(file), name, widths)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        if contract is not None:
            check_adapter(model.contract, model.path or Path(model.family), contract, file)
        if twice := found.keys() & words.keys():
            raise InputError(f"{file} gives a word that another file has given: {sorted(twice)[0]}")
        words |= found
    return model.text.with_words(words)

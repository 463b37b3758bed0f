"""An adapter's file as the doctor opens it: what fits the model, and why the rest does not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from mezzotint.adapters import BACKBONE, Adapter, LowRank, attach, modules_of, read
from mezzotint.adapters.apply import combine
from mezzotint.adapters.family import family
from mezzotint.adapters.keys import KEY, REFUSED, Stored
from mezzotint.adapters.places import KOHYA, PEFT, Place, Places, divided
from mezzotint.checkpoints import find_weights, open_tensors, read_metadata
from mezzotint.contract import AdapterContract, check_adapter
from mezzotint.errors import InputError
from mezzotint.families.adapt import HEADER, LORA, inside, original_names
from mezzotint.families.adapt import PEFT as PEFT_FILE
from mezzotint.families.latent import WORDS as PREDICTIONS
from mezzotint.families.model import Model


@dataclass(frozen=True)
class Opened:
    """A file of an adapter against a model: `adapter` holds what fits, and everything else says what does not."""

    path: Path
    weight: float
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    format: str
    stems: tuple[str, ...]  # every module that the file names
    lost: tuple[str, ...]  # of these, those that the model has no place for
    misshapen: tuple[str, ...]  # those that have another shape here
    halves: tuple[str, ...]  # those of which a matrix is missing
    strange: tuple[str, ...]  # keys that are no plain LoRA's
    claims: tuple[str, ...]  # what its notes say that the model is not
    contract: AdapterContract | None
    adapter: Adapter | None
    refused: str  # why what fits could not be read

    @property
    def name(self) -> str:
        """For people; of a folder called model, as every run's result is, with the run's name."""
        return f"{self.path.parent.name}/{self.path.name}" if self.path.is_dir() else self.path.name


def opened(model: Model, path: Path, weight: float) -> Opened:
    """Read a file as far as it can be read; InputError where it is missing or damaged."""
    file = find_weights(inside(path, LORA, "LoRA"))
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    if file.stem == PEFT_FILE and (file.parent / HEADER).is_file():
        metadata = {**metadata, "lora_adapter_metadata": (file.parent / HEADER).read_text()}
    tensors = open_tensors(file)
    modules = {part: modules_of(network) for part, network in networks(model).items()}
    layouts = {BACKBONE: original_names(model)}
    places = Places(modules, layouts)
    kinds: dict[str, set[str]] = {}
    own: dict[str, str] = {}  # stem by key
    strange: list[str] = []
    for key in tensors:
        match = KEY.fullmatch(key)
        if match is None or match.lastgroup is None:
            strange.append(key)
        else:
            own[key] = match["stem"]
            kinds.setdefault(match["stem"], set()).add(match.lastgroup)
    halves = [stem for stem, found in kinds.items() if not {"down", "up"} <= found]
    whole = {stem: places.find(stem) for stem in kinds if stem not in halves}
    lost = [stem for stem, place in whole.items() if place is None]
    pairs = {stem: _pair(tensors, own, stem) for stem in whole}
    misshapen = [
        s for s, place in whole.items() if place is not None and not _fits(pairs[s], place, modules[place.part])
    ]
    left = {*whole} - {*lost} - {*misshapen}
    adapter, refused = None, ""
    fitting = {key: tensors[key] for key, stem in own.items() if stem in left}
    if fitting:
        try:
            adapter = read(fitting, metadata, modules, layouts)
        except InputError as error:
            refused = str(error)
    contract, claims = _claims(model, path, metadata)
    return Opened(
        path, weight, tensors, metadata, _format([*kinds]), tuple(kinds), tuple(lost), tuple(misshapen), tuple(halves),
        tuple(strange), claims, contract, adapter, refused,
    )  # fmt: skip


def networks(model: Model) -> dict[str, nn.Module]:
    """Everything that an adapter can change, by part."""
    return {BACKBONE: model.backbone, **(model.text.networks if model.text else {})}


def changed(model: Model, adapters: Sequence[tuple[Adapter, float]]) -> Model:
    """The model with adapters at these weights; the given one stays as it is."""
    text = model.text
    if text is not None and any(part != BACKBONE for adapter, _ in adapters for part in adapter.parts):
        text = text.with_networks({name: attach(net, name, adapters) for name, net in text.networks.items()})
    return replace(model, backbone=attach(model.backbone, BACKBONE, adapters), text=text)


def _pair(tensors: Mapping[str, Tensor], own: Mapping[str, str], stem: str) -> tuple[Tensor, Tensor]:
    found: dict[str, Tensor] = {}
    for key, name in own.items():
        if name == stem and (match := KEY.fullmatch(key)) and match.lastgroup:
            found[match.lastgroup] = tensors[key]
    return found["down"], found["up"]


def _fits(pair: tuple[Tensor, Tensor], place: Place, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether up down has as many rows and columns as the modules together."""
    down, up = pair
    if min(down.ndim, up.ndim) < 2:
        return False
    wide = {torch.Size(shapes[module][1:]).numel() for module in place.modules}
    rows = sum(shapes[module][0] for module in place.modules)
    return wide == {down[0].numel()} and len(up) == rows and up.shape[1] == len(down)


def _format(stems: Sequence[str]) -> str:
    """The layout that most names are in."""
    first = next(iter(stems), "")
    if divided(first)[0] in KOHYA:
        return "kohya"
    if first.startswith(PEFT):
        return "peft"
    return "original" if first.startswith(("diffusion_model.", "model.diffusion_model.")) else "diffusers"


def _claims(model: Model, path: Path, metadata: Mapping[str, str]) -> tuple[AdapterContract | None, tuple[str, ...]]:
    """What the notes of a file say of its base, where the model is something else (pain 3)."""
    found: list[str] = []
    contract = None
    try:
        contract = AdapterContract.from_header(metadata)
        if contract is not None:
            check_adapter(model.contract, model.path or Path("the model"), contract, path)
    except InputError as error:
        found.append(str(error).splitlines()[0])
    said = PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))
    if said is not None and said is not model.process.prediction and not found:
        found.append(f"it was trained to predict {said}, and this model predicts {model.process.prediction}")
    return contract, tuple(found)


def kind(opened: Opened) -> str | None:
    """The kind of adapter that is no LoRA, by the keys that give it away."""
    for ending, name in REFUSED.items():
        if any(re.search(ending, key) for key in opened.strange):
            return name
    return None


def nearest(model: Model, stems: Sequence[str]) -> list[str]:
    """For each name of a file the module of the model that is spelled most like it, where one is."""
    names = {name.replace(".", "_"): name for net in networks(model).values() for name in modules_of(net)}
    found: list[str] = []
    for stem in stems:
        close = get_close_matches(divided(stem)[1].replace(".", "_"), names, n=1, cutoff=0.5)
        found.append(names[close[0]] if close else "")
    return found


def family_of_file(opened: Opened) -> str | None:
    """The family that the widths of a file are known of."""
    ending = re.compile(r"(\.lora_A(\.\w+)?|\.lora_down|[._]lora(_linear_layer)?\.down)\.weight$")
    downs = {ending.sub("", key): tensor for key, tensor in opened.tensors.items() if ending.search(key)}
    return family([Stored(stem, down, down.T if down.ndim == 2 else down, None, None) for stem, down in downs.items()])


def family_of_model(model: Model) -> str | None:
    """The same of a model."""
    stored: list[Stored] = []
    for name, shape in modules_of(model.backbone).items():
        down, up = torch.empty(1, *shape[1:], device="meta"), torch.empty(shape[0], 1, device="meta")
        stored.append(Stored(f"unet.{name}", down, up, None, None))
    return family(stored)


@dataclass(frozen=True)
class Update:
    """What an adapter does to one weight."""

    part: str
    module: str
    low: LowRank
    ratio: float  # ||W' - W|| / ||W||, at the weight asked for
    values: Tensor  # singular values of up down, (r,) descending

    @property
    def rank(self) -> float:
        """How many singular values hold 99 % of the squared norm."""
        energy = self.values.square().cumsum(0)
        return float((energy < 0.99 * energy[-1]).sum()) + 1 if float(energy[-1]) > 0 else 0.0


def updates(model: Model, adapter: Adapter, weight: float) -> list[Update]:
    """The update of every weight, with its size against the weight's own."""
    nets, found = networks(model), list[Update]()
    for part, lows in adapter.parts.items():
        for low in lows:
            matrix = nets[part].get_parameter(f"{low.module}.weight").detach().float()
            delta = combine(matrix, [(low, weight)])
            if low.magnitude is None:
                size = float(_values(low.up, low.down).norm()) * abs(low.scale * weight)
            else:
                size = float((delta.merged(matrix) - matrix).norm())
            found.append(
                Update(part, low.module, low, size / max(1e-30, float(matrix.norm())), _values(low.up, low.down))
            )
    return found


def _values(up: Tensor, down: Tensor) -> Tensor:
    """Singular values of up down by the triangles of their QR decompositions: r x r, whatever the layer's size."""
    left = torch.linalg.qr(up.flatten(1).double().cpu(), mode="r").R
    right = torch.linalg.qr(down.flatten(1).T.double().cpu(), mode="r").R
    return torch.linalg.svdvals(left @ right.T)


def cosine(one: LowRank, other: LowRank) -> float:
    """The cosine between two updates of one weight: <A, B> = sum of (up_a' up_b) * (down_a down_b')."""
    ups = one.up.flatten(1).double().T @ other.up.flatten(1).double()
    downs = one.down.flatten(1).double() @ other.down.flatten(1).double().T
    sizes = float(_values(one.up, one.down).norm()) * float(_values(other.up, other.down).norm())
    sign = 1.0 if one.scale * other.scale >= 0 else -1.0
    return sign * float((ups * downs).sum()) / sizes if sizes else 0.0

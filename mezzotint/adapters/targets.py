"""Which modules of a network an adapter changes: by the name of a part, or by their own names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import nn

from mezzotint.adapters.keys import listing
from mezzotint.adapters.lowrank import BACKBONE
from mezzotint.adapters.places import KOHYA, PREFIXES, Places
from mezzotint.adapters.write import published
from mezzotint.errors import InputError

# Modules by part, as expressions that the whole dotted name fulfils. Parameters have the names of diffusers' files, so
# one table speaks for every backbone and text encoder. In a U-Net the second attention of a block reads the text, in SD
# 3.5 Medium the picture; FLUX.2's single blocks keep attention and perceptron in the same two matrices.
OWN = r"to_q|to_k|to_v|to_out\.0"
SELF = (
    rf"(.*\.)?attn1\.({OWN})|(.*\.)?attentions\.\d+\.({OWN})|transformer_blocks\.\d+\.attn2\.({OWN})"
    r"|(.*\.)?self_attn\.(q|k|v|o|out)_proj|(.*\.)?SelfAttention\.[qkvo]"
    r"|(.*\.)?attention\.(self\.(query|key|value)|output\.dense)"
)
CROSS = rf"(.*\.)?attentions\.\d+\.transformer_blocks\.\d+\.attn2\.({OWN})"
FUSED = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
JOINT = rf"transformer_blocks\.\d+\.attn\.({OWN}|add_[qkv]_proj|to_add_out)|{FUSED}"
TARGETS = {
    "attention": f"{SELF}|{CROSS}|{JOINT}",  # all of the next three
    "self-attention": SELF,
    "cross-attention": CROSS,
    "joint-attention": JOINT,
    "feed-forward": (
        rf"(.*\.)?ff(_context)?\.(net\.0\.proj|net\.2|linear_in|linear_out)|{FUSED}"
        r"|(.*\.)?mlp\.(fc1|fc2|gate_proj|up_proj|down_proj)|(.*\.)?layers\.\d+\.fc[12]"
        r"|(.*\.)?DenseReluDense\.(wi|wi_0|wi_1|wo)|(.*\.)?layer\.\d+\.(intermediate|output)\.dense"
    ),
    "convolution": (
        r"(.*\.)?resnets\.\d+\.(conv1|conv2|conv_shortcut)"
        r"|(.*\.)?(down|up)samplers\.\d+\.(conv|conv1|conv2|conv_shortcut)"
    ),
    "projection": r"(.*\.)?attentions\.\d+\.proj_(in|out)",  # into a feature map's transformer and out of it
    "time": r"(.*\.)?time_emb_proj",  # what the clock does to a residual block
    "modulation": r"(.*\.)?(norm1|norm1_context|norm_out)\.linear|\w+_modulation(_img|_txt)?\.linear",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How large an adapter is against its network."""

    modules: int
    parameters: int
    network: int  # parameters of the network that it changes

    @property
    def ratio(self) -> float:
        """How many times fewer numbers train."""
        return self.network / self.parameters

    def bytes(self, dtype: torch.dtype) -> int:
        """The numbers in a file, its header apart."""
        return self.parameters * dtype.itemsize


def choose(network: nn.Module, targets: Sequence[str]) -> tuple[str, ...]:
    """The modules that the targets name, in the network's order.

    A target is a part (a key of TARGETS), or a regular expression that a module's name ends in, from a dot on: `to_q`,
    `ff.net.2`, `mid_block.*`. InputError where one of them names nothing here that an adapter can change, with what
    this network has; and where a module has two names, since only one of them would change.
    """
    names = changeable(network)
    chosen: set[str] = set()
    for target in targets:
        found = {name for name in names if _expression(target).fullmatch(name)}
        if not found:
            raise InputError(_nothing(target, names))
        chosen |= found
    if not chosen:
        raise InputError(f"an adapter needs a target. {_has(names)}")
    doubled = [f"{name} and {names[name]}" for name in chosen if names[name]]
    if doubled:
        raise InputError(f"an adapter cannot change {listing(sorted(doubled), 'modules that have two names')}.")
    return tuple(name for name in names if name in chosen)


def changeable(network: nn.Module) -> dict[str, str]:
    """Every module that an adapter can change, linear or a plain convolution, with its second name where it has one."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        if id(module) in first:
            found[first[id(module)]] = name
        elif type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1):
            first[id(module)] = name
            found[name] = ""
    return found


def offered(network: nn.Module) -> dict[str, int]:
    """The parts that a network has, with the number of modules of each."""
    return _counts(changeable(network))


def check_places(networks: Mapping[str, nn.Module], chosen: Mapping[str, Sequence[str]]) -> None:
    """Refuse modules that some layout has no name for, or another module's: what trains must be there when it is read.

    `networks` are all of the model by part, `chosen` the modules to change.
    """
    shapes = {part: {name: () for name, _ in network.named_modules()} for part, network in networks.items()}
    places = Places(shapes, {})
    for part, modules in chosen.items():
        if part not in PREFIXES.values() and part != BACKBONE:
            raise InputError(f"an adapter of '{part}' cannot be written: no layout of LoRA files has a name for it.")
        folder = "unet" if part == BACKBONE else part
        prefixes = [prefix for prefix, known in KOHYA.items() if known == part]
        for name in modules:
            known = published(part, name)
            for stem in (f"{folder}.{known}", *(f"{prefix}_{known.replace('.', '_')}" for prefix in prefixes)):
                place = places.find(stem)
                if place is None or (place.part, place.modules) != (part, (name,)):
                    raise InputError(f"an adapter of {name} cannot be written: {stem} would not be read as that.")


def size(network: nn.Module, modules: Sequence[str], rank: int, magnitudes: bool = False) -> Size:
    """Count an adapter before anything is trained: r (in + out) numbers a matrix; works on the meta device.

    A convolution counts its kernel with its inputs; `magnitudes` (DoRA) add one number for each output.
    """
    numbers = 0
    for name in modules:
        weight = network.get_parameter(f"{name}.weight")
        numbers += rank * (weight[0].numel() + len(weight)) + len(weight) * magnitudes
    return Size(len(modules), numbers, sum(parameter.numel() for parameter in network.parameters()))


def _expression(target: str) -> re.Pattern[str]:
    if target in TARGETS:
        return re.compile(TARGETS[target])
    try:
        return re.compile(rf"(.*\.)?({target})")
    except re.error as error:
        raise InputError(f"the target '{target}' is no part and no regular expression: {error}") from error


def _nothing(target: str, names: Mapping[str, str]) -> str:
    close = get_close_matches(target, TARGETS, n=1)
    meant = f" (nearest part: {close[0]})" if close and target not in TARGETS else ""
    return f"the target '{target}' is nothing that this network has and an adapter can change{meant}. {_has(names)}"


def _has(names: Mapping[str, str]) -> str:
    parts = ", ".join(f"{part} ({count})" for part, count in _counts(names).items())
    example = next(iter(names), "a linear layer, of which it has none")
    return f"It has {parts}; or name modules, such as {example}." if parts else f"Name modules, such as {example}."


def _counts(names: Mapping[str, str]) -> dict[str, int]:
    counts = {part: sum(_expression(part).fullmatch(name) is not None for name in names) for part in TARGETS}
    return {part: count for part, count in counts.items() if count}

"""The keys of an adapter file, gathered by the module that they belong to, whatever the spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from mezzotint.errors import InputError

# How the tensors of one module end, in the files of peft, of older and newer diffusers, and of kohya and LyCORIS. An
# adapter's own name may stand before ".weight" where a file was written by hand.
NAMED = r"(?:\.\w+)?"
OLDER = r"\.lora|_lora|\.lora_linear_layer"
ENDINGS = {
    "down": rf"\.lora_A{NAMED}\.weight|\.lora_down\.weight|(?:{OLDER})\.down\.weight",
    "up": rf"\.lora_B{NAMED}\.weight|\.lora_up\.weight|(?:{OLDER})\.up\.weight",
    "alpha": rf"(?:{OLDER})?\.alpha",
    "magnitude": rf"\.lora_magnitude_vector{NAMED}(?:\.weight)?",
    "dora_scale": r"\.dora_scale",
}
KEY = re.compile("(?P<stem>.+?)(?:" + "|".join(f"(?P<{kind}>{ending})" for kind, ending in ENDINGS.items()) + ")")

REFUSED = {
    r"\.lokr_": "LoKr",
    r"\.hada_": "LoHa",
    r"\.(oft|boft)_": "OFT",
    r"\.lora_mid\.": "LoCon with a Tucker core",
    r"\.lora_embedding_": "LoRA on an embedding table",
    r"\.lora_[AB].*\.bias$|\.lora_(up|down)\.bias$": "LoRA with biases",
    r"\.diff(_b)?$|\.(w|b)_norm$|\.set_weight$": "a file with full differences of weights",
    r"\.on_input$": "(IA)3",
    r"^bundle_emb\.": "a bundle of LoRA and embeddings",
}


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensors that a file holds for one module, under the name that the file gives it."""

    stem: str
    down: Tensor
    up: Tensor
    alpha: float | None
    magnitude: Tensor | None  # (out,)


def is_adapter(names: Iterable[str]) -> bool:
    """Whether the keys are an adapter's, of a kind that can be used or of one that `gather` refuses by name."""
    for name in names:
        match = KEY.fullmatch(name)
        if (match and match.lastgroup in ("down", "up")) or re.search(r"\.(lokr|hada|oft|boft)_", name):
            return True
    return False


def gather(tensors: Mapping[str, Tensor]) -> list[Stored]:
    """Group the tensors of a file by module; InputError for kinds of adapter that are not LoRA, and for loose ends."""
    for ending, kind in REFUSED.items():
        if found := next((key for key in tensors if re.search(ending, key)), None):
            raise InputError(f"{kind} cannot be used ({found}): adapters must be plain LoRA or DoRA.")
    modules: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None or match.lastgroup is None:
            unknown.append(key)
        else:
            modules.setdefault(match["stem"], {})[match.lastgroup] = tensor
    if unknown or not modules:
        raise InputError(f"not a LoRA file: {listing(unknown, 'keys that are none of its own') or 'it has no tensors'}")
    halves = [stem for stem, found in modules.items() if not {"down", "up"} <= found.keys()]
    if halves:
        raise InputError(f"the LoRA file is damaged: {listing(halves, 'modules with one of their two matrices only')}")
    return [_stored(stem, found) for stem, found in modules.items()]


def listing(names: list[str], what: str) -> str:
    """'12 modules (a, b, c and 9 more)', or nothing for no names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{more})" if names else ""


def _stored(stem: str, found: Mapping[str, Tensor]) -> Stored:
    alpha, down, up = found.get("alpha"), found["down"], found["up"]
    if alpha is not None and alpha.numel() != 1:
        raise InputError(f"{stem}.alpha is not one number but has the shape {tuple(alpha.shape)}.")
    if min(down.ndim, up.ndim) < 2 or up.shape[1] != down.shape[0] or 0 in (*down.shape, *up.shape):
        raise InputError(f"{stem}: matrices of {tuple(up.shape)} and {tuple(down.shape)} cannot be multiplied.")
    magnitude = found.get("magnitude")
    if magnitude is None and (magnitude := found.get("dora_scale")) is not None and len(magnitude) != len(up):
        raise InputError(f"{stem}: DoRA with a magnitude for each input cannot be used, only one for each output.")
    if magnitude is not None and magnitude.numel() != len(up):
        raise InputError(f"{stem}: {magnitude.numel()} magnitudes for {len(up)} outputs.")
    return Stored(
        stem, down, up, None if alpha is None else alpha.item(), None if magnitude is None else magnitude.flatten()
    )

"""What an adapter's file tells by itself: names, shapes and notes that do not fit, numbers that are none or nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from mezzotint.adapters.keys import listing
from mezzotint.adapters.places import KOHYA, PREFIXES, divided
from mezzotint.digests import tensors_digest
from mezzotint.doctor import loras
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Finding
from mezzotint.doctor.loras import Opened, Update

NOTHING = 1e-4  # ||update|| / ||W|| that half precision rounds away; adapters that were trained have 1e-2 to 1
NOTED = 1.5  # times that alpha / rank may be from what the trainer noted: layers may have ranks of their own
EQUAL = 1e-5  # second singular value over the first: of a rank that is one direction over and over


def finite(each: Opened) -> list[Finding]:
    lost = [key for key, tensor in each.tensors.items() if not bool(tensor.float().isfinite().all())]
    if not lost:
        return []
    return [Finding(
        "adapter.finite", "broken",
        f"{each.name}: {listing(lost, f'of {len(each.tensors)} tensors hold NaN or infinity')}.",
        "Copy or download the file again; where a training wrote it, go back to a checkpoint before the loss left its"
        " course, and train in bfloat16 or float32.",
        strength=float(len(lost)),
    )]  # fmt: skip


def claims(case: Case, each: Opened) -> list[Finding]:
    """What its notes say of its base, and what its widths do (pains 2, 3)."""
    if each.claims:
        return [Finding(
            "adapter.base", "broken", f"{each.name}: {'; '.join(each.claims)}.",
            "Use the adapter with the model that it was trained on.", strength=float(1 + len(each.claims)),
        )]  # fmt: skip
    theirs, ours = loras.family_of_file(each), loras.family_of_model(case.bare)
    other = theirs is not None and ours is not None and theirs != ours
    if each.misshapen or (other and each.lost):
        shapes = listing([*each.misshapen], f"of {len(each.stems)} modules have another shape in this model")
        family = f"By its widths it is for {theirs}, and this is {ours or case.bare.family}." if theirs else ""
        says = " ".join(words for words in (f"{shapes}." if shapes else "", family) if words)
        return [Finding(
            "adapter.base", "broken", f"{each.name}: {says}",
            f"Use the adapter with {theirs or 'the model that it was trained on'}.",
            strength=1.0 + len(each.misshapen),
        )]  # fmt: skip
    base = each.contract.base if each.contract is not None else ""
    if base and base != (ours_digest := tensors_digest(case.bare.backbone.state_dict())):
        return [Finding(
            "adapter.base", "note",
            f"{each.name} was trained on other weights of this kind ({base[:12]}..., and these are"
            f" {ours_digest[:12]}...).",
            "Compare with the model that it was trained on, should pictures disappoint.",
        )]  # fmt: skip
    return []


def keys(case: Case, each: Opened) -> list[Finding]:
    """Names that have no place here (pain 19)."""
    total = len(each.stems)
    lost = [*each.lost, *each.halves]
    kind = loras.kind(each)
    if not lost and not each.strange and not each.refused:
        return []
    says: list[str] = []
    if each.lost:
        near = loras.nearest(case.bare, each.lost[:3])
        pairs = [f"{name} (nearest: {other or 'none'})" for name, other in zip(each.lost, near, strict=False)]
        says.append(f"{len(each.lost)} of {total} modules match nothing in this model: {', '.join(pairs)}")
    if each.halves:
        says.append(listing([*each.halves], f"of {total} modules have one of their two matrices only"))
    if each.strange:
        what = f"are a {kind}'s, which is no plain LoRA" if kind else "are no LoRA's"
        says.append(listing([*each.strange], f"of {len(each.tensors)} keys {what}"))
    if each.refused:
        says.append(each.refused)
    nothing = each.adapter is None
    effect = "so nothing of it can act" if nothing else "and a program that passes over them applies the rest alone"
    advice = (
        "Get it as a plain LoRA: train it again as one, or have its trainer convert it." if kind else
        f"Use it with the model it was trained on, or write it again in a layout with this model's names (read here as"
        f" {each.format})."
    )  # fmt: skip
    return [Finding(
        "adapter.keys", "broken" if nothing else "harmful",
        f"{each.name}: {'; '.join(says)}; {effect}.", advice,
        strength=float(1 + len(lost) + len(each.strange)),
    )]  # fmt: skip


def text(each: Opened) -> list[Finding]:
    """Whether notes or left-over keys speak of a text encoder that the file has nothing for."""
    parts = {KOHYA.get(prefix) or PREFIXES.get(prefix) for prefix, _ in map(divided, _whole(each))}
    if any(part is not None and part.startswith("text_encoder") for part in parts):
        return []
    signs = [key for key in each.tensors if key.startswith(("lora_te", "text_encoder"))]
    why = listing(signs, "left-over keys of a text encoder") if signs else _noted(each)
    if not why:
        return []
    return [Finding(
        "adapter.text", "harmful",
        f"{each.name} changes no text encoder, but was trained with one: {why}.",
        "Export the adapter again with its text-encoder part, or take the file that has it.",
    )]  # fmt: skip


def _whole(each: Opened) -> list[str]:
    return [stem for stem in each.stems if stem not in each.halves]


def _noted(each: Opened) -> str:
    """What the header says of a text encoder's training, in words; nothing where it does not."""
    try:
        settings = json.loads(each.metadata.get("lora_adapter_metadata") or "{}")
    except ValueError:
        settings = {}
    if isinstance(settings, dict):
        named = [key for key in settings if str(key).startswith("text_encoder")]  # pyright: ignore[reportUnknownVariableType]
        if named:
            return f"its header has settings for one ({named[0]})"
    rate = each.metadata.get("ss_text_encoder_lr", "")
    cached = each.metadata.get("ss_cache_text_encoder_outputs", "False") == "True"
    try:
        rates = json.loads(rate.replace("None", "0")) if rate else 0
    except ValueError:
        return ""
    high = max(
        (float(r) for r in (rates if isinstance(rates, list) else [rates]) if isinstance(r, (int, float))), default=0
    )
    return f"its header says a learning rate of {high:g} for one" if high > 0 and not cached else ""


def strength(case: Case, each: Opened) -> list[Finding]:
    """Whether alpha / rank of the matrices is what the trainer noted (kohya's header, which our own files have too)."""
    try:
        noted = float(each.metadata["ss_network_alpha"]) / float(each.metadata["ss_network_dim"])
    except (KeyError, ValueError, ZeroDivisionError):
        return []
    if (
        each.adapter is None
        or noted <= 0
        or any(low.stabilised for lows in each.adapter.parts.values() for low in lows)
    ):
        return []
    scales = sorted(abs(low.scale) for lows in each.adapter.parts.values() for low in lows)
    factor = scales[len(scales) // 2] / noted
    if factor and 1 / NOTED < factor < NOTED:
        return []
    k = 1 / factor if factor else 0.0
    return [Finding(
        "adapter.scale", "harmful",
        f"{each.name} multiplies its updates by {scales[len(scales) // 2]:.3g}, and its trainer noted alpha / rank ="
        f" {noted:.3g}: {'too strong' if factor > 1 else 'too weak'} by {max(factor, k):.3g}.",
        f"Give it the weight {each.weight * k:.2g}, or multiply its alpha by {k:.2g}.",
        f"mezzotint generate --model {case.path} --lora {each.path}@{each.weight * k:.2g} --out out",
        strength=max(factor, k, NOTED) / NOTED,
    )]  # fmt: skip


def empty(each: Opened, changes: Sequence[Update]) -> list[Finding]:
    """Updates that are nothing (pains 19, 20)."""
    if any(change.ratio > NOTHING for change in changes):
        return []
    ups = sum(not bool(change.low.up.any()) for change in changes)
    downs = sum(not bool(change.low.down.any()) for change in changes)
    if each.weight == 0:
        why, advice = "its weight is 0", "Give it a weight other than 0."
    elif ups == len(changes) or downs == len(changes):
        why = f"`{'up' if ups else 'down'}` is zero in all of {len(changes)} modules, as it is before the first step"
        advice = (
            "Train it again and see that the loss moves: the file that was saved is the one that training starts from."
        )
    else:
        largest = max(change.ratio for change in changes)
        why = f"the largest update is {largest:.1e} of its weight"
        advice = "Train it longer or at a higher rate, and look whether its alpha is as it should be."
    return [Finding("adapter.empty", "broken", f"{each.name} changes nothing: {why}.", advice)]


def rank(each: Opened, changes: Sequence[Update]) -> list[Finding]:
    """One direction over and over in every module of nominal rank 8 or more."""
    wide = [change for change in changes if change.low.rank >= 8 and float(change.values[0]) > 0]
    if not wide or any(float(change.values[1]) > EQUAL * float(change.values[0]) for change in wide):
        return []
    rank = max(change.low.rank for change in wide)
    return [Finding(
        "adapter.rank", "note", f"{each.name} has rank {rank}, and one direction in each of {len(wide)} modules.",
        "Save it at rank 1, or train it again from random `down`.",
    )]  # fmt: skip

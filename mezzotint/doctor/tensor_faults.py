"""What single tensors tell: numbers that are none, matrices that are zero, rounded to coarse grids, or copied."""

from __future__ import annotations

from collections.abc import Sequence

from mezzotint.doctor.finding import Finding, Grade
from mezzotint.doctor.grids import Grid, grid_of
from mezzotint.doctor.layers import Layer, block_of, siblings

OUTPUTS = ("conv_out.weight", "proj_out.weight", "proj_out_2.weight", "norm_out.linear.weight")
LOST = 0.05  # share of exact zeros among numbers: below 1e-4 in networks that are well, 0.5 where half was pruned
HELD = 0.01  # share of a network's numbers that such matrices must hold: tables of a few rows may have some
COARSE = 0.05  # share of a part's numbers on a coarse grid from which it counts


def named(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def not_finite(every: Sequence[Layer]) -> Finding | None:
    lost = [layer for layer in every if not layer.finite]
    if not lost:
        return None
    parts = " and ".join(dict.fromkeys(layer.network for layer in lost))
    return Finding(
        "weights.finite", "broken",
        f"{len(lost)} of {len(every)} tensors hold NaN or infinity, in the {parts}: {named([x.place for x in lost])}.",
        "Copy or download the file again; where a training wrote it, go back to a checkpoint before the loss left its"
        " course, and train in bfloat16 or float32.",
        strength=float(len(lost)),
    )  # fmt: skip


def zero(every: Sequence[Layer]) -> list[Finding]:
    """Matrices, and scales of norms, that are zero as a whole."""
    dead = [x for x in every if x.zero and (x.matrix or ("norm" in x.name and x.name.endswith("weight")))]
    if not dead:
        return []
    kinds = siblings(every)
    alone = [layer for layer in dead if any(not other.zero for other in kinds[layer.kind])]
    last = [layer for layer in dead if layer.part == "backbone" and layer.name in OUTPUTS]
    grade: Grade = "broken" if last else "harmful"
    parts = " and ".join(dict.fromkeys(layer.network for layer in dead))
    beside = f", {len(alone)} of them among layers of their kind that are not" if alone else ""
    so = " The network's output is zero." if last else " What these layers add is left out."
    return [Finding(
        "weights.zero", grade,
        f"{len(dead)} tensors of the {parts} are exactly zero{beside}: {named([x.place for x in dead])}.{so}",
        "Take the weights from a checkpoint in which these layers are trained; where a training wrote this one, see"
        " that it reaches them (learning rate, frozen parameters) before going on.",
        strength=float(1 + len(dead)),
    )]  # fmt: skip


def precision(every: Sequence[Layer]) -> list[Finding]:
    """Matrices on coarse grids, and matrices much of which was rounded to zero."""
    found: list[Finding] = []
    for network in dict.fromkeys(layer.network for layer in every):
        own = [x for x in every if x.network == network and x.matrix and not x.zero]
        numbers = max(1, sum(layer.tensor.numel() for layer in own))
        grids: list[tuple[Layer, Grid]] = [(x, grid) for x in own if (grid := grid_of(x.tensor)) is not None]
        for coarse in (True, False):
            chosen = [(x, grid) for x, grid in grids if grid.coarse is coarse]
            share = sum(x.tensor.numel() for x, _ in chosen) / numbers
            if share < COARSE:
                continue
            name = max(chosen, key=lambda pair: pair[0].tensor.numel())[1].name
            found.append(Finding(
                "weights.precision", "harmful" if coarse else "note",
                f"{share:.0%} of the {network}'s numbers lie on a coarse grid, whatever format holds them: {name}, in"
                f" {len(chosen)} of {len(own)} matrices.",
                "Use the file that this one was rounded from, in float16, bfloat16 or float32.",
                strength=share / COARSE,
            ))  # fmt: skip
        ons = {id(x) for x, _ in grids}
        lost = [x for x in own if x.judged and x.zeros > LOST and id(x) not in ons]
        share = sum(x.tensor.numel() * x.zeros for x in lost) / numbers
        held = sum(x.tensor.numel() for x in lost) / numbers
        if held > HELD:
            worst = max(lost, key=lambda layer: layer.zeros)
            found.append(Finding(
                "weights.precision", "harmful" if share > LOST else "note",
                f"{len(lost)} of {len(own)} matrices of the {network} have exact zeros between other numbers, as"
                f" numbers too small for their format or pruned ones become: {share:.1%} of all, {worst.zeros:.0%} in"
                f" {worst.place}.",
                "Use the file that this one was made of, in bfloat16 or float32.",
                strength=max(1.0, worst.zeros / LOST),
            ))  # fmt: skip
    return found


def tied(every: Sequence[Layer]) -> list[Finding]:
    """Exact copies among layers of a kind; where all of a kind are one, that is how the network is built."""
    pairs: list[tuple[Layer, Layer]] = []
    for kind in siblings(every).values():
        groups: dict[tuple[object, ...], list[Layer]] = {}
        for x in kind:
            if x.judged:
                first = x.tensor.flatten()[:64]
                groups.setdefault((tuple(x.tensor.shape), *first.tolist()), []).append(x)
        if len(groups) < 2:
            continue
        for group in groups.values():
            pairs += [(group[0], other) for other in group[1:] if bool((other.tensor == group[0].tensor).all())]
    if not pairs:
        return []
    blocks = list(dict.fromkeys(f"{block_of(b.name)} = {block_of(a.name)}" for a, b in pairs))
    return [Finding(
        "weights.tied", "harmful",
        f"{len(pairs)} matrices are exact copies of others of their kind, in {named(blocks)}: trained ones never are.",
        "Take these layers from the checkpoint that this one was merged or converted from.",
        strength=float(1 + len(pairs)),
    )]  # fmt: skip

"""Copies in a training folder, and pictures that validation shares with it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mezzotint.data import likeness
from mezzotint.data.findings import Example, Finding, at, counted, finding
from mezzotint.data.survey import Picture, Survey

LIMIT = 20_000  # pictures among which similar ones are looked for: 25 seconds of one core, growing with the square

Pair = tuple[int, int, str]  # place in one list, place in the other, how much they are alike


def exact(train: Survey, validation: Survey | None) -> Iterator[Finding]:
    """Pictures equal to the last pixel, whatever their files: copies, contradictions among them, and leaks."""
    groups: dict[str, list[Picture]] = defaultdict(list)
    for picture in train.pictures:
        groups[picture.digest].append(picture)
    several = [group for group in groups.values() if len(group) > 1]
    parts = [group for group in several if _of_other_masks(group)]
    copies = [group for group in several if not _of_other_masks(group)]
    if parts:
        beyond = sum(len(group) - 1 for group in parts)
        what = f"{counted(beyond, 'image')} repeat a picture under another mask"
        do = "Keep them if every line shows another defect of the picture; it is then drawn once for each."
        yield finding("same picture, other masks", "note", what, do, _shown(train, parts), beyond)
    if copies:
        beyond = sum(len(group) - 1 for group in copies)
        bytewise = sum(len(group) - len({picture.file_digest for picture in group}) for group in copies)
        what = f"{counted(beyond, 'image')} repeat another one exactly ({bytewise:,} of them byte for byte)"
        do = "Remove the copies: what is seen more often than the rest is memorised first."
        yield finding("duplicates", "warn", what, do, _shown(train, copies), beyond)
    yield from _contradictions(train, several)
    if validation is None:
        return
    shared = [picture for picture in validation.pictures if picture.digest in groups]
    if shared:
        part = len(shared) / len(validation.pictures)
        yield finding(
            "leak",
            "warn",
            f"{counted(len(shared), 'validation image')} ({part:.0%}) {_are(shared)} in the training folder as well",
            "Remove them from data.validation: the validation loss cannot show memorising.",
            [
                Example((at(train.folder, groups[p.digest][0].row.file_name), at(validation.folder, p.row.file_name)))
                for p in shared
            ],
        )


def similar(train: Survey, validation: Survey | None) -> Iterator[Finding]:
    """Pictures that show the same thing but are not equal, also mirrored or turned; see mezzotint.data.likeness."""
    known: dict[str, Picture] = {picture.digest: picture for picture in reversed(train.pictures)}
    ours = _sample(list(reversed(known.values())), LIMIT)
    theirs = [picture for picture in validation.pictures if picture.digest not in known] if validation else []
    theirs = _sample(theirs, LIMIT)
    if len(ours) < len(known):
        what = f"similar pictures were looked for among {len(ours):,} of {len(known):,}, evenly spread"
        yield finding("sampled", "note", what, "Audit parts of the folder by themselves to compare all of them.", [])
    if len(ours) + len(theirs) < 2:
        return
    small = _small([*ours, *theirs])
    look = likeness.CommonLook.of(small)
    own = look.without(small)
    among, asked = own[: len(ours)], own[len(ours) :]

    within = _pairs(*likeness.nearest(among, among, earlier=True))
    across = _pairs(*likeness.nearest(asked, among)) if theirs else []
    if across and validation is not None:
        yield finding(
            "similar leak",
            "warn",
            f"{counted(len(across), 'validation image')} {_are(across)} nearly the same as a training image",
            "Move them to the folder that holds their like: the validation loss is too good there.",
            _examples((train, ours), (validation, theirs), across),
        )
    if within:
        yield finding(
            "similar",
            "note",
            f"{counted(len(within), 'image')} {_are(within)} nearly the same as another one",
            "Look at the pairs, and keep one of each where they are copies of one photograph.",
            _examples((train, ours), (train, ours), within),
        )
        yield from _unlike_labels(train, ours, within)

    turned_within = _turned(look, small[: len(ours)], among, {i for i, _, _ in within}, earlier=True)
    turned_across = _turned(look, small[len(ours) :], among, {i for i, _, _ in across}, earlier=False)
    if turned_across and validation is not None:
        yield finding(
            "turned leak",
            "note",
            f"{counted(len(turned_across), 'validation image')} nearly as in training, but mirrored or turned",
            "Look at the pairs, and move real copies to the folder that holds their like.",
            _examples((train, ours), (validation, theirs), turned_across),
        )
    if turned_within:
        yield finding(
            "turned",
            "note",
            f"{counted(len(turned_within), 'image')} {_are(turned_within)} nearly another one, mirrored or turned",
            "Remove mirrored copies, and let data.flips mirror where the product allows it.",
            _examples((train, ours), (train, ours), turned_within),
        )


def _contradictions(train: Survey, groups: list[list[Picture]]) -> Iterator[Finding]:
    labels: list[Example] = []
    captions: list[Example] = []
    for group in groups:
        by_mask: dict[str | None, list[Picture]] = defaultdict(list)
        for picture in group:
            by_mask[picture.mask.digest if picture.mask else None].append(picture)
        for same in by_mask.values():
            names = tuple(at(train.folder, picture.row.file_name) for picture in same)
            if len(given := {picture.row.label for picture in same} - {None}) > 1:
                labels.append(Example(names, "labels " + ", ".join(map(str, sorted(given, key=str)))))
            if len(said := {picture.row.text for picture in same}) > 1:
                captions.append(Example(names, " | ".join(sorted(said))))
    for kind, found in (("labels", labels), ("captions", captions)):
        if found:
            what = f"{counted(len(found), 'picture')} {'comes' if len(found) == 1 else 'come'} with different {kind}"
            do = "Correct the lines of metadata.jsonl: the network learns the average of what they say."
            yield finding(f"conflicting {kind}", "warn", what, do, found)


def _unlike_labels(train: Survey, pictures: list[Picture], pairs: list[Pair]) -> Iterator[Finding]:
    def labels(pair: Pair) -> tuple[int | None, int | None]:
        return pictures[pair[0]].row.label, pictures[pair[1]].row.label

    unlike = [pair for pair in pairs if None not in labels(pair) and labels(pair)[0] != labels(pair)[1]]
    if unlike:
        said = [(i, j, "labels {1} and {0}".format(*labels((i, j, "")))) for i, j, _ in unlike]
        what = f"{counted(len(said), 'image')} {_are(said)} nearly the same as one with another label"
        do = "Look at the pairs: either they differ in what the label says, or a label is wrong."
        yield finding("similar, other labels", "note", what, do, _examples((train, pictures), (train, pictures), said))


def _turned(look: likeness.CommonLook, small: Tensor, among: Tensor, but: set[int], earlier: bool) -> list[Pair]:
    found: dict[int, Pair] = {}
    for name in likeness.TURNS if len(small) else ():
        own = look.without(likeness.turned(small, name))
        for i, j, alike in _pairs(*likeness.nearest(own, among, earlier)):
            if i not in but:
                found.setdefault(i, (i, j, f"{name}, {alike}"))
    return sorted(found.values())


def _pairs(which: Tensor, alike: Tensor) -> list[Pair]:
    """Most alike first."""
    order = torch.argsort(alike, descending=True, stable=True)[: int((which >= 0).sum())]
    return [(i, int(which[i]), f"correlation {alike[i]:.2f}") for i in order.tolist()]


def _examples(
    left: tuple[Survey, list[Picture]], right: tuple[Survey, list[Picture]], pairs: Sequence[Pair]
) -> Iterator[Example]:
    for i, j, says in pairs:
        first, second = left[1][j].row.file_name, right[1][i].row.file_name
        yield Example((at(left[0].folder, first), at(right[0].folder, second)), says)


def _shown(train: Survey, groups: list[list[Picture]]) -> Iterator[Example]:
    for group in groups:
        yield Example(tuple(at(train.folder, picture.row.file_name) for picture in group))


def _of_other_masks(group: list[Picture]) -> bool:
    """Whether every picture of a group has a mask, each another."""
    return len({picture.mask.digest for picture in group if picture.mask}) == len(group)


def _small(pictures: list[Picture]) -> Tensor:
    return torch.from_numpy(np.stack([picture.small for picture in pictures]))


def _sample(pictures: list[Picture], most: int) -> list[Picture]:
    step = max(1.0, len(pictures) / most)
    return [pictures[int(i * step)] for i in range(min(most, len(pictures)))]


def _are(found: Sequence[object]) -> str:
    return "is" if len(found) == 1 else "are"

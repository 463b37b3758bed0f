"""What is wrong with a training folder, found before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mezzotint.data import duplicates, facts
from mezzotint.data.buckets import Size
from mezzotint.data.findings import SEVERITIES, Audit, Example, Finding, at, counted, finding
from mezzotint.data.survey import Part, Picture, Survey, survey

CUT = 0.2  # share of a picture above which cutting it to the size is worth a look
INVERTED = 0.5  # share above which a mask rather shows what is not the defect
APART = 10  # ratio between the most and the least frequent class from which it is worth a look
DEEP = ("I", "F")  # first letters of Pillow's modes of more than eight bits
PARTS: dict[Part, tuple[str, str]] = {
    "row": ("line of metadata.jsonl", "Correct or remove these lines."),
    "image": ("image", "Replace these files, or remove their lines from metadata.jsonl."),
    "mask": ("mask", 'Replace these masks, or remove "mask" from their lines.'),
    "control": ("condition picture", 'Replace these pictures, or remove "control" from their lines.'),
}


def audit(
    folder: Path,
    validation: Path | None = None,
    size: Size | None = None,
    channels: int | None = None,
    classes: Sequence[str] | None = None,
    tokens: Callable[[list[str]], list[int]] | None = None,
    room: int | None = None,
    watch: Callable[[int, int], None] | None = None,
    sizes: Sequence[Size] = (),
) -> Audit:
    """Look through a training folder and its validation folder as a run would use them.

    size: width and height of the run, sizes: those of its buckets, channels: 1 or 3, classes: their names.
    tokens: how many tokens each of some captions has; room: how many of them the encoder reads.
    watch(done, all) follows the decoding, of both folders one after the other.
    InputError only where a folder or its metadata.jsonl is missing; whatever else is wrong is a finding.
    """
    surveys = [survey(Path(path), watch) for path in (folder, validation) if path is not None]
    train, held = surveys[0], surveys[1] if len(surveys) > 1 else None
    among = list(sizes) or ([size] if size else [])
    found: list[Finding] = []
    for each in surveys:
        found += _broken(each)
        found += _labels_out_of_range(each, classes)
        found += _masks(each)
        found += _colours(each, channels)
        found += _sizes(each, among)
    found += duplicates.exact(train, held)
    found += duplicates.similar(train, held)
    lengths = [_lengths(each, tokens) for each in surveys]
    found += _captions(train, lengths[0], room)
    found += _balance(train, held, classes)
    return Audit(
        folder=str(folder),
        validation=None if validation is None else str(validation),
        findings=tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))),
        facts={
            part: facts.of(each, among, classes, length)
            for part, each, length in zip(("train", "validation"), surveys, lengths, strict=False)
        },
    )


def _broken(data: Survey) -> Iterator[Finding]:
    for part, (noun, do) in PARTS.items():
        wrong = [Example((at(data.folder, p.name),), p.why) for p in data.problems if p.part == part]
        if wrong:
            many = "lines of metadata.jsonl" if part == "row" else ""
            yield finding(
                f"broken {part}",
                "stop",
                f"{counted(len(wrong), noun, many)} in {data.folder.name} cannot be used",
                do,
                wrong,
            )


def _labels_out_of_range(data: Survey, classes: Sequence[str] | None) -> Iterator[Finding]:
    wrong = [p for p in data.pictures if classes is not None and (p.row.label or 0) >= len(classes)]
    if wrong and classes is not None:
        what = f"{counted(len(wrong), 'label')} beyond the last class, which is {len(classes) - 1}"
        examples = [_of(data, p, f"label {p.row.label}, line {p.row.line}") for p in wrong]
        yield finding("label out of range", "stop", what, "Correct the labels or complete classes.names.", examples)


def _masks(data: Survey) -> Iterator[Finding]:
    masked = [(p, p.mask) for p in data.pictures if p.mask is not None]
    empty = [_mask(data, p) for p, mask in masked if mask.area == 0]
    if empty:
        what = f"{counted(len(empty), 'mask')} of {len(masked):,} in {data.folder.name} without a white pixel"
        do = 'Paint them, or remove "mask" from lines of images without a defect.'
        yield finding("empty mask", "warn", what, do, empty)
    wide = [_mask(data, p, f"{mask.area:.0%} white") for p, mask in masked if mask.area > INVERTED]
    if wide:
        what = f"{counted(len(wide), 'mask')} of {len(masked):,} in {data.folder.name} that cover more than half"
        yield finding("inverted mask", "warn", what, "Invert them if black is the defect: white is.", wide)
    other = [
        _mask(data, p, f"{mask.size[0]}x{mask.size[1]} for an image of {p.size[0]}x{p.size[1]}")
        for p, mask in masked
        if mask.size != p.size
    ]
    if other:
        what = f"{counted(len(other), 'mask')} in {data.folder.name} of another resolution than their image"
        yield finding("mask size", "note", what, "Export masks at the size of their images to keep their edges.", other)


def _colours(data: Survey, channels: int | None) -> Iterator[Finding]:
    where = "" if not data.pictures else f" in {data.folder.name}"
    grey = sum(p.grey for p in data.pictures)
    blank = [_of(data, p) for p in data.pictures if p.blank]
    if blank:
        what = f"{counted(len(blank), 'image')}{where} of one colour everywhere"
        yield finding("blank", "warn", what, "Remove them, or export them again.", blank)
    if channels == 3 and grey and grey == len(data.pictures):
        what = f"all {grey:,} images{where} are grey, and the run has three channels"
        do = "Set data.channels = 1 where the network is new; a base model with three channels needs none of it."
        yield finding("grey", "note", what, do, [], grey)
    elif channels == 3 and grey:
        shown = [_of(data, p) for p in data.pictures if p.grey]
        what = f"{grey:,} of {counted(len(data.pictures), 'image')}{where} {'is' if grey == 1 else 'are'} grey"
        yield finding("some grey", "note", what, "Remove them if the model should always paint in colour.", shown)
    if channels == 1 and grey < len(data.pictures):
        shown = [_of(data, p) for p in data.pictures if not p.grey]
        what = f"{counted(len(shown), 'image')}{where} with colour, which a run with one channel drops"
        yield finding("colour lost", "warn", what, "Set data.channels = 3 if colour tells anything.", shown)
    clear = [_of(data, p) for p in data.pictures if p.transparent]
    if clear:
        what = f"{counted(len(clear), 'image')}{where} with transparent parts, of which training sees the hidden colour"
        yield finding("transparent", "warn", what, "Put them on a background and save them without alpha.", clear)
    turned = [_of(data, p) for p in data.pictures if p.turned]
    if turned:
        what = f"{counted(len(turned), 'image')}{where} lying on their side, as their EXIF data alone says"
        yield finding("EXIF orientation", "warn", what, "Turn the pixels, for example with: exiftran -ai", turned)
    deep = [_of(data, p, p.mode) for p in data.pictures if p.mode.startswith(DEEP)]
    if deep:
        what = f"{counted(len(deep), 'image')}{where} of more than 8 bits, scaled to 8 by their full range"
        do = "Stretch the levels in use to the full range and save 8 bits where they look dark."
        yield finding("16-bit", "note", what, do, deep)


def _sizes(data: Survey, among: Sequence[Size]) -> Iterator[Finding]:
    if not among or not data.pictures:
        return
    enlarged, cut, which = facts.fits(data, among)
    small = [
        _of(data, p, f"{p.size[0]}x{p.size[1]}, enlarged {by:.2g} times")
        for p, by in zip(data.pictures, enlarged, strict=True)
        if by > 1
    ]
    size = f"{among[0][0]}x{among[0][1]}" if len(among) == 1 else "their bucket"
    if small:
        what = f"{counted(len(small), 'image')} in {data.folder.name} smaller than {size}: enlarged, and so blurred"
        yield finding("enlarged", "warn", what, "Lower data.size, or replace or remove these images.", small)
    wide = [
        _of(data, p, f"{p.size[0]}x{p.size[1]} to {among[w][0]}x{among[w][1]}: {share:.0%} cut away")
        for p, share, w in zip(data.pictures, cut, which, strict=True)
        if share > CUT
    ]
    if wide:
        what = (
            f"{counted(len(wide), 'image')} in {data.folder.name} of another shape than {size}: over {CUT:.0%} cut away"
        )
        do = (
            "Set data.bucket_step = 64, or crop them to what matters."
            if len(among) == 1
            else "Raise data.bucket_ratio."
        )
        yield finding("cut", "warn", what, do, wide)


def _lengths(data: Survey, tokens: Callable[[list[str]], list[int]] | None) -> list[int] | None:
    if tokens is None:
        return None
    texts = sorted({p.row.text for p in data.pictures})
    length = dict(zip(texts, tokens(texts), strict=True))
    return [length[p.row.text] for p in data.pictures]


def _captions(data: Survey, lengths: list[int] | None, room: int | None) -> Iterator[Finding]:
    texts = [p.row.text for p in data.pictures]
    empty = [_of(data, p) for p in data.pictures if not p.row.text.strip()]
    if not texts:
        return
    if len(empty) == len(texts):
        severity = "note" if lengths is None else "warn"
        do = 'Add "text" to the lines of metadata.jsonl if prompts should steer the model.'
        yield finding("no captions", severity, "no image has a caption", do, [], len(empty))
        return
    if empty:
        what = f"{len(empty):,} of {counted(len(texts), 'image')} without a caption"
        do = 'Add "text" to these lines; text.dropout alone decides how often training sees no prompt.'
        yield finding("empty caption", "warn", what, do, empty)
    if lengths is not None and room is not None:
        long = [
            _of(data, p, f"{n} tokens: {p.row.text}") for p, n in zip(data.pictures, lengths, strict=True) if n > room
        ]
        if long:
            what = (
                f"{counted(len(long), 'caption')} longer than the {room} tokens that are read: their ends are cut off"
            )
            yield finding("long caption", "warn", what, "Shorten them, or raise text.length as far as it goes.", long)
    (commonest, times), *_ = Counter(texts).most_common(1)
    if times > 1:
        what = (
            f"{len(set(texts)):,} different captions for {len(texts):,} images; {times / len(texts):.0%} have the same"
        )
        do = "Describe what differs between images if prompts should tell it apart."
        yield finding("same caption", "note", what, do, [Example((), commonest)], times)


def _balance(train: Survey, held: Survey | None, classes: Sequence[str] | None) -> Iterator[Finding]:
    counts = Counter(p.row.label for p in train.pictures if p.row.label is not None)
    if classes is not None:
        for data in filter(None, (train, held)):
            there = {p.row.label for p in data.pictures}
            missing = [name for i, name in enumerate(classes) if i not in there]
            if missing:
                kind, severity = ("class missing", "warn") if data is train else ("class not validated", "note")
                what = f"{counted(len(missing), 'class', 'classes')} without an image in {data.folder.name}"
                what += f": {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
                do = "Add images of them or take them out of classes.names." if data is train else "Add some of them."
                yield finding(kind, severity, what, do, [Example((), name) for name in missing])
        bare = len(train.pictures) - counts.total()
        if bare:
            what = f"{bare:,} of {counted(len(train.pictures), 'image')} without a label: they are learned as no class"
            do = 'Add "label" to their lines if their class is known.'
            shown = [_of(train, p) for p in train.pictures if p.row.label is None]
            yield finding("no label", "note", what, do, shown, bare)
    if len(counts) > 1 and max(counts.values()) >= APART * min(counts.values()):
        (most, many), (least, few) = counts.most_common()[0], counts.most_common()[-1]
        what = f"{many:,} images of {facts.named(most, classes)} to {few:,} of {facts.named(least, classes)}"
        yield finding("imbalance", "warn", what, 'Set data.sampling = "balanced".', [], few)


def _of(data: Survey, picture: Picture, says: str = "") -> Example:
    return Example((at(data.folder, picture.row.file_name),), says)


def _mask(data: Survey, picture: Picture, says: str = "") -> Example:
    return Example((at(data.folder, picture.row.file_name), at(data.folder, str(picture.row.mask))), says)

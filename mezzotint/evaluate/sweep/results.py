"""What the measurements say: a row for each setting, which of them nothing beats, and the one to use."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, TypeVar

from mezzotint.backbones.features import Features
from mezzotint.evaluate.sweep import looks, meter
from mezzotint.evaluate.sweep.measure import Sweep
from mezzotint.evaluate.sweep.reference import Reference
from mezzotint.evaluate.sweep.setting import Setting, Target
from mezzotint.evaluate.sweep.store import Cell

T = TypeVar("T")
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over images with its 95 % interval, the mean +- 1.96 standard errors; without width for one image."""

    value: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval | None:
        """None of nothing."""
        if not values:
            return None
        mean = statistics.fmean(values)
        error = 1.96 * statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return Interval(mean, max(0.0, mean - error), mean + error)


@dataclass(frozen=True, slots=True)
class Row:
    """What one setting gives and costs, an image."""

    setting: Setting
    evaluations: int
    latent: Interval | None  # error against the converged images, in deviations of them; None: drawn with fresh noise
    pixel: Interval | None  # the same of pixels, in grey levels of 255
    seconds: float | None
    ratio: Interval | None  # time over the baseline's: median, least and greatest of the rounds that timed both
    pairs: int  # such rounds
    memory: int | None  # bytes at most, weights included
    money: float | None
    converged: dict[str, Any] | None  # distance of the set of pictures from the converged ones'
    real: dict[str, Any] | None  # and from real images
    failure: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "setting": self.setting.to_dict()}


@dataclass(frozen=True)
class Results:
    """All of it, for reports."""

    rows: list[Row]
    references: Mapping[Target, Reference]
    reals: Mapping[Target, dict[str, Any]]  # distance of the converged pictures from real images
    baseline: Setting
    front: list[Row]  # by error, within the chosen target; by distance where nothing has an error
    target: Target  # the one recommended
    best: Row | None
    why: str


def gather(
    sweep: Sweep, references: Mapping[Target, Reference], tolerance: float, price: float | None = None,
    real: Features | None = None,
) -> Results:  # fmt: skip
    """Read what was measured and judge it; `tolerance` is the error to accept, in grey levels; `price` is an hour's."""
    cells = {setting: _cells(sweep, setting) for setting in sweep.settings}
    ends = {target: looks.by_batches(reference.pictures) for target, reference in references.items()
            if sweep.compares}  # fmt: skip
    reals = {target: found for target, features in ends.items() if real is not None
             and (found := looks.distance(real, features)) is not None}  # fmt: skip
    base = cells[sweep.baseline]
    rows = [_row(sweep, setting, cells[setting], base, ends, price, real) for setting in sweep.settings]
    target = choose_target(sweep, reals)
    within = [row for row in rows if row.setting.target == target]
    best, why = recommend(within, tolerance, references.get(target))
    errors = [row for row in within if row.pixel is not None and row.seconds is not None]
    front = pareto(errors, lambda row: (row.seconds or 0.0, row.pixel.value if row.pixel else 0.0))
    if not errors:
        distant = [row for row in within if of_distance(row) is not None and row.seconds is not None]
        front = pareto(distant, lambda row: (row.seconds or 0.0, (of_distance(row) or {})["distance"]))
    return Results(rows, references, reals, sweep.baseline, front, target, best, why)


def pareto(points: Sequence[T], of: Callable[[T], tuple[float, float]]) -> list[T]:
    """The points that no other one beats in both numbers, smaller being better, by rising first number."""
    found: list[T] = []
    least = math.inf
    for point in sorted(points, key=of):
        if of(point)[1] < least:
            least = of(point)[1]
            found.append(point)
    return found


def of_distance(row: Row) -> dict[str, Any] | None:
    """The Frechet distance from real images, or else from the converged ones."""
    found = row.real or row.converged
    return None if found is None else found["frechet"]


def choose_target(sweep: Sweep, reals: Mapping[Target, dict[str, Any]]) -> Target:
    """The model's own guidance where it was swept, else the first; another one where it is nearer to real images.

    Nearer means that its interval lies wholly below.
    """
    own = sweep.subject.contract.guidance.scale
    first = next((t for t in sweep.targets if t.guidance == own and not t.rescale), sweep.targets[0])
    if not reals:
        return first
    nearest = min(reals, key=lambda target: reals[target]["frechet"]["distance"])
    return nearest if reals[nearest]["frechet"]["high"] < reals[first]["frechet"]["low"] else first


def recommend(rows: Sequence[Row], tolerance: float, reference: Reference | None) -> tuple[Row | None, str]:
    """The fastest setting that is good enough, and why, in words.

    Good enough: the upper end of its pixel error is within the tolerance. Where nothing has an error (a distilled
    network, or samplers of fresh noise alone): its distance is not told apart from the least one.
    """
    timed = [row for row in rows if row.seconds is not None and not row.failure]
    errors = [row for row in timed if row.pixel is not None]
    if errors and reference is not None:
        good = [row for row in errors if row.pixel and row.pixel.high <= tolerance]
        if good:
            best = min(good, key=lambda row: row.seconds or 0.0)
            return best, (
                f"the fastest that stays within {tolerance:g} grey levels of where the model leads: "
                f"{_errors(best)}, {_seconds(best)}"
            )
        best = min(errors, key=lambda row: row.pixel.value if row.pixel else math.inf)
        return best, (
            f"nothing is sure to stay within {tolerance:g} grey levels of where the model leads; this comes nearest: "
            f"{_errors(best)}, {_seconds(best)}. More steps may do it"
        )
    distant = [(row, found) for row in timed if (found := of_distance(row)) is not None]
    if distant:
        least = min((found for _, found in distant), key=lambda found: found["distance"])
        best, found = min(
            ((row, found) for row, found in distant if found["distance"] <= least["high"]),
            key=lambda pair: pair[0].seconds or 0.0,
        )
        what = "real images" if best.real is not None else "the converged ones"
        return best, (
            f"the fastest whose pictures are as near to {what} as any, as far as these intervals tell: Frechet "
            f"distance {found['distance']:.2f} ({found['low']:.2f} to {found['high']:.2f}), {_seconds(best)}"
        )
    return None, "nothing here measures quality: a model without an ODE is judged against real images (--data)"


def _errors(row: Row) -> str:
    assert row.pixel is not None
    return f"{row.pixel.value:.2f} (95 % interval {row.pixel.low:.2f} to {row.pixel.high:.2f})"


def _seconds(row: Row) -> str:
    return f"{row.seconds:.3g} s an image"


def _cells(sweep: Sweep, setting: Setting) -> list[Cell]:
    return [sweep.store.read(sweep.identity(setting, index)) or Cell() for index in range(sweep.subject.rounds)]


def _row(
    sweep: Sweep, setting: Setting, cells: Sequence[Cell], base: Sequence[Cell],
    ends: Mapping[Target, Features], price: float | None, real: Features | None,
) -> Row:  # fmt: skip
    failure = next((cell.failure for cell in cells if cell.failure), "")
    seconds, ratio, pairs = _time(sweep, cells, base)
    memory = next((cell.memory for cell in cells if cell.memory is not None), None)
    drawn = None
    if sweep.compares and not failure:
        drawn = looks.joined(
            [sweep.store.features(sweep.identity(setting, index)) for index in range(sweep.subject.rounds)]
        )
    converged = ends.get(setting.target)
    return Row(
        setting=setting,
        evaluations=sweep.evaluations(setting),
        latent=Interval.of([*chain.from_iterable(cell.latent for cell in cells)]),
        pixel=Interval.of([*chain.from_iterable(cell.pixel for cell in cells)]),
        seconds=seconds,
        ratio=ratio,
        pairs=pairs,
        memory=None if memory is None else memory + meter.weights(sweep.subject.models[setting.dtype]),
        money=None if price is None or seconds is None else price * seconds / HOUR,
        converged=None if drawn is None or converged is None else looks.distance(converged, drawn),
        real=None if drawn is None or real is None else looks.distance(real, drawn),
        failure=failure,
    )


def _time(sweep: Sweep, cells: Sequence[Cell], base: Sequence[Cell]) -> tuple[float | None, Interval | None, int]:
    """Seconds an image, the ratio to the baseline, and how many rounds timed both in one run.

    Seconds are the baseline's median times the ratio, so that a slow hour of the machine does not speak against the
    settings that it met; where no round timed both, they are the setting's own.
    """
    own = _an_image(sweep, cells)
    ratios = [
        ours / theirs
        for cell, beside in zip(cells, base, strict=True)
        for run, ours in cell.seconds.items()
        if (theirs := beside.seconds.get(run))
    ]
    if not own:
        return None, None, 0
    if not ratios:
        return statistics.median(own), None, 0
    middle = statistics.median(ratios)
    return middle * statistics.median(_an_image(sweep, base)), Interval(middle, min(ratios), max(ratios)), len(ratios)


def _an_image(sweep: Sweep, cells: Sequence[Cell]) -> list[float]:
    return [
        seconds / len(sweep.subject.round(index))
        for index, cell in enumerate(cells)
        for seconds in cell.seconds.values()
    ]

"""What the sweeps say about the claims: two settings on the same noise, two models against the same real images."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

from mezzotint.evaluate.sweep.measure import Sweep
from mezzotint.evaluate.sweep.results import Results, Row
from mezzotint.evaluate.sweep.setting import Setting

NEARER, FARTHER, OPEN = "yes", "no", "not told apart"


@dataclass(frozen=True)
class Verdict:
    """One line of the table of claims."""

    claim: str
    model: str
    measured: str
    holds: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Swept:
    """One model's sweep, judged."""

    name: str
    sweep: Sweep
    results: Results

    def row(self, sampler: str, steps: int, guidance: float) -> Row:
        """The row of a setting."""
        return next(
            row for row in self.results.rows
            if (row.setting.sampler, row.setting.steps, row.setting.target.guidance) == (sampler, steps, guidance)
        )  # fmt: skip

    def errors(self, setting: Setting) -> list[float]:
        """The latent error of each image."""
        cells = [self.sweep.store.read(self.sweep.identity(setting, i)) for i in range(self.sweep.subject.rounds)]
        return [*chain.from_iterable(cell.latent for cell in cells if cell is not None)]

    @property
    def guidances(self) -> list[float]:
        return [target.guidance for target in self.sweep.targets]


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Mean of ours - theirs, image by image, with the 95 % interval of the mean."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.fmean(gaps)
    error = 1.96 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    return mean, mean - error, mean + error


def nearer(claim: str, swept: Swept, ours: tuple[str, int], theirs: tuple[str, int], guidance: float) -> Verdict:
    """Whether a setting ends no farther from the converged image than another one, and in what part of its time."""
    a, b = (swept.row(*each, guidance) for each in (ours, theirs))
    mean, low, high = difference(swept.errors(a.setting), swept.errors(b.setting))
    if a.latent is None or b.latent is None:
        raise ValueError(f"{ours} and {theirs} must be deterministic")
    holds = NEARER if high <= 0.0 else FARTHER if low > 0.0 else OPEN
    return Verdict(
        claim,
        f"{swept.name}, guidance {guidance:g}",
        f"{ours[0]} {ours[1]}: {a.latent.value:.3f}, {theirs[0]} {theirs[1]}: {b.latent.value:.3f}, difference "
        f"{mean:+.3f} ({low:+.3f} to {high:+.3f}); {times(a, b)}",
        holds,
    )


def times(ours: Row, theirs: Row) -> str:
    """How many times as fast the first is, where both were timed."""
    if not ours.seconds or not theirs.seconds:
        return "not timed"
    return f"{theirs.seconds / ours.seconds:.2f} times as fast"


def within(claim: str, swept: Swept, setting: tuple[str, int], guidance: float, tolerance: float) -> Verdict:
    """Whether a setting stays within a pixel error, in grey levels."""
    row = swept.row(*setting, guidance)
    if row.pixel is None:
        raise ValueError(f"{setting} must be deterministic")
    holds = NEARER if row.pixel.high <= tolerance else FARTHER if row.pixel.low > tolerance else OPEN
    told = f"{row.pixel.value:.2f} grey levels ({row.pixel.low:.2f} to {row.pixel.high:.2f}) from converged"
    return Verdict(claim, f"{swept.name}, guidance {guidance:g}", f"{setting[0]} {setting[1]}: {told}", holds)


def closer(claim: str, where: str, ours: tuple[str, Mapping], theirs: tuple[str, Mapping]) -> Verdict:
    """Whether one set of pictures is nearer to real images than another: yes where intervals do not overlap."""
    (name, a), (other, b) = ((label, found["frechet"]) for label, found in (ours, theirs))
    holds = NEARER if a["high"] < b["low"] else FARTHER if a["low"] > b["high"] else OPEN
    told = [f"{n}: {d['distance']:.2f} ({d['low']:.2f} to {d['high']:.2f})" for n, d in ((name, a), (other, b))]
    floor = f"real from real {a['floor']:.2f}"
    return Verdict(claim, where, f"{'; '.join(told)}; {floor}", holds)


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown."""
    lines = ["| claim | model | measured | holds |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {v.claim} | {v.model} | {v.measured} | {v.holds} |" for v in verdicts])

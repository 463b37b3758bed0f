"""What a run or an earlier diagnosis says of speed, against what is measured now."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mezzotint.doctor import runs
from mezzotint.doctor.finding import Finding, Measure
from mezzotint.errors import InputError

REPORT, METRICS, RECIPE = "doctor.json", "metrics.jsonl", "recipe.toml"
LOADING = 0.3  # share of a training step that goes into loading data
TRAINING = 3.3  # forwards that a training step takes: 2.8 to 3.3 were measured (docs/performance.md)
ELSEWHERE = 3.0  # times that a run took of what its network needs here: another machine may well be half as quick
SLOWED = 1.5  # speed of a run's first quarter over that of its last
SLOWER = 1.2  # of a part against an earlier diagnosis
MATTERS = 0.05  # share of a request below which a part may take what it likes
PARTS = ("text", "codec.decode", "codec.encode", "sampler")  # beside all that begins with "step"


def report_of(trace: Path | None) -> Path | None:
    """The earlier diagnosis that a path means: itself, or the one in its folder."""
    if trace is None:
        return None
    found = trace / REPORT if trace.is_dir() else trace
    return found if found.suffix == ".json" and found.is_file() else None


def regressed(path: Path, now: Sequence[Measure]) -> tuple[list[Finding], list[Measure]]:
    """Every part of a step and a request against an earlier diagnosis, as ratios with intervals.

    Times of two days are not paired. So a whole (a step, the text, the codec) is slower only where its least time now
    is above its greatest then, and its median by more than the machine's own ceiling has lost. Parts of a step are too
    short for that beside other jobs: they say where the loss lies, by their least times, and not whether there is one.
    """
    then, here = _measures(path), {each.name: each for each in now}
    if "step" not in then or "step" not in here:
        raise InputError(f"{path} has no measures of speed: use the doctor.json of a diagnosis with the probe speed")
    timed = [n for n in here if (n.startswith("step") or n in PARTS) and n in then and _least(then[n]) > 0]
    ratios = {name: _ratio(name, here[name], then[name]) for name in timed}
    told = [replace(ratio, name=f"regressed.{name}") for name, ratio in ratios.items()]
    request, lost_by_machine = here["request"].value, _machine(then, here)
    slow = {
        name: ratios[name].value for name in timed
        if "." not in name.removeprefix("codec.") and ratios[name].value >= SLOWER * lost_by_machine
        and (ratios[name].low or 0.0) >= (1 + SLOWER) / 2
        and (name == "step" or here[name].value >= MATTERS * request)
    }  # fmt: skip
    if not slow:
        return [], told
    whole = max(slow, key=lambda name: slow[name])
    where = ""
    if whole == "step":
        lost = {n: _least(here[n]) - _least(then[n]) for n in timed if n.startswith("step.")}
        part = max(lost, key=lambda name: lost[name], default="")
        total = _least(here["step"]) - _least(then["step"])
        if part and lost[part] > 0.3 * total:
            times = _least(here[part]) / _least(then[part])
            where = f", most of it in {part.removeprefix('step.')} ({times:.2f} times)"
    work = [n for n in ("work", "rows", "threads", "weights") if n in then and _moved(then[n], here.get(n))]
    why = "".join(f"; {n} went from {then[n].value:.4g} to {here[n].value:.4g}" for n in work)
    says = f"{whole} takes {slow[whole]:.2f} times as long as in {path.name}{where}{why}"
    do = f"Look at what changed in {whole} since then: adapters, hooks, threads, number format, torch's version."
    return [Finding("speed.regressed", "harmful", says, do, "", slow[whole] / SLOWER, tuple(told))], told


def _least(measure: Measure) -> float:
    return measure.value if measure.low is None else measure.low


def _ratio(name: str, now: Measure, then: Measure) -> Measure:
    """Seconds now over seconds then; from the least now over the greatest then to the other way round."""
    most = [each.value if each.high is None else each.high for each in (now, then)]
    low, high = _least(now) / most[1], most[0] / _least(then)
    return Measure(name, now.value / max(then.value, 1e-9), low, high, f"below {SLOWER:g}", "times")


def _machine(then: Mapping[str, Measure], here: Mapping[str, Measure]) -> float:
    """How many times slower the machine itself is now: its best product and convolution, then over now; never below
    1, since a quicker machine makes nothing slower."""
    ratios = [
        then[name].value / here[name].value
        for name in ("ceiling.matrix", "ceiling.convolution")
        if name in then and name in here and here[name].value > 0
    ]
    return max(1.0, *ratios) if ratios else 1.0


def _moved(then: Measure, now: Measure | None) -> bool:
    return now is not None and abs(now.value - then.value) > 0.02 * abs(then.value)


def _measures(path: Path) -> dict[str, Measure]:
    """What the probe of speed had measured."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        outcome: Any = next(each for each in content["outcomes"] if each["probe"] == "speed")
        rows: list[Any] = (outcome["checked"] or {}).get("measures", [])
        found = [Measure(r["name"], float(r["value"]), r["low"], r["high"], r["bound"], r["unit"]) for r in rows]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration) as error:
        raise InputError(f"{path} is no diagnosis with the probe speed: write one with `mezzotint doctor`") from error
    return {each.name: each for each in found}


def loading(folder: Path, forward: float) -> tuple[list[Finding], list[Measure]]:
    """The speed of a training run by its own records, against `forward` seconds of the network for one image here."""
    records = runs.records(folder / METRICS)
    speeds = [float(r["images_per_second"]) for r in records if r.get("images_per_second")]
    if not speeds:
        return [], []
    speed = statistics.median(speeds)
    told = [Measure("run.images", speed, min(speeds), max(speeds), unit="images/s")]
    found: list[Finding] = []
    batch = _batch(folder)
    shares = [_share(record, batch) for record in records]
    known = [share for share in shares if share is not None]
    if known:
        share = statistics.median(known)
        told.append(
            Measure("run.loading", 100 * share, 100 * min(known), 100 * max(known), f"below {100 * LOADING:g}", "%")
        )
        if share >= LOADING and sum(each >= LOADING / 2 for each in known) >= 0.8 * len(known):
            says = f"loading data takes {100 * share:.0f} % of a training step"
            do = "Keep the images on a faster disk or make them smaller beforehand, and train at the size of the files."
            found.append(Finding("speed.loading", "harmful", says, do, "", share / LOADING, tuple(told)))
        return found, told
    times = 1 / (speed * TRAINING * forward)
    told.append(Measure("run.elsewhere", times, bound=f"below {ELSEWHERE:g}", unit="times"))
    if times >= ELSEWHERE:
        says = (
            f"the run trained {speed:.3g} images a second where its network could compute {speed * times:.3g} here: "
            "most of a step went elsewhere, or the run had a slower machine"
        )
        do = "Watch the machine while it trains: whether processors wait for the disk, for memory or for other jobs."
        also = ("speed.memory", "speed.threads")
        found.append(Finding("speed.loading", "note", says, do, "", times / ELSEWHERE, tuple(told), also))
    quarter = len(speeds) // 4
    if quarter >= 3:
        first, last = statistics.median(speeds[:quarter]), speeds[-quarter:]
        slowed = first / statistics.median(last)
        told.append(Measure("run.slowed", slowed, bound=f"below {SLOWED:g}", unit="times"))
        if slowed >= SLOWED and sum(first / each >= (1 + SLOWED) / 2 for each in last) >= 0.8 * quarter:
            says = f"the run slowed down from {first:.3g} to {statistics.median(last):.3g} images a second"
            do = "Look for what filled up while it trained: memory, the disk, or the machine's other jobs."
            found.append(
                Finding("speed.memory", "note", says, do, "", slowed / SLOWED, tuple(told), ("speed.loading",))
            )
    return found, told


def _share(record: Mapping[str, Any], batch: int | None) -> float | None:
    """Loading's share of a step, where a record tells the seconds of a step that loading took."""
    spent, speed = record.get("loading_seconds"), record.get("images_per_second")
    if spent is None or not speed or batch is None:
        return None
    return min(1.0, float(spent) * float(speed) / batch)


def _batch(folder: Path) -> int | None:
    try:
        return int(tomllib.loads((folder / RECIPE).read_text(encoding="utf-8"))["batch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None

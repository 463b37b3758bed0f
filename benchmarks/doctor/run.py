"""Run the doctor as a classifier over healthy models and seeded faults.

    python benchmarks/doctor/run.py --seed 0 --jobs 2
    python benchmarks/doctor/run.py --seed 0 --verify

A record for each case goes to runs/doctor/results-SEED.jsonl; those that are there are skipped, so a stopped run goes
on. `--verify` does not ask the doctor: it shows how much each fault changes what a model computes and draws. Each
worker has a core of its own and one thread.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch reads them, here and in workers

import argparse
import fnmatch
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from nursery import ROOT, Nest

SCRATCH = ROOT / "scratch"


@dataclass(frozen=True)
class Task:
    seed: int
    fault: str
    model: str
    verify: bool = False
    draw: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.fault, self.model


def tasks(seed: int, faults: str, models: str, each: int, verify: bool, draw: int = 0) -> list[Task]:
    """All cases of the chosen faults and models that are there; `each` models a fault at most, drawn by the seed."""
    from faults import FAULTS
    from patient import there

    found: list[Task] = []
    for name, fault in FAULTS.items():
        able = [model for model in fault.models if matches(model, models) and there(Nest(seed), model)]
        if fault.cause and each and len(able) > each:
            able = sorted(Random(f"{seed}/{name}" + (f"/{draw}" if draw else "")).sample(able, each), key=able.index)
        found += [Task(seed, name, model, verify, draw) for model in able if matches(name, faults)]
    Random(seed + 1000 * draw).shuffle(found)  # so that the time left can be told, and a part of a run is a fair part
    return found


def matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern.strip()) for pattern in patterns.split(","))


def begin(cores: Any) -> None:
    """A core and a thread for this worker; warnings are for people at work with a model."""
    import torch

    core = cores.get()
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process


def drawn(task: Task) -> Random:
    """What decides how grave a fault is, and where."""
    return Random(f"{task.seed}/{task.fault}/{task.model}" + (f"/{task.draw}" if task.draw else ""))


def work(task: Task) -> dict[str, Any]:
    """The record of a case."""
    from faults import FAULTS
    from patient import Unfit, healthy

    fault, begun = FAULTS[task.fault], time.perf_counter()
    record: dict[str, Any] = {
        "seed": task.seed, "model": task.model, "fault": task.fault, "cause": fault.cause, "pain": fault.pain,
    }  # fmt: skip
    SCRATCH.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{task.fault}-{task.model}-", dir=SCRATCH)).resolve()
    mine = os.sched_getaffinity(0)
    try:
        patient = healthy(Nest(task.seed), task.model, scratch)
        if task.verify:
            from verify import verified

            return record | verified(patient, fault, drawn(task))
        patient = fault.seed(patient, drawn(task))
        if patient.crowded:
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        return record | asked(patient)
    except Unfit as reason:
        return record | {"unfit": str(reason)}
    except Exception as error:
        trouble = traceback.format_exc(limit=-4)
        return record | {
            "error": f"{type(error).__name__}: {error}",
            "trace": trouble,
            "seconds": time.perf_counter() - begun,
        }
    finally:
        os.sched_setaffinity(0, mine)
        shutil.rmtree(scratch, ignore_errors=True)


def asked(patient: Any) -> dict[str, Any]:
    """What the doctor says of a patient; a model that cannot be opened is refused with the reason."""
    from mezzotint.doctor.diagnose import diagnose, refused
    from mezzotint.errors import InputError, NotFinite

    begun, worked = time.perf_counter(), time.process_time()
    try:
        found = diagnose(patient.case())
    except NotFinite as reason:
        found = refused(patient.path, reason)
    except InputError as reason:
        return {"refused": str(reason), "ranked": [], "seconds": round(time.perf_counter() - begun, 2)}
    ranked = [
        {"cause": each.cause, "grade": each.grade, "strength": round(each.strength, 3), "says": each.says,
         "follows": found.follows.get(each.cause), "also": list(each.also)}
        for each in found.findings
    ]  # fmt: skip
    probes = {each.probe: round(each.seconds, 2) for each in found.outcomes}
    measures = [
        [each.probe, m.name, m.value, m.low, m.high, m.bound]
        for each in found.outcomes if each.checked for m in each.checked.measures
    ]  # fmt: skip
    why = {each.probe: each.why for each in found.outcomes if each.checked is None}
    took = {"seconds": round(time.perf_counter() - begun, 2), "cpu": round(time.process_time() - worked, 2)}
    return {"ranked": ranked, **took, "probes": probes, "not_checked": why, "measures": measures}


def line(record: dict[str, Any]) -> str:
    """A record for people."""
    what = f"{record['fault']:26} {record['model']:13} "
    for key in ("error", "unfit"):
        if key in record:
            return f"{what}{key}: {record[key][:90]}"
    if "change" in record:
        return f"{what}{record['says']}"
    first = [each["cause"] for each in record["ranked"] if each["grade"] != "note"]
    named = ", ".join(first[:3]) or ("refused" if "refused" in record else "nothing")
    right = (first[:1] == [record["cause"]]) if record["cause"] else not first
    return f"{what}{record['seconds']:6.1f} s  {'ok ' if right else '-- '}{record['cause'] or 'healthy'}: {named}"


def done(path: Path) -> set[tuple[str, str]]:
    records = [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []
    again = ("error", "unfit")  # a model may be there by now
    return {(record["fault"], record["model"]) for record in records if not any(key in record for key in again)}


def records(pool: ProcessPoolExecutor, left: Sequence[Task]) -> Iterator[dict[str, Any]]:
    """The records of all tasks as they come; last, with nothing beside them, those of models that may use all cores."""
    from faults import FAULTS

    alone = [task for task in left if FAULTS[task.fault].cause == "speed.threads"]
    for future in as_completed([pool.submit(work, task) for task in left if task not in alone]):
        yield future.result()
    for task in alone:
        yield pool.submit(work, task).result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="cases at a time")
    parser.add_argument("--draw", type=int, default=0, help="other faults of the same kinds on the same models")
    parser.add_argument("--models", default="*", help="names or patterns, separated by commas")
    parser.add_argument("--faults", default="*", help="the same")
    parser.add_argument("--each", type=int, default=3, help="models a fault at most, drawn by the seed; 0: all")
    parser.add_argument("--verify", action="store_true", help="show what each fault changes, without the doctor")
    parser.add_argument("--out", type=Path, help="instead of runs/doctor/results-SEED.jsonl")
    options = parser.parse_args()
    kind = "verified" if options.verify else "results"
    out = options.out or ROOT / f"{kind}-{options.seed}.jsonl"
    had = done(out)
    every = tasks(options.seed, options.faults, options.models, options.each, options.verify, options.draw)
    left = [task for task in every if task.key not in had]
    print(f"{len(every)} cases, {len(every) - len(left)} of them done, to {out}", file=sys.stderr)
    context = multiprocessing.get_context("spawn")
    cores = context.Manager().Queue()
    for i in range(options.jobs):
        cores.put(sorted(os.sched_getaffinity(0))[i % len(os.sched_getaffinity(0))])
    begun, wrong = time.monotonic(), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, context, begin, (cores,)) as pool, open(out, "a") as stream:
        for count, record in enumerate(records(pool, left), 1):
            wrong += "error" in record
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            spent = time.monotonic() - begun
            rest = spent / count * (len(left) - count)
            print(f"{count}/{len(left)} ({rest / 60:.0f} min left) {line(record)}", file=sys.stderr, flush=True)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())

"""Run the probes on a case and rank what they find."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from mezzotint.doctor.case import Case
from mezzotint.doctor.causes import ranked
from mezzotint.doctor.finding import Checked, Diagnosis, Finding, NotChecked, Outcome
from mezzotint.doctor.probes import PROBES, probe
from mezzotint.errors import InputError, NotFinite


def diagnose(case: Case, names: Sequence[str] = PROBES) -> Diagnosis:
    """What is wrong with a model, the cause to mend first in front.

    A probe that lacks what it needs says so; one that meets input which cannot be used says that.
    """
    began = time.perf_counter()
    outcomes: list[Outcome] = []
    for name in names:
        case.say(name)
        start = time.perf_counter()
        try:
            checked, why = probe(name)(case), ""
        except (NotChecked, InputError) as reason:
            checked, why = None, str(reason)
        outcomes.append(Outcome(name, checked, why, time.perf_counter() - start))
    findings, follows = ranked(f for each in outcomes if each.checked for f in each.checked.findings)
    contract = case.bare.contract
    facts = {
        "family": contract.family,
        "process": contract.process.to_dict(),
        "sampler": contract.sampling.sampler,
        "steps": contract.sampling.steps,
        "guidance": contract.guidance.scale,
        "size": list(contract.size),
    }
    settings = {"images": 0 if case.data is None else len(case.data), "seed": case.seed}
    return Diagnosis(
        str(case.path), facts, findings, follows, tuple(outcomes), time.perf_counter() - began, settings
    )  # fmt: skip


def refused(path: Path, reason: NotFinite) -> Diagnosis:
    """The diagnosis of a model whose weights are not finite: nothing else can be looked at."""
    finding = Finding(
        "weights.finite", "broken", str(reason).rpartition(":")[0],
        "Use a checkpoint from before this happened, or the original file.", strength=10.0,
    )  # fmt: skip
    outcome = Outcome("weights", Checked((finding,)))
    rest = tuple(Outcome(name, None, "the model cannot be opened") for name in PROBES if name != "weights")
    return Diagnosis(str(path), {}, (finding,), {}, (outcome, *rest))

"""Parts that do not belong together, as loading them says: every refusal that was let pass to look further."""

from __future__ import annotations

from mezzotint.doctor import trials
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, Finding, Measure, NotChecked
from mezzotint.errors import InputError

# The beginning of the fact that differs -> the cause that it names.
NAMED = {
    "latent": "latent.codec",
    "text": "text.encoder",
    "weights": "weights.changed",
    "dtype": "speed.dtype",
}


def examine(case: Case) -> Checked:
    """A finding for each kind of fact that differs between two of the model's files.

    A contract that speaks of other weights and is wrong about how these are read belongs to another model.
    """
    kinds: dict[str, list[str]] = {}
    for entry in case.mismatches:
        kinds.setdefault(NAMED.get(entry.partition(" ")[0].partition(".")[0], "files.parts"), []).append(entry)
    if "weights.changed" in kinds and "files.parts" not in kinds and _misread(case):
        kinds["files.parts"] = kinds.pop("weights.changed")
    findings = [
        Finding(
            cause, "note" if cause == "speed.dtype" else "broken",
            f"its files contradict each other: {'; '.join(entries[:3])}",
            "Restore the part that the contract speaks of; what was changed on purpose needs a contract of its own.",
            strength=10.0 * len(entries),
        )
        for cause, entries in kinds.items()
    ]  # fmt: skip
    count = Measure("facts that differ between files", len(case.mismatches), bound="none")
    return Checked(tuple(findings), (count,))


def _misread(case: Case) -> bool:
    """Whether the network says that it is read otherwise than it was trained."""
    try:
        return trials.explanation(case) is not None
    except (NotChecked, InputError):
        return False

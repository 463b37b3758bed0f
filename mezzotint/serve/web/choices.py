"""What a person may choose for each model: its classes, samplers, and what it does where nobody chooses."""

from __future__ import annotations

from typing import Any

from mezzotint.errors import InputError
from mezzotint.families.model import Model
from mezzotint.families.settings import settle
from mezzotint.request import Request
from mezzotint.sampling import SAMPLERS
from mezzotint.serve.server import Server


def choices(server: Server) -> dict[str, dict[str, Any]]:
    """By the name of each model."""
    return {name: chosen(desk.pipeline.model, sorted(desk.files)) for name, desk in server.desks.items()}


def chosen(model: Model, adapters: list[str]) -> dict[str, Any]:
    contract = model.contract
    able = contract.guidance.embedded or (contract.guidance.dropout > 0 and not contract.guidance.distilled)
    return {
        "family": contract.family, "size": contract.size, "adapters": adapters, "text": model.text is not None,
        "classes": list(contract.classes.names) if contract.classes else [],
        "unlabelled": contract.classes is None or contract.classes.null is not None,
        "samplers": [name for name in SAMPLERS if fits(model, name)],
        "sampler": contract.sampling.sampler, "steps": contract.sampling.steps,
        "guidance": contract.guidance.scale, "guided": able,
        "negative": able and not contract.guidance.distilled and model.text is not None,
    }  # fmt: skip


def fits(model: Model, sampler: str) -> bool:
    """Whether a sampler can walk this model's process."""
    try:
        settle(model, Request(sampler=sampler, guidance=1.0))
    except InputError:
        return False
    return True

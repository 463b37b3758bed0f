"""Whether a request may be drawn at all: its words, its class, the licences of what draws it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NoReturn

from mezzotint.contract import read_adapter_contract
from mezzotint.errors import Refused
from mezzotint.families.adapt import WORDS, contract_of
from mezzotint.families.model import Model
from mezzotint.governance import licences, prompts
from mezzotint.governance.licences import Gate
from mezzotint.pipeline.house import House
from mezzotint.request import Request


def admitted(house: House, model: Model, request: Request) -> Gate:
    """What the licences ask for; Refused where a rule of the policy says no, which is written into the log."""
    verdict = prompts.judge(house.policy.prompts, request.prompt, request.negative, class_name(model, request.label))
    if not verdict.allowed:
        refuse(house, model, request, verdict.rule, verdict.says)
    gate = licences.gate(house.policy.licence, stated(model, request))
    if not gate.allowed:
        says = f"{gate.conflicts[0]}, and the policy says commercial use"
        refuse(house, model, request, "licence.forbidden", says)
    return gate


def refuse(house: House, model: Model, request: Request, rule: str, says: str) -> NoReturn:
    """Write the refusal down and raise it; what was asked stands in the log by its digest alone."""
    asked = {"prompt_sha256": digest(request.prompt), "label": class_name(model, request.label), "seed": request.seed}
    house.note("refused", {"rule": rule, "says": says, "model": model.contract.weights, "asked": asked})
    raise Refused(rule, f"refused by the policy '{house.policy.name}', {rule}: {says}.")


def stated(model: Model, request: Request) -> dict[str, str | None]:
    """The licences of all parts that draw, by what they are of."""
    own = model.contract.licence
    found: dict[str, str | None] = {"the model": own.weights}
    if own.data is not None:
        found["its data"] = own.data
    added = {Path(path): contract_of(Path(path)) for path, _ in request.lora}
    added |= {Path(path): contract_of(Path(path), WORDS, "embedding") for path in request.embedding}
    added |= {Path(path): read_adapter_contract(Path(path)) for path, _, _ in request.control}
    for path, contract in added.items():
        found[path.name] = None if contract is None else contract.licence.weights
        if contract is not None and contract.licence.data is not None:
            found[f"the data of {path.name}"] = contract.licence.data
    return found


def class_name(model: Model, label: int | str | None) -> str:
    """The name of the class that is asked for, empty for none."""
    classes = model.contract.classes
    if label is None or classes is None:
        return ""
    if isinstance(label, str):
        return label
    return classes.names[label] if 0 <= label < len(classes.names) else ""


def digest(text: str) -> str:
    """SHA-256 of words."""
    return hashlib.sha256(text.encode()).hexdigest()


def facts_of(gate: Gate) -> dict[str, Any]:
    """A gate as plain data, without what is empty."""
    return {key: list(value) for key, value in (("asks", gate.asks), ("conflicts", gate.conflicts)) if value}

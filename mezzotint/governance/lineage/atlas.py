"""The run as Apache Atlas entities, which Microsoft Purview's bulk API takes: the user posts the file himself."""

from __future__ import annotations

from typing import Any

from mezzotint.governance.lineage.events import NAMESPACE
from mezzotint.governance.lineage.trained import Trained


def entities(facts: Trained, weights: str) -> dict[str, Any]:
    """The body of POST /api/atlas/v2/entity/bulk: data sets and the process that joins them."""
    given = [_data(-1, "dataset", str(facts.data["digest"]), f"{len(facts.data['files'])} training files")]
    if facts.base:
        given.append(_data(-2, "model", facts.base, "weights that the training started from"))
    made = _data(-3, "model", weights, f"{facts.kind} {facts.name}")
    process = {
        "typeName": "Process",
        "guid": "-4",
        "attributes": {
            "qualifiedName": f"{NAMESPACE}://train/{weights}@{facts.started}",
            "name": f"train {facts.method}",
            "description": f"from {facts.started} to {facts.ended}, seed {facts.recipe.get('seed')}",
            "inputs": [_reference(each) for each in given],
            "outputs": [_reference(made)],
        },
    }
    return {"entities": [*given, made, process]}


def _data(guid: int, kind: str, digest: str, says: str) -> dict[str, Any]:
    return {
        "typeName": "DataSet",
        "guid": str(guid),
        "attributes": {
            "qualifiedName": f"{NAMESPACE}://{kind}/{digest}", "name": f"{kind} {digest[:16]}", "description": says,
        },
    }  # fmt: skip


def _reference(entity: dict[str, Any]) -> dict[str, Any]:
    return {"typeName": entity["typeName"], "guid": entity["guid"]}

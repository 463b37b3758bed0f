"""The bill of materials of a model (CycloneDX 1.6): the model, its data set, its base, licences and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from mezzotint.extras import need
from mezzotint.governance.lineage.trained import Trained


def bom(facts: Trained, weights: Mapping[str, str]) -> dict[str, Any]:
    """As JSON data; `weights` are the weights' files with their SHA-256.

    The library knows no model card and no data component yet, so these two are written into its JSON.
    """
    need("cyclonedx")
    lib, kinds = _library(), _library().ComponentType
    model = _component(facts.name, kinds.MACHINE_LEARNING_MODEL, facts.licence, "")
    model.properties = [lib.Property(name=f"mezzotint:sha256:{name}", value=digest) for name, digest in weights.items()]
    if facts.base:
        base = _component("base", kinds.MACHINE_LEARNING_MODEL, facts.base_licence, facts.base)
        model.pedigree = lib.Pedigree(ancestors=[base])
    data = _component("training data", kinds.DATA, facts.data_licence, str(facts.data["digest"]))
    made = lib.Bom(components=[data])
    made.metadata.component = model
    made.register_dependency(model, [data])
    content: dict[str, Any] = json.loads(lib.JsonV1Dot6(made).output_as_string())
    card = content["metadata"]["component"]
    card["modelCard"] = {
        "modelParameters": {
            "approach": {"type": "supervised"}, "task": "image generation", "architectureFamily": "diffusion",
            "modelArchitecture": str(facts.contract.get("family", "")), "datasets": [{"ref": str(data.bom_ref)}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [{"type": name, "value": f"{value:g}"} for name, value in facts.measures.items()]
        },
    }  # fmt: skip
    for component in content["components"]:
        if component["type"] == "data":
            count = f"{len(facts.data['files'])} files, each with its digest in dataset.json"
            component["data"] = [{"type": "dataset", "name": "training data", "description": count}]
    return content


def problems(content: Mapping[str, Any]) -> str | None:
    """What the schema finds wrong, None for nothing."""
    need("cyclonedx")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    found = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content))
    return None if found is None else str(getattr(found, "data", found))[:300]


def _component(name: str, kind: Any, licence: str | None, digest: str) -> Any:
    lib = _library()
    return lib.Component(
        name=name, type=kind, bom_ref=name,
        licenses=[lib.DisjunctiveLicense(name=licence)] if licence else [],
        hashes=[lib.HashType(alg=lib.HashAlgorithm.SHA_256, content=digest)] if digest else [],
    )  # fmt: skip


def _library() -> Any:
    """The classes by name: their decorators hide their parameters from type checkers."""
    from cyclonedx.model import HashAlgorithm, HashType, Property
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output.json import JsonV1Dot6

    classes = (
        Bom,
        Component,
        ComponentType,
        DisjunctiveLicense,
        HashAlgorithm,
        HashType,
        JsonV1Dot6,
        Pedigree,
        Property,
    )
    return SimpleNamespace(**{each.__name__: each for each in classes})

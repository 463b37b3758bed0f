"""What a finished run writes down of itself: where the model comes from, signed, beside the model."""

from __future__ import annotations

import json
import subprocess
import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from mezzotint.checkpoints.tensors import read_metadata
from mezzotint.contract import HEADER
from mezzotint.data import manifest
from mezzotint.data import metadata as rows
from mezzotint.errors import InputError
from mezzotint.governance import lineage
from mezzotint.governance.lineage import Trained
from mezzotint.training import metrics
from mezzotint.training.methods import Method
from mezzotint.training.tables import Recipe

PACKAGES = ("mezzotint", "torch", "numpy", "safetensors", "accelerate", "peft", "transformers")
KINDS = {"lora": "LoRA", "textual-inversion": "embedding", "controlnet": "control network", "vae": "autoencoder",
         "patch-pca": "linear codec"}  # fmt: skip


def now() -> str:
    """UTC as ISO text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def attest(plan: Recipe, job: Method, model: Path, started: str, measures: Mapping[str, float]) -> None:
    """Write model/lineage and tell the servers that the recipe names.

    Where that fails a warning says so, for the model itself is there and whole.
    """
    table = plan.lineage
    if not table.write:
        return
    try:
        known = facts(plan, job, model, started, measures)
        weights = lineage.written(model, known, Path(table.certificates) if table.certificates else None)
    except (InputError, OSError) as error:
        warnings.warn(f"the model is finished, but its lineage could not be written: {error}", stacklevel=2)
        return
    try:
        if table.server:
            lineage.events.send(lineage.events.events(known, weights), table.server)
        if table.mlflow:
            lineage.registry.record(model, known, weights, metrics.read(Path(plan.out)), table.mlflow)
    except InputError as error:
        warnings.warn(f"the model and its lineage are written, but {error}", stacklevel=2)


def facts(plan: Recipe, job: Method, model: Path, started: str, measures: Mapping[str, float]) -> Trained:
    """Everything that is known at the end; InputError where the training images were changed meanwhile."""
    folder = Path(plan.data.folder)
    files = manifest.manifest(folder, rows.read(folder))
    if files.digest != job.digests["data"]:
        raise InputError(f"the images in {folder} were changed while the run went on")
    contract = contract_of(model)
    kind = KINDS.get(plan.method, "LoRA" if plan.lora is not None else "model")
    return Trained(
        name=Path(plan.out).name, method=plan.method, kind=kind, recipe=plan.model_dump(mode="json"),
        contract=contract, data={**files.to_dict(), "folder": str(folder.resolve())},
        base=job.digests.get("base") or (contract.get("lineage") or {}).get("base"),
        licence=job.licensed.own.weights, data_licence=job.licensed.own.data, base_licence=job.licensed.base,
        started=started, ended=now(), software=software(), commit=commit(), measures=dict(measures),
    )  # fmt: skip


def contract_of(model: Path) -> dict[str, Any]:
    """The contract that the finished folder holds, or that stands in the header of its one file; {} for none."""
    if (model / "contract.json").is_file():
        return json.loads((model / "contract.json").read_bytes())
    for file in sorted(model.glob("*.safetensors")):
        if said := read_metadata(file).get(HEADER):
            return json.loads(said)
    return {}


def software() -> dict[str, str]:
    """The versions of what trained."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that this package runs from; None where it is no checkout."""
    at = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=at, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

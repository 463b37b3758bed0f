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
from mezzotint.training.tables import Recipe

PACKAGES = ("mezzotint", "torch", "numpy", "safetensors", "accelerate", "peft", "transformers")
KINDS = {"lora": "LoRA", "textual-inversion": "embedding", "controlnet": "control network", "vae": "autoencoder",
         "patch-pca": "linear codec"}  # fmt: skip


def now() -> str:
    """UTC as ISO text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def attest(plan: Recipe, digests: Mapping[str, str], model: Path, started: str, measures: Mapping[str, float]) -> None:
    """Write model/lineage; where that fails a warning says so, for the model itself is there and whole."""
    if not plan.lineage.write:
        return
    certificates = Path(plan.lineage.certificates) if plan.lineage.certificates else None
    try:
        lineage.written(model, facts(plan, digests, model, started, measures), certificates, plan.lineage.server)
    except (InputError, OSError) as error:
        warnings.warn(f"the model is finished, but its lineage could not be written: {error}", stacklevel=2)


def facts(
    plan: Recipe, digests: Mapping[str, str], model: Path, started: str, measures: Mapping[str, float]
) -> Trained:
    """Everything that is known at the end; InputError where the training images were changed meanwhile."""
    folder = Path(plan.data.folder)
    files = manifest.manifest(folder, rows.read(folder))
    if files.digest != digests["data"]:
        raise InputError(f"the images in {folder} were changed while the run went on")
    contract = contract_of(model)
    own = contract.get("licence") or {}
    kind = KINDS.get(plan.method, "LoRA" if plan.lora is not None else "model")
    return Trained(
        name=Path(plan.out).name, method=plan.method, kind=kind, recipe=plan.model_dump(mode="json"),
        contract=contract, data={**files.to_dict(), "folder": str(folder.resolve())},
        base=digests.get("base") or (contract.get("lineage") or {}).get("base"),
        licence=plan.licence or own.get("weights") or "not stated",
        data_licence=plan.data_licence or own.get("data"), base_licence=own.get("weights"),
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

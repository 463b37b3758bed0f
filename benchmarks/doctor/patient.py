"""What the benchmark gives the doctor: a healthy model's files and options, in a copy that a fault may change.

Faults change files as people and tools do. Where a tool would not notice, the digests in contract.json are written anew
(`resealed`), since otherwise opening the model names the fault already.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import data
import torch
from nursery import Nest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint import files
from mezzotint.contract import FILE, LatentFacts, TextFacts, read_contract
from mezzotint.data import metadata, solar_cells
from mezzotint.digests import tensors_digest
from mezzotint.doctor.case import Case, opened
from mezzotint.families import native

STARTER = Path("models/solar-cells")
CELLS = data.OUT / "cells"  # of the starter's own kind: 128x128 with its own classes
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRAINED = {"sd1-lora-a": "ruled", "sd1-lora-b": "barred", "sd1-tuned": "bright-poly", "sd1-memorised": "few"}


class Unfit(Exception):
    """Raised by a fault that cannot be seeded into a model; the message says why."""


@dataclass(frozen=True)
class Patient:
    """The arguments of `opened`, and the folder in which this case may write."""

    name: str
    nest: Nest
    scratch: Path
    path: Path
    data: Path | None = None
    base: Path | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    cache: Path | None = None
    trace: Path | None = None
    dtype: torch.dtype = torch.float32
    count: int = 24
    seed: int = 0
    change: Callable[[Case], Case] = field(default=lambda case: case)  # what can only be seeded in memory
    crowded: bool = False  # several cores, of which one thread is used

    @property
    def is_native(self) -> bool:
        return (self.path / FILE).is_file()

    @property
    def contract(self) -> dict[str, Any]:
        return json.loads((self.path / FILE).read_text())

    def case(self) -> Case:
        """As the doctor would open it; InputError where it cannot be opened."""
        case = opened(
            self.path, data=self.data, base=self.base, lora=self.lora, cache=self.cache, trace=self.trace,
            count=self.count, seed=self.seed, dtype=self.dtype,
        )  # fmt: skip
        return self.change(case)


# Healthy patients.


def healthy(nest: Nest, name: str, scratch: Path) -> Patient:
    """A model of the nursery, or the starter, in a copy of its own, with the images that it was trained on."""
    if name == "solar-cells":
        if not (CELLS / "dataset.json").is_file():
            solar_cells.export(CELLS)
        return Patient(name, nest, scratch, copied(STARTER, scratch / "model"), CELLS / "train")
    images = Path(nest.data(TRAINED.get(name, "train")))
    base = nest.model("sd1-epsilon")
    if name.startswith("sd1-lora"):
        adapter = copied(nest.model(name), scratch / "adapter") / "kohya.safetensors"
        return Patient(name, nest, scratch, copied(base, scratch / "model"), images, lora=((adapter, 1.0),))
    found = Patient(name, nest, scratch, copied(nest.model(name), scratch / "model"), images)
    if name in ("sd1-tuned", "sd1-memorised", "sd1-lcm"):
        found = replace(found, base=base)
    if name in ("unet-zsnr", "dit-clean"):  # drawn from their last timestep on, which is noise (Lin et al. 2023)
        contract(found, lambda facts: facts["sampling"].update(spacing="trailing"))
    return found


def there(nest: Nest, name: str) -> bool:
    """Whether a model is finished."""
    return STARTER.is_dir() if name == "solar-cells" else nest.model(name).is_dir()


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder or a file that may be changed."""
    if not source.exists():
        raise Unfit(f"{source} is not there")
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("tensorboard", ".lock"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    return target


def traced(patient: Patient) -> Patient:
    """The patient with a copy of its training run."""
    return replace(patient, trace=copied(patient.nest.run(patient.name), patient.scratch / "run"))


# Edits.


def uniform(rng: Random, low: float, high: float) -> float:
    """Even in the logarithm between two positive numbers."""
    return low * (high / low) ** rng.random()


def generator(rng: Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(60))


def settings(path: Path, **changes: Any) -> dict[str, Any]:
    """Change keys of a JSON file; a key of value None goes."""
    now = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in now.items() if not (key in changes and value is None)}
    files.write_json(path, kept)
    return kept


def scheduler(patient: Patient, **changes: Any) -> None:
    settings(patient.path / "scheduler" / "scheduler_config.json", **changes)


def contract(patient: Patient, change: Callable[[dict[str, Any]], object]) -> None:
    """Let `change` edit the facts of contract.json in place."""
    facts = patient.contract
    change(facts)
    files.write_json(patient.path / FILE, facts)


def part(path: Path) -> Path:
    """The folder of the backbone."""
    return path / ("transformer" if (path / "transformer").is_dir() else "unet")


@contextmanager
def tensors(file: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file in float32, to be changed in the dictionary; they are stored in their own dtype."""
    with safe_open(file, "pt") as stored:
        said = stored.metadata()
    found = load_file(file)
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    wide = {name: t.float() if t.is_floating_point() else t for name, t in found.items()}
    yield wide
    save_file({name: t.to(kinds.get(name, t.dtype)).contiguous() for name, t in wide.items()}, file, said)


@contextmanager
def backbone(patient: Patient, sealed: bool = True) -> Iterator[dict[str, Tensor]]:
    """The backbone's tensors; the contract's digest is written anew unless the fault is that it was not."""
    with tensors(part(patient.path) / WEIGHTS) as found:
        yield found
    if sealed:
        resealed(patient)


@contextmanager
def autoencoder(patient: Patient, sealed: bool = True) -> Iterator[dict[str, Tensor]]:
    with tensors(patient.path / "vae" / WEIGHTS) as found:
        yield found
    if sealed:
        resealed(patient)


def resealed(patient: Patient) -> None:
    """Write the digests of all parts into contract.json as they are now, as a tool that made the change would."""
    if not patient.is_native:
        return
    facts = patient.contract
    weights = load_file(part(patient.path) / WEIGHTS)
    facts["weights"] = tensors_digest(weights)
    codec = native.read_autoencoder(patient.path / "vae", LatentFacts.model_validate(facts["latent"]).space())
    if facts["latent"]["codec"] not in codec.decodes:
        facts["latent"]["codec"] = codec.digest()
    text = native.read_text(patient.path, read_contract(patient.path))
    if text is not None:
        facts["text"] = TextFacts.of(text).model_dump(mode="json")
    files.write_json(patient.path / FILE, facts)


def rows(patient: Patient, change: Callable[[list[dict[str, Any]]], object], count: int | None = None) -> Patient:
    """The patient with a folder of its own data of which `change` edits the lines in place; `count` images of it."""
    assert patient.data is not None
    lines = metadata.rows(patient.data)
    if count is not None and count < len(lines):
        lines = [lines[i * len(lines) // count] for i in range(count)]
    out = patient.scratch / "data"
    for line in lines:
        copied(patient.data / line["file_name"], out / line["file_name"])
    change(lines)
    metadata.write(out, lines)
    return replace(patient, data=out)

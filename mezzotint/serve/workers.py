"""The models of a server and who draws with them, opened alike in the server's process and in workers elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mezzotint.batching import Batcher
from mezzotint.errors import InputError
from mezzotint.families import load
from mezzotint.families.devices import device_of
from mezzotint.pipeline import pipeline
from mezzotint.plan import calibrate
from mezzotint.serve.asked import Asked
from mezzotint.serve.crew import Counts, Crew, Desk
from mezzotint.serve.log import logged
from mezzotint.serve.prices import Prices
from mezzotint.serve.store import Store


@dataclass(frozen=True)
class Models:
    """What a server draws with, as plain data."""

    places: Mapping[str, Path]
    adapters: Mapping[str, Path]
    policy: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    batch: int = 16
    price: float | None = None  # of an hour
    side: int = 128  # pixels of a preview

    def desks(self) -> dict[str, Desk]:
        """The models, opened; InputError for one that cannot be."""
        for name, path in (*self.places.items(), *self.adapters.items()):
            if not path.exists():
                raise InputError(f"{name}: no such file or folder: {path}")
        costs = {name: self._cost(path) for name, path in self.places.items()}
        desks: dict[str, Desk] = {}
        for name, path in self.places.items():
            model = load(path, device_of(self.device), getattr(torch, self.dtype))
            made = pipeline(model, self.policy)
            batcher = Batcher(made.model.backbone, self.batch)
            desks[name] = Desk(made, batcher, self.adapters, costs[name], self.side)
        return desks

    def _cost(self, path: Path) -> Callable[[Asked], float | None]:
        """What requests to a model cost, where the machine has a price; InputError where it was not measured."""
        if self.price is None:
            return lambda asked: None
        if calibrate.kept(self.device) is None:
            raise InputError(
                f"--price-per-hour: {self.device} was not measured yet: run `mezzotint plan --calibrate` once."
            )
        return Prices(path, self.dtype, self.device, self.price).of


class Hands:
    """Those who draw, in a process of their own, for a store that others fill."""

    def __init__(self, models: Models, db: str, hands: int) -> None:
        logged()
        self.desks, self.store = models.desks(), Store(db)
        self.crew = Crew(self.store, self.desks, hands)

    def counts(self) -> Counts:
        return self.crew.counts()

    def close(self, patience: float) -> bool:
        """Take no more, and end what is begun; whether it ended in time."""
        ended = self.crew.close(patience)
        if ended:
            self.store.close()
        return ended

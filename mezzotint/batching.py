"""One network for many runs at a time: what they ask at each step is answered in one batch.

A run asks its backbone through a `Batcher` instead of directly and is otherwise an ordinary run in a thread of its own:
its sampler, steps, guidance and seed are nobody else's business. Whenever all runs that are walking wait for an answer,
what fits together is computed as one batch; so runs enter and leave at any step, and a run of twice the evaluations a
step (Heun) holds nobody up. A row depends on its own run alone, up to float rounding.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.adapters.rows import Joint, joint
from mezzotint.conditioning import TENSORS, Conditioning, stack
from mezzotint.families.model import Network

KEPT = 8  # networks for a set of adapters that are kept


@dataclass(eq=False)
class Ask:
    """What one run waits for."""

    network: nn.Module
    x: Tensor
    t: Tensor
    conditioning: Conditioning
    ready: threading.Event = field(default_factory=threading.Event)
    answer: Tensor | None = None
    trouble: BaseException | None = None

    def shape(self, base: nn.Module) -> Hashable:
        """What the asks of one batch must agree in; networks but the base, with adapters or not, stay to themselves."""
        own = None if type(self.network) is type(base) else self.network
        steers = [getattr(self.conditioning, name) for name in TENSORS]
        sizes = [tuple(part.shape[1:] for part in (s if isinstance(s, tuple) else (s,))) if s is not None else None
                 for s in steers]  # fmt: skip
        return own, self.x.shape[1:], self.x.dtype, self.x.device, tuple(sizes), self.conditioning.skip


class Batcher:
    """Answers the runs of one base network, `most` rows at a time, on a thread of its own; `close` ends it."""

    def __init__(self, base: nn.Module, most: int = 16) -> None:
        self.base, self.most = base, most
        self.calls = self.rows = 0  # so far
        self.walking = 0  # runs that are between their first ask and their last
        self._asks: list[Ask] = []
        self._joints: dict[tuple[nn.Module, ...], Joint[nn.Module]] = {}
        self._open = True
        self._turn = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @contextmanager
    def __call__(self, network: nn.Module) -> Iterator[Network]:
        """The base, or the base with adapters, as a run may ask it for the length of the block."""
        with self._turn:
            if not self._open:
                raise RuntimeError("the batcher is closed")
            self.walking += 1

        def ask(x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            mine = Ask(network, x, t, conditioning)
            with self._turn:
                self._asks.append(mine)
                self._turn.notify_all()
            mine.ready.wait()
            if mine.trouble is not None:
                raise mine.trouble
            assert mine.answer is not None
            return mine.answer

        try:
            yield ask
        finally:
            with self._turn:
                self.walking -= 1
                self._turn.notify_all()

    def close(self) -> None:
        """Answer what is asked and end the thread."""
        with self._turn:
            self._open = False
            self._turn.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: (self._asks and len(self._asks) >= self.walking) or self._done())
                if self._done():
                    return
                asks, self._asks = self._asks, []
            for group in grouped(asks, self.base, self.most):
                self._answer(group)

    def _done(self) -> bool:
        return not self._open and not self._asks and not self.walking

    @torch.inference_mode()
    def _answer(self, asks: Sequence[Ask]) -> None:
        counts = [len(ask.x) for ask in asks]
        try:
            network = self._network([ask.network for ask in asks], counts)
            rows = [ask.x for ask in asks], [ask.t for ask in asks]
            x, t = (parts[0] if len(asks) == 1 else torch.cat(parts) for parts in rows)
            steers = [ask.conditioning for ask in asks]
            steer = steers[0] if len(asks) == 1 else _stacked(steers)
            answers: Sequence[Any] = network(x, t, steer).split(counts)
            for ask, answer in zip(asks, answers, strict=True):
                ask.answer = answer
        except BaseException as trouble:  # the runs that wait for it say so
            for ask in asks:
                ask.trouble = trouble
        self.calls, self.rows = self.calls + 1, self.rows + sum(counts)
        for ask in asks:
            ask.ready.set()

    def _network(self, networks: Sequence[nn.Module], counts: Sequence[int]) -> nn.Module:
        """The one network of all asks, or the base with each ask's adapters on its rows."""
        distinct = tuple(dict.fromkeys(networks))
        if len(distinct) == 1:
            return distinct[0]
        if distinct not in self._joints:
            while len(self._joints) >= KEPT:
                self._joints.pop(next(iter(self._joints)))
            self._joints[distinct] = joint(self.base, distinct)
        found = self._joints[distinct]
        found.place([distinct.index(network) for network in networks], counts)
        return found.network


def grouped(asks: Sequence[Ask], base: nn.Module, most: int) -> list[list[Ask]]:
    """Asks that can be one batch, in the order in which they came, `most` rows or a single ask in each."""
    groups: list[list[Ask]] = []
    last: dict[Hashable, list[Ask]] = {}
    for ask in asks:
        shape = ask.shape(base)
        group = last.get(shape)
        if group is None or sum(len(other.x) for other in group) + len(ask.x) > most:
            group = last[shape] = []
            groups.append(group)
        group.append(ask)
    return groups


def _stacked(steers: list[Conditioning]) -> Conditioning:
    return replace(stack(steers), skip=steers[0].skip)

"""What others see of it: work spread over workers, or workers that stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from mezzotint.cluster import joining
from mezzotint.cluster.workers import Crew

Piece = TypeVar("Piece")
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Cluster:
    """So many workers, on a cluster of Ray that is there, or on this machine for as long as they are needed.

    What they build and work on travels by pickle; where it names files, all machines must have them in the same place.
    """

    workers: int = 2
    address: str | None = None  # HOST:PORT, or auto for the cluster that this machine belongs to; None: this machine
    gpus: int = 0  # of each worker

    def joined(self) -> AbstractContextManager[Any]:
        """Be on the cluster for the length of the block, in which the same one serves several times."""
        return joining.joined(self.address, self.workers)

    def spread(
        self, build: Callable[[], Callable[[Piece], Found]], pieces: Sequence[Piece], took: Callable[[Found], None]
    ) -> None:
        """Give pieces of work to workers in turn; `took` gets what comes of each, in the order in which they end.

        A worker calls `build` once, and what that returns with each piece. A piece whose worker was lost is given to
        another. What the work itself raises is raised here, and ends all of it.
        """
        with self.joined() as ray:
            crew = Crew(ray, build, self.workers, self.gpus)
            try:
                crew.spread(pieces, took)
            finally:
                crew.dismiss()

    @contextmanager
    def standing(self, build: Callable[[], Any]) -> Iterator[Callable[..., list[Any]]]:
        """Workers that hold what `build` makes for the length of the block, and make it anew where one was lost.

        The block gets a function that asks all of them: seconds to wait, the name of a method and its arguments; what
        each says, None for one that does not answer.
        """
        with self.joined() as ray:
            crew = Crew(ray, build, self.workers, self.gpus, restarts=-1)
            try:
                crew.begin()
                yield crew.ask
            finally:
                crew.dismiss()

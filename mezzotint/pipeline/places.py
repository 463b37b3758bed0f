"""Where the parts of a chain are looked for, and what is found on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.errors import InputError
from mezzotint.governance import certificates
from mezzotint.governance.hop import Hop

if TYPE_CHECKING:
    from mezzotint.families.model import Model


@dataclass(frozen=True, slots=True)
class Places:
    """Where parts may be looked for; what is None or empty is taken from the log or from this user's own folder."""

    model: Path | None = None
    adapters: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    roots: tuple[Path, ...] = ()  # certificates to trust
    log: Path | None = None
    key: Path | None = None  # of the watermark
    loaded: Model | None = None  # the model with its digests, where somebody has it in memory


@dataclass(slots=True)
class Chain:
    """What was found on the way back."""

    file: Path
    hops: list[Hop] = field(default_factory=list[Hop])
    record: Mapping[str, Any] | None = None  # public, from the credentials or the log

    @property
    def holds(self) -> bool:
        """Whether something vouches for the file, and nothing on the way is broken."""
        return self.record is not None and not any(hop.holds is False for hop in self.hops)


def trusted(places: Places) -> tuple[Path, ...]:
    """The root certificates to trust: those given, else this user's own where there is one."""
    for root in places.roots:
        if not root.is_file():
            raise InputError(f"no such certificate: {root}")
    own = certificates.folder_of(None) / "root.pem"
    return places.roots or ((own,) if own.is_file() else ())

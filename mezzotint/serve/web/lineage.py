"""Where a picture of the server comes from, walked with the model that is in memory."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from mezzotint.pipeline import chain as chains
from mezzotint.pipeline.page import near, trained_on
from mezzotint.pipeline.places import Chain, Places
from mezzotint.serve.crew import Desk
from mezzotint.serve.tables import Picture

FRESH, KEPT = 300.0, 64  # seconds and chains that are kept: walking one may take a run of the network
_known: OrderedDict[str, tuple[float, Chain]] = OrderedDict()
_one = threading.Lock()  # a walk at a time: it computes beside those who draw


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a chain as it is shown."""

    what: str
    state: str  # yes, no, open
    says: str
    digest: str
    place: str
    pictures: list[tuple[str, str]]
    files: int


def walked(picture: Picture, desk: Desk) -> Chain:
    """The chain of a picture; one that was walked lately is not walked again."""
    with _one:
        when, chain = _known.get(picture.sha256, (-FRESH, None))
        if chain is None or time.monotonic() - when > FRESH:
            model = desk.pipeline.model
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"picture.{picture.media.rpartition('/')[2]}"
                file.write_bytes(picture.data)
                places = Places(model.path, tuple(desk.files.values()), log=desk.pipeline.house.log, loaded=model)
                chain = chains.of_picture(file, places)
            _known[picture.sha256] = time.monotonic(), chain
            while len(_known) > KEPT:
                _known.popitem(last=False)
        return chain


def steps(chain: Chain, everything: bool) -> list[Step]:
    """What is shown of a chain; places of this machine and training images to those alone who may see everything."""
    found: list[Step] = []
    for hop in chain.hops:
        own = hop.place == str(chain.file)
        says = hop.says if everything or not hop.place else hop.says.replace(hop.place, Path(hop.place).name)
        found.append(Step(
            hop.what, {True: "yes", False: "no", None: "open"}[hop.holds], says, hop.digest,
            near(hop.place) if everything and hop.place and not own else "",
            trained_on(hop) if everything else [], len(hop.facts.get("files", ())),
        ))  # fmt: skip
    return found

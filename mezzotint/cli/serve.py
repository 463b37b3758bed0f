"""`mezzotint serve`: models over HTTP."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from mezzotint.cli.options import clustered, priced
from mezzotint.errors import InputError
from mezzotint.extras import EXTRAS, need

if TYPE_CHECKING:
    from mezzotint.cluster import Cluster
    from mezzotint.serve.workers import Models

NAME = re.compile(r"[\w.-]{1,80}")
MARGIN = 5.0  # seconds that a worker gets to answer
GLANCE = 1.0  # the same, where somebody waits for its counts


@dataclass(frozen=True)
class Options:
    """Serve models over HTTP: a web page, OpenAI's images API, jobs that nothing loses, and metrics.

    Requests of different prompts, seeds, samplers, steps and adapters are drawn in one batch, step by step. What is
    accepted is in the database: after a crash it is drawn by the next server on the same database, once. Every picture
    leaves under the policy, as with `generate`.

    Without keys the server answers this machine alone and takes any key; `mezzotint keys add` makes the first one.

    For example:

        mezzotint serve --model models/solar-cells
        mezzotint keys add inspection-line --per-day 5000
        mezzotint serve --model cells=models/solar-cells --host 0.0.0.0 --adapter cracks=cracks.safetensors
        mezzotint serve --model models/solar-cells --engine ray --workers 4
    """

    model: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A model folder or file, as PATH or NAME=PATH; may be given several times. The first one is the default."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA or control network that requests may ask for, as NAME=PATH."""
    data: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Images such as a model was trained on, as NAME=FOLDER: the doctor of the web page looks at them."""
    host: str = "127.0.0.1"
    """The address to answer at; others than this machine's need keys."""
    port: int = 8000
    """The port."""
    db: str | None = None
    """The database, sqlite:///FILE or postgresql+psycopg://...; a file in the user's configuration where left out."""
    hands: int = 8
    """Jobs that are drawn at a time."""
    room: int = 200
    """Jobs that may wait; beyond it callers are told to come again (429)."""
    batch: int = 16
    """Images that the network sees at once, at most."""
    previews: int = 128
    """Pixels of the live previews' longer side; 0 for none. They are looked at under the policy, and not signed."""
    keep: float = 7.0
    """Days that ended jobs and their pictures are kept."""
    policy: str | None = None
    """A TOML file of rules, or off; the default policy where left out."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The number format of weights and computation."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, mps, or one of several such as cuda:1."""
    price_per_hour: float | None = None
    """What an hour of this machine costs: every job then says what its pictures cost, by the plan."""
    engine: Literal["process", "ray"] = "process"
    """Draw in this process, or in workers on Ray, each with its own models and hands."""
    workers: int | None = None
    """With ray: how many processes draw; 2 where left out."""
    cluster: str | None = None
    """With ray: HOST:PORT of a running cluster, or auto for this machine's; one is started here where left out."""
    drain: float = 30.0
    """Seconds that running jobs get to end when the server is told to stop."""
    json: bool = False
    """Print the address as JSON when it answers."""


def run(options: Options) -> int:
    """Answer until told to stop; 1 where running jobs had to be left to the next server."""
    if not options.model:
        raise InputError("serve: missing --model. `mezzotint serve --help` says more.")
    for name, least in (("hands", 1), ("room", 1), ("batch", 1), ("port", 0), ("previews", 0), ("keep", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(options, name)}")
    if options.port > 65_535:
        raise InputError(f"--port is at most 65535, not {options.port}")
    places, adapters = named(options.model, "--model"), named(options.adapter, "--adapter", True)
    data = named(options.data, "--data", True)
    if strange := sorted(data.keys() - places.keys()):
        raise InputError(f"--data {strange[0]}: no such model here: {', '.join(places)}")
    for name, path in data.items():
        if not path.exists():
            raise InputError(f"--data {name}: no such folder: {path}")
    need(*EXTRAS["serve"][0])
    from mezzotint.governance import audit
    from mezzotint.serve import keys
    from mezzotint.serve.run import answer
    from mezzotint.serve.server import DAY, Limits, Server, is_here
    from mezzotint.serve.store import Store
    from mezzotint.serve.workers import Models

    db = options.db or default()
    gpus = int(options.device.startswith("cuda"))
    cluster = clustered(options.engine, options.workers, options.cluster, gpus)
    if cluster is not None and cluster.address is not None and db.startswith("sqlite"):
        raise InputError(f"--db {db} is a file of this machine: with --cluster give one that all machines reach, "
                         f"--db postgresql+psycopg://...")  # fmt: skip
    if cluster is not None and ":" in options.device:
        raise InputError(f"--device {options.device}: with --engine ray say {options.device.partition(':')[0]}, "
                         f"and each worker gets one of its own")  # fmt: skip
    store = Store(db, options.room)
    free = not keys.configured(store)
    if free and not is_here(options.host):
        raise InputError(
            f"--host {options.host} answers other machines, and there is no key: make one with `mezzotint keys add`."
        )
    models = Models(places, adapters, options.policy, options.dtype, options.device, options.batch,
                    priced(options.price_per_hour), options.previews)  # fmt: skip
    desks = (models if cluster is None else replace(models, device="cpu", price=None)).desks()
    log = next(iter(desks.values())).pipeline.house.log
    who = "anybody on this machine" if free else f"{len(keys.listed(store))} keys"
    out = sys.stdout

    def ready(address: str) -> None:
        if options.json:
            print(json.dumps({"url": address, "models": list(desks), "keys": not free}), file=out, flush=True)
        print(f"{address} serves {', '.join(desks)} to {who}; Ctrl-C stops", file=sys.stderr, flush=True)

    with drawing(cluster, models, db, options.hands) as ask:
        here, there = (options.hands, 0) if cluster is None else (0, options.hands * cluster.workers)
        limits = Limits(keep=options.keep * DAY)
        server = Server(store, desks, free, log or audit.place(), limits, here, data, there,
                        partial(ask, GLANCE, "counts"))  # fmt: skip
        ended = answer(server, options.host, options.port, options.drain, ready)
        ended = all(ask(options.drain + MARGIN, "close", options.drain)) and ended
    store.close()
    return 0 if ended else 1


@contextmanager
def drawing(cluster: Cluster | None, models: Models, db: str, hands: int) -> Iterator[Callable[..., list[Any]]]:
    """Workers that draw for the length of the block, where a cluster is asked for; what asks all of them."""
    if cluster is None:
        yield lambda *question: []
        return
    from mezzotint.serve.workers import Hands

    with cluster.standing(partial(Hands, models, db, hands)) as ask:
        yield ask


def named(given: Sequence[str], option: str, must: bool = False) -> dict[str, Path]:
    """NAME=PATH, or PATH by its own name."""
    found: dict[str, Path] = {}
    for text in given:
        name, sign, path = text.partition("=")
        if not sign:
            if must:
                raise InputError(f"{option} {text}: give it a name, as NAME=PATH")
            name, path = Path(text).resolve().stem, text
        if not NAME.fullmatch(name):
            raise InputError(
                f"{option} {text}: a name is letters, digits and . _ -, not {name!r}; give it as NAME=PATH"
            )
        if name in found:
            raise InputError(f"{option}: two are named {name!r}; give them names, as NAME=PATH")
        found[name] = Path(path)
    return found


def default() -> str:
    """A file beside keys and log of this user."""
    from mezzotint.governance.home import home

    return f"sqlite:///{home() / 'jobs.db'}"

"""`mezzotint keys`: who may ask a server."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import tyro

from mezzotint.cli import console
from mezzotint.errors import InputError
from mezzotint.extras import need


@dataclass(frozen=True)
class Options:
    """Make, list and revoke the keys that a server answers to.

    A key is printed once and never again; the database holds its SHA-256. From the first key on every request needs
    one. A running server knows new and revoked keys at once, and needs a start to ask for keys at all.

    For example:

        mezzotint keys add inspection-line --per-day 5000
        mezzotint keys add dashboard --role viewer
        mezzotint keys list
        mezzotint keys revoke inspection-line
    """

    action: tyro.conf.Positional[Literal["add", "list", "revoke"]]
    """What to do."""
    name: tyro.conf.Positional[str] = ""
    """add and revoke: whose key it is."""
    role: str = "user"
    """add: user asks and sees its own jobs, viewer sees all and asks nothing, admin does both."""
    per_minute: int | None = None
    """add: requests a minute; the server's own bound where left out."""
    per_day: int | None = None
    """add: pictures a day; no bound where left out."""
    db: str | None = None
    """The server's database; a file in the user's configuration where left out."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    """Do it, and print the new key, or those that there are."""
    need("sqlalchemy", "alembic")
    from mezzotint.cli.serve import default
    from mezzotint.serve import keys
    from mezzotint.serve.store import Store

    if options.action != "list" and not options.name:
        raise InputError(f"keys {options.action}: whose? Give a name.")
    store = Store(options.db or default())
    try:
        if options.action == "add":
            secret = keys.add(store, options.name, options.role, options.per_minute, options.per_day)
            if options.json:
                console.print_json({"name": options.name, "role": options.role, "key": secret})
            else:
                print(secret)
            return 0
        if options.action == "revoke":
            keys.revoke(store, options.name)
        found = [
            {"name": key.name, "role": key.role, "per_minute": key.per_minute, "per_day": key.per_day,
             "created": f"{datetime.fromtimestamp(key.created, UTC):%Y-%m-%d}"}
            for key in keys.listed(store)
        ]  # fmt: skip
        if options.json:
            console.print_json(found)
        for key in () if options.json else found:
            bounds = f"{key['per_minute'] or 'any'} requests a minute, {key['per_day'] or 'any'} pictures a day"
            print(f"{key['name']}: {key['role']}, {bounds}, since {key['created']}")
        return 0
    finally:
        store.close()

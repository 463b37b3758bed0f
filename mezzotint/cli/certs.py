"""`mezzotint certs`: the private certificates that sign pictures and models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mezzotint.cli import console


@dataclass(frozen=True)
class Options:
    """Make, show or renew the certificates under which pictures and models are signed.

    `init` makes a private root and two certificates below it, one for pictures and one for models. Whoever is to check
    your pictures needs the root's certificate, root.pem, and nothing else. Keys are files that you alone may read; the
    root's key may be kept elsewhere until `renew` needs it.

    For example:

        mezzotint certs init --name "Acme Inspection"
        mezzotint certs show
        mezzotint certs renew --days 365
    """

    action: tyro.conf.Positional[Literal["init", "show", "renew"]]
    """What to do."""
    out: Path | None = None
    """The folder of certificates; in the user's configuration where left out."""
    name: str = "Mezzotint"
    """init: the name that checkers will see."""
    days: int = 730
    """init and renew: how long the certificates hold."""
    json: bool = False
    """Print JSON."""


def run(options: Options) -> int:
    """Do it, and say what there is."""
    from mezzotint.governance import certificates

    at = certificates.folder_of(options.out)
    if options.action == "init":
        certificates.init(at, options.name, options.days)
    elif options.action == "renew":
        certificates.renew(at, options.days)
    root = certificates.root_of(at)
    found = {"folder": str(at), "root": certificates.common_name(root), "give to checkers": str(at / "root.pem")}
    for purpose in certificates.PURPOSES:
        signer = certificates.signer(at, purpose)
        found[purpose] = f"{signer.name}, until {signer.until:%Y-%m-%d}"
    if options.json:
        console.print_json(found)
    else:
        print(console.facts(found))
    return 0

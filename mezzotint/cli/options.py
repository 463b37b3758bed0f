"""From words on the command line to a verb's frozen dataclass, with complaints of one line."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from mezzotint.errors import InputError

if TYPE_CHECKING:
    from mezzotint.cluster import Cluster

T = TypeVar("T")


def parse(kind: type[T], verb: str, args: Sequence[str]) -> T:
    """An instance of the dataclass `kind` filled from `args`; InputError names the wrong flag or value.

    `--help` prints the docstring and the fields and raises SystemExit(0).
    """
    import tyro

    more = f"`mezzotint {verb} --help`"

    known = ["--help"] + [f"--{field.name.replace('_', '-')}" for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    for token in args:
        flag = token.partition("=")[0].replace("_", "-")
        if flag == "--":
            break
        if flag.startswith("--") and flag not in known:
            raise InputError(f"{verb} has no option {flag}{nearest(flag, known)}. {more} lists them.")
    if {"-h", "--help"} & {*args}:
        print(inspect.getdoc(kind), end="\n\n")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                prog=f"mezzotint {verb}",
                description="",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{verb}: {condense(said.getvalue())}. {more} says more.") from None


def priced(price: float | None) -> float | None:
    """What --price-per-hour says; InputError where that is no price."""
    if price is not None and not 0 <= price < math.inf:
        raise InputError(f"--price-per-hour must be a number of at least 0, not {price:g}")
    return price


def clustered(engine: str, workers: int | None, address: str | None, gpus: int = 0) -> Cluster | None:
    """The cluster that is asked for, where one is; InputError for options that go with one, without it."""
    if engine != "ray":
        for name, value in (("workers", workers), ("cluster", address)):
            if value is not None:
                raise InputError(f"--{name} {value} goes with --engine ray: add it, or leave --{name} out")
        return None
    from mezzotint.cluster import Cluster

    if workers is not None and workers < 1:
        raise InputError(f"--workers must be at least 1, not {workers}")
    return Cluster(workers or 2, None if address == "local" else address, gpus)


def nearest(word: str, valid: Iterable[str]) -> str:
    """` (did you mean 'x'?)` where a valid word is close, else nothing."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def condense(box: str) -> str:
    """One sentence from the framed complaint of the option parser: what stands between its title and the first rule."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in box.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.fullmatch(r"[│ ]*[─-]{3,}[│ ]*", line)]
    top = 0 if lines and lines[0].startswith("╭") else rules.pop(0) if rules else -1
    rows = [line.strip("│").rstrip() for line in lines[top + 1 : rules[0] if rules else None]]
    if rows and rows[0].strip().startswith("Missing from"):
        # Indented once: a missing option; indented twice: its help, which is left out.
        names = [row.strip() for row in rows[1:] if re.match(r" {5,6}\S", row)]
        return f"missing {', '.join(names)}"
    sentence = " ".join(row.strip() for row in rows).strip().rstrip(".")
    return sentence[:1].lower() + sentence[1:]

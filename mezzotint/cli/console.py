"""What verbs print: answers on stdout, for people or as JSON; progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(content, indent=2, ensure_ascii=False, default=str))


def answer(word: str | None) -> bool | None:
    """yes or no as a truth value; None where nothing was said."""
    return None if word is None else word == "yes"


def facts(content: Mapping[str, Any]) -> str:
    """An aligned list of names and values, nested mappings indented, empty values left out."""
    return "\n".join(_rows(content, indent=""))


def _rows(content: Mapping[str, Any], indent: str) -> Iterator[str]:
    present = {name: value for name, value in content.items() if value not in (None, "", (), [], {})}
    width = max((len(name) for name in present), default=0) + 2
    for name, value in present.items():
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from _rows(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            yield f"{indent}{name:<{width}}{shown}"


@contextmanager
def progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Progress bars on stderr with the time spent and left; none where stderr is no terminal, or on `quiet`."""
    import rich.progress as bar
    from rich.console import Console

    columns = (
        bar.TextColumn("{task.description}"),
        bar.BarColumn(),
        bar.MofNCompleteColumn(),
        bar.TimeElapsedColumn(),
        bar.TextColumn("left"),
        bar.TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    disable = quiet or not console.is_terminal
    with bar.Progress(*columns, console=console, transient=True, disable=disable) as bars:
        yield bars

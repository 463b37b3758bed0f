"""The libraries of governance are an extra: what is missing is said before anything is drawn or signed."""

from __future__ import annotations

from importlib.util import find_spec

from mezzotint.errors import InputError


def need(*modules: str) -> None:
    """InputError where one of the modules is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise InputError(
                f"{module} is not installed, which marking and signing need: pip install 'mezzotint[govern]'.\n"
                "Or work without them: --policy off, which the record will say."
            )

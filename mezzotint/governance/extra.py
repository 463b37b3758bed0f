"""The libraries of governance are extras: what is missing is said before anything is drawn or signed."""

from __future__ import annotations

from importlib.util import find_spec

from mezzotint.errors import InputError

LINEAGE, REGISTRY = ("cyclonedx", "model_signing", "OpenSSL", "openlineage"), ("mlflow",)


def need(*modules: str) -> None:
    """InputError where one of the modules is not installed."""
    for module in modules:
        if find_spec(module) is not None:
            continue
        if module in REGISTRY:
            raise InputError(
                f"{module} is not installed: pip install 'mezzotint[mlflow]', or leave lineage.mlflow out."
            )
        extra, without = "govern", "Or work without them: --policy off, which the record will say."
        if module in LINEAGE:
            extra, without = "lineage", "Or train without: write = false in the recipe's [lineage] table."
        raise InputError(
            f"{module} is not installed, which marking and signing need: pip install 'mezzotint[{extra}]'.\n{without}"
        )

"""Mezzotint: diffusion models that carry their contract, and synthetic defects painted with them.

`import mezzotint as mz` gives `mz.load`, `mz.generate`, `mz.Request` and their kin; torch is imported when one of those
that need it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mezzotint.errors import InputError
    from mezzotint.families import Model, load, save
    from mezzotint.families.adapt import adapted as adapt
    from mezzotint.families.convert import convert
    from mezzotint.generate import generate, generate_batch
    from mezzotint.pipeline import pipeline
    from mezzotint.request import Artifact, Request, Result

# public name -> module, and the name there where it is another
_PUBLIC = {
    "adapt": "families.adapt:adapted",
    "convert": "families.convert",
    "Artifact": "request",
    "InputError": "errors",
    "Model": "families",
    "Request": "request",
    "Result": "request",
    "generate": "generate",
    "generate_batch": "generate",
    "load": "families",
    "pipeline": "pipeline",
    "save": "families",
}

__all__ = [
    "Artifact", "InputError", "Model", "Request", "Result", "adapt", "convert", "generate", "generate_batch", "load",
    "pipeline", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mezzotint' has no attribute {name!r}")
    module, _, other = _PUBLIC[name].partition(":")
    value = getattr(import_module(f"mezzotint.{module}"), other or name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # importing mezzotint.generate would put that module where the public function of the same name belongs
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})

"""Rules of the user's own: a function named in the policy. It is code of this machine, and trusted as such."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

from mezzotint.errors import InputError


@lru_cache(maxsize=32)
def plugged(name: str, gives: type) -> Callable[..., Any]:
    """The function `module:function`, checked to give what it should whenever it is called.

    InputError where it is not there, fails or gives something else: a filter that does not work lets nothing pass.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"the policy names the filter '{name}', which is not there: {error}") from error

    def call(*given: Any) -> Any:
        try:
            said = found(*given)
        except Exception as error:
            raise InputError(f"the filter '{name}' failed, so nothing is given out: {error}") from error
        if not isinstance(said, gives):
            raise InputError(f"the filter '{name}' must give a {gives.__name__}, not a {type(said).__name__}")
        return said

    return call

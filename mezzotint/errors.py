"""What is a user's mistake and not ours, and what a policy does not allow."""

from __future__ import annotations


class InputError(Exception):
    """Something the user gave cannot be used: the message says what, where and the remedy, in one or two lines.

    The command line prints the message alone and exits with code 2; libraries may catch it like any exception.
    """


class NotFinite(InputError):
    """Weights hold NaN or infinite numbers."""


class Refused(Exception):
    """A policy does not allow what was asked: `rule` is the one that says so. Nothing that was drawn is given out.

    The command line prints the message and exits with code 1.
    """

    def __init__(self, rule: str, says: str) -> None:
        super().__init__(says)
        self.rule = rule

    def __reduce__(self) -> tuple[type[Refused], tuple[str, str]]:  # what it is made of, to travel between processes
        return type(self), (self.rule, str(self))

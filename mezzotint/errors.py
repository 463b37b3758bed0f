"""The one exception that is a user's mistake and not ours."""


class InputError(Exception):
    """Something the user gave cannot be used: the message says what, where and the remedy, in one or two lines.

    The command line prints the message alone and exits with code 2; libraries may catch it like any exception.
    """


class NotFinite(InputError):
    """Weights hold NaN or infinite numbers."""

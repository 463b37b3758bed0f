"""`python -m mezzotint` is the command `mezzotint`."""

from mezzotint.cli.main import entry

entry()

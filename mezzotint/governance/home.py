"""Where the keys of this user are kept, and files that nobody else may read."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from mezzotint.errors import InputError


def home() -> Path:
    """The folder of keys, certificates and the audit log: MEZZOTINT_HOME, or one in the user's configuration."""
    own = os.environ.get("MEZZOTINT_HOME")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "mezzotint"


def secret(path: Path, content: bytes) -> Path:
    """Write a file that its owner alone may read, whole or not at all, in a folder that its owner alone may enter.

    InputError where it is there already: a key that is lost is lost, so none is ever written over.
    """
    if path.exists():
        raise InputError(f"{path} is there already and is not written over. Move it away, or choose another folder.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # 0600 from its first moment
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(name, path)  # fails where another process was quicker
        finally:
            os.unlink(name)
    except FileExistsError as error:
        raise InputError(f"{path} is there already and is not written over.") from error
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}. Choose another folder.") from error
    return path


def read_secret(path: Path) -> bytes:
    """The content of such a file; InputError where it is missing or others may read it."""
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise InputError(f"{path} may be read by others than its owner. Make it private: chmod 600 {path}")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"no such key: {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error

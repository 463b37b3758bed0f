"""Files that are either whole or absent: atomic writes and content digests."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mezzotint.errors import InputError


def write_with(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it over `path`.

    A crash or a full disk leaves the old file untouched and no partial one behind.
    Raises InputError where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        os.chmod(temporary, 0o644)
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"cannot write {path}: {why}. Free space or choose another folder.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    """Write bytes atomically."""
    return write_with(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, content: str) -> Path:
    """Write UTF-8 text atomically."""
    return write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> Path:
    """Write indented JSON atomically."""
    return write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_toml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The tables of a TOML file as plain data; InputError where it is missing, unreadable or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such {what}: {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the {what} {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_json(content: Any) -> str:
    """The SHA-256 of plain data in its canonical JSON form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

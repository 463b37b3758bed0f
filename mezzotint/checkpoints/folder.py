"""A model folder that is either whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from mezzotint.errors import InputError

MARKS = ("model_index.json", "contract.json")  # of a model, of a control network


def write_folder(path: Path, fill: Callable[[Path], object]) -> Path:
    """Let `fill` write a folder beside `path` and rename it into place; an older model folder there is replaced.

    InputError where `path` is anything else than a model folder or an empty one (nothing of the user's is deleted),
    or the disk is full; what was there before then stays.
    """
    path = Path(path).absolute()
    ours = any((path / mark).is_file() for mark in MARKS)
    if path.exists() and not ours and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is not a model folder: choose another place")
    fresh: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        os.chmod(fresh, 0o755)
        fill(fresh)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.rename(path, old)  # over the empty folder just made: from here to the next line only the name is missing
            os.rename(fresh, path)
            shutil.rmtree(old)
        else:
            os.rename(fresh, path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"cannot write {path}: {reason}. Free space or choose another folder.") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
    return path

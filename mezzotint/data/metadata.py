"""`metadata.jsonl`: one JSON object a line beside the images, the convention of the datasets library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint import files
from mezzotint.errors import InputError

METADATA = "metadata.jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a training folder; what the file says beyond these fields is kept by `rows` and ignored here."""

    file_name: str  # relative to the folder
    text: str  # the caption, "" where there is none
    label: int | None  # class index, None: no class is known
    mask: str | None  # file name of a mask, white = the defect, relative to the folder
    control: str | None  # file name of a condition picture (edges, depth, ...) for a control network, likewise
    line: int  # where the row stands in metadata.jsonl, for messages

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the row names."""
        return tuple(name for name in (self.file_name, self.mask, self.control) if name is not None)


def rows(folder: Path) -> list[dict[str, Any]]:
    """The plain objects of a folder's metadata.jsonl, in file order, each also holding its line number as "line"."""
    found: list[dict[str, Any]] = []
    for number, line in _lines(folder):
        try:
            found.append(_object(line, number))
        except InputError as error:
            raise InputError(f"{Path(folder) / METADATA}, line {number}: {error}") from error
    return found


def read(folder: Path) -> list[Row]:
    """The typed rows of a training folder; every mistake is an InputError that names file and line."""
    path = Path(folder) / METADATA
    found, problems = scan(folder)
    for line, why in problems:
        raise InputError(f"{path}, line {line}: {why}")
    for row in found:
        for file in row.files:
            if not (Path(folder) / file).is_file():
                raise InputError(
                    f"{path}, line {row.line}: no such file {Path(folder) / file}. Correct the name or remove the line."
                )
    return found


def scan(folder: Path) -> tuple[list[Row], list[tuple[int, str]]]:
    """The rows that can be read, and line number and what is wrong for those that cannot; files may be missing.

    InputError only where there is no folder, no metadata.jsonl or nothing in it.
    """
    found: dict[str, Row] = {}
    problems: list[tuple[int, str]] = []
    for number, line in _lines(folder):
        try:
            row = _row(_object(line, number))
            if row.file_name in found:
                first = found[row.file_name].line
                raise InputError(f"{row.file_name} is listed already on line {first}; remove one of the two.")
            found[row.file_name] = row
        except InputError as error:
            problems.append((number, str(error)))
    return list(found.values()), problems


def _lines(folder: Path) -> list[tuple[int, bytes]]:
    """Numbered lines that are not blank."""
    path = Path(folder) / METADATA
    if not Path(folder).is_dir():
        raise InputError(f"no such training folder: {folder}")
    if not path.is_file():
        raise InputError(
            f'{folder} has no {METADATA}: write one line per image, {{"file_name": "a.png", "text": "a caption"}}.'
        )
    found = [(n, line) for n, line in enumerate(path.read_bytes().splitlines(), start=1) if line.strip()]
    if not found:
        raise InputError(f"{path} is empty: a training folder needs at least one image.")
    return found


def _object(line: bytes, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise InputError(f"not valid JSON ({error.msg} at column {error.colno}). Each line is one object.") from error
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, found {type(row).__name__}.")
    return {**row, "line": number}


def _row(row: Mapping[str, Any]) -> Row:
    name, text, label, mask, control = (row.get(key) for key in ("file_name", "text", "label", "mask", "control"))
    if not isinstance(name, str) or not name:
        raise InputError('"file_name" is missing; it names an image relative to its folder.')
    if text is not None and not isinstance(text, str):
        raise InputError(f'"text" must be a string, found {text!r}.')
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
        raise InputError(f'"label" must be a class index 0, 1, 2, ..., found {label!r}.')
    for key, value in (("mask", mask), ("control", control)):
        if value is not None and (not isinstance(value, str) or not value):
            raise InputError(f'"{key}" must be a file name, found {value!r}.')
    return Row(name, text or "", label, mask, control, row["line"])


def write(folder: Path, content: Iterable[Mapping[str, Any]]) -> Path:
    """Write metadata.jsonl atomically from plain objects (line numbers that `rows` added are left out)."""
    lines = [json.dumps({k: v for k, v in row.items() if k != "line"}, ensure_ascii=False) for row in content]
    return files.write_text(Path(folder) / METADATA, "\n".join(lines) + "\n")

"""What a data set is, to the bit: the SHA-256 of every file and one digest of them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mezzotint import files
from mezzotint.data import metadata


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a training folder (names relative to it, sorted) with their digests."""

    folder: str
    files: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 over names and digests; where the folder lies and what else it holds does not matter."""
        return files.sha256_json(self.files)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON data, as kept in a run folder."""
        return {"digest": self.digest, "folder": self.folder, "files": self.files}


def manifest(folder: Path, rows: list[metadata.Row]) -> Manifest:
    """Digest metadata.jsonl and every image, mask and condition picture that it names."""
    folder = Path(folder)
    names = {metadata.METADATA, *(name for row in rows for name in row.files)}
    return Manifest(str(folder), {name: files.sha256_file(folder / name) for name in sorted(names)})

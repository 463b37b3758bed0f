"""Weights on disk and in place: names and tensors only, no model family."""

from mezzotint.checkpoints.folder import write_folder
from mezzotint.checkpoints.module import configure, fill
from mezzotint.checkpoints.tensors import read_json, read_metadata, read_part, read_tensors, write_tensors

__all__ = [
    "configure", "fill", "read_json", "read_metadata", "read_part", "read_tensors", "write_folder", "write_tensors",
]  # fmt: skip

"""Weights on disk and in place: names and tensors only, no model family."""

from mezzotint.checkpoints.folder import write_folder
from mezzotint.checkpoints.sharded import write_sharded
from mezzotint.checkpoints.tensors import read_json, read_metadata, read_tensors, write_tensors
from mezzotint.checkpoints.weights import find_weights, open_tensors, read_part, read_shapes
from mezzotint.layers.fill import configure, fill

__all__ = [
    "configure", "fill", "find_weights", "open_tensors", "read_json", "read_metadata", "read_part", "read_shapes",
    "read_tensors", "write_folder", "write_sharded", "write_tensors",
]  # fmt: skip

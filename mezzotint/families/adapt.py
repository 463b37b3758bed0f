"""Adapters on a model: LoRA files and textual-inversion embeddings, found their places by the model at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mezzotint.adapters import Adapter, attach, modules_of, read
from mezzotint.adapters.textual_inversion import read_embedding
from mezzotint.checkpoints import open_tensors, read_metadata
from mezzotint.checkpoints.keymap import Entry
from mezzotint.errors import InputError
from mezzotint.families.load import FAMILIES
from mezzotint.families.model import Model

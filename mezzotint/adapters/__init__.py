"""Small additions to a model: low-rank adapters (LoRA, DoRA) in the published layouts, and words of their own."""

from mezzotint.adapters.apply import attach, merge
from mezzotint.adapters.keys import is_adapter
from mezzotint.adapters.lowrank import BACKBONE, Adapter, Facts, LowRank
from mezzotint.adapters.places import modules_of
from mezzotint.adapters.read import describe, read
from mezzotint.adapters.textual_inversion import read_words, write_words
from mezzotint.adapters.write import to_diffusers, to_kohya, to_peft

__all__ = [
    "BACKBONE",
    "Adapter",
    "Facts",
    "LowRank",
    "attach",
    "describe",
    "is_adapter",
    "merge",
    "modules_of",
    "read",
    "read_words",
    "to_diffusers",
    "to_kohya",
    "to_peft",
    "write_words",
]

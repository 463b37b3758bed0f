"""Model families: which parts make a model and where its weights live."""

from mezzotint.families.load import load
from mezzotint.families.model import Model
from mezzotint.families.native import save

__all__ = ["Model", "load", "save"]

"""The only composer of generating and governance, and so the only way an image leaves the house."""

from mezzotint.pipeline.record import pixels_digest, record
from mezzotint.pipeline.run import Pipeline, pipeline

__all__ = ["Pipeline", "pipeline", "pixels_digest", "record"]

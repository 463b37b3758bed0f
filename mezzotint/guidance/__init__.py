"""How raw predictions of several prompts become one."""

from mezzotint.guidance.apg import Projected, projected
from mezzotint.guidance.guidance import Guidance, mixed, rescaled, skipped

__all__ = ["Guidance", "Projected", "mixed", "projected", "rescaled", "skipped"]

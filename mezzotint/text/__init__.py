"""Prompts to conditioning."""

from mezzotint.text.encoder import TextEncoder

__all__ = ["TextEncoder"]

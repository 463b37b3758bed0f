"""Probes: each file measures one thing on the weights and the user's images, and judges it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked

Probe = Callable[[Case], Checked]

# In the order in which one thing spoils the next.
PROBES = (
    "files", "weights", "latent", "objective", "schedule", "text", "guidance", "adapters", "cache", "data", "fit",
    "trace", "sampler", "speed",
)  # fmt: skip


def probe(name: str) -> Probe:
    """The function of a probe's file; only that file is imported."""
    return import_module(f"mezzotint.doctor.probes.{name}").examine

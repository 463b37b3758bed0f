"""Where to compute."""

from __future__ import annotations

import torch

from mezzotint.errors import InputError


def device_of(name: str) -> torch.device:
    """The device, tried out; InputError where this machine or this torch has none of that name."""
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"--device {name} cannot be used: {reason}. --device cpu always can.") from error

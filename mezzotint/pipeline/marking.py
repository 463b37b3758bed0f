"""Which mark a picture carries, and the start noise that carries it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image

from mezzotint.families.adapt import ruled
from mezzotint.families.model import Model
from mezzotint.families.settings import settle
from mezzotint.generate import start_noise
from mezzotint.governance import shading
from mezzotint.governance.shading import Key
from mezzotint.pipeline.admission import refuse
from mezzotint.pipeline.house import House
from mezzotint.request import Request
from mezzotint.sampling import fresh, seeded_noise

Method = Literal["start noise", "pixels"]
LEAST = 0.25  # of a picture that must be painted for a mark in its pixels to be found


@dataclass(frozen=True, slots=True)
class Mark:
    """What is needed to find a mark again, the key apart."""

    method: Method
    key: str
    nonce: bytes
    payload: bytes

    def facts(self) -> dict[str, str]:
        """As plain data, for record, credentials and log."""
        return {"method": self.method, "key": self.key, "nonce": self.nonce.hex(), "payload": self.payload.hex()}

    @staticmethod
    def of(facts: Mapping[str, Any]) -> Mark:
        """What `facts` said."""
        return Mark(facts["method"], facts["key"], bytes.fromhex(facts["nonce"]), bytes.fromhex(facts["payload"]))


def method(model: Model, request: Request) -> Method | None:
    """Start noise where the pictures follow from it and from nothing drawn on the way, else pixels.

    None where a mark would not be found: a spot below a quarter of the picture is repainted.
    """
    if request.mask is not None and share(request.mask) < LEAST:
        return None
    sampler = settle(ruled(model, request.lora), request).sampler
    own = request.image is not None or request.start_noise is not None
    return "pixels" if own or fresh(sampler) else "start noise"


def share(mask: Image) -> float:
    """Of a mask, what is white."""
    return float((np.asarray(mask.convert("L")) > 0).mean())


def carried(desk: House, model: Model, request: Request, facts: Mapping[str, Any]) -> list[Mark]:
    """The marks that the policy wants, one for each image; none where it wants none, or one would not be found.

    Refused where the policy wants one on every picture and it would not be found.
    """
    how = method(model, request) if desk.key is not None else None
    if desk.key is not None and how is not None:
        return marks(desk.key, how, facts, request)
    if desk.policy.watermark.mode == "always":
        refuse(desk, model, request, "watermark.always", "the painted spot is too small to carry a watermark")
    return []


def marks(key: Key, how: Method, facts: Mapping[str, Any], request: Request) -> list[Mark]:
    """A mark for each image of a request, of whose record `facts` are a part."""
    weights = str(facts["model"]["weights"])
    payload, said = shading.payload_of(key, bytes.fromhex(weights[:8])), {"request": facts["request"], "model": weights}
    return [
        Mark(how, key.id, shading.nonce_of(key, said, seed), payload)
        for seed in range(request.seed, request.seed + request.count)
    ]


def noised(model: Model, request: Request, key: Key, every: list[Mark]) -> Request:
    """The request with its own start noise, marked."""
    settings = settle(ruled(model, request.lora), request)
    draws = [seeded_noise([request.seed + i for i in range(request.count)])]
    noise = start_noise(model, [request], settings, draws)  # (N, C, h, w)
    rows = [shading.shaded(row, key, mark.nonce, mark.payload) for row, mark in zip(noise, every, strict=True)]
    return replace(request, start_noise=torch.stack(rows))

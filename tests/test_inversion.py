"""From pictures back to their noise: against the exact flow of a Gaussian, and on the starter model."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from sweep_parts import FLOW, VP, gaussian, noise_of

import mezzotint as mz
from mezzotint.governance import shading
from mezzotint.pipeline.inversion import inverted
from mezzotint.process import Prediction, Process, schedules
from mezzotint.request import Request

STARTER = Path(__file__).parent.parent / "models" / "solar-cells"
COSINE = Process(schedules.cosine(), Prediction.VELOCITY)


@pytest.mark.parametrize("process", [VP, FLOW, COSINE], ids=["scaled_linear", "flow", "cosine"])
def test_more_steps_come_nearer_to_the_noise(process: Process) -> None:
    model, noise = gaussian(process), 0.5 * noise_of(2)  # of small noise, so that no pixel is cut off
    solver = "flow_euler" if process is FLOW else "ddim"
    pictures = []
    for i in range(2):
        request = Request(seed=i, sampler=solver, steps=200, start_noise=noise[i][None])
        pictures += mz.generate(model, request).images
    errors = []
    for steps in (10, 20, 40):
        found = inverted(model, pictures, [Request(), Request()], steps)
        errors.append(float((found - noise).square().mean().sqrt()))
    assert all(a > b for a, b in pairwise(errors)), errors
    assert errors[0] < 0.06 and errors[-1] < 0.02, errors  # of 0.5; a picture's 8 bits are 0.002 of it


def test_a_marked_picture_of_the_starter_model_is_found_without_being_told_its_class() -> None:
    model, key = mz.load(STARTER), shading.Key.of(bytes(32))
    nonce, payload = shading.nonce_of(key, {}, 0), shading.payload_of(key, b"cell")
    noise = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    marked = shading.shaded(noise, key, nonce, payload)
    pictures = []
    for start in (marked, noise):
        pictures += mz.generate(model, Request(label=1, steps=8, start_noise=start[None])).images
    found = [shading.read(each, key, nonce, payload) for each in inverted(model, pictures, [Request()] * 2, 8)]
    assert found[0].found() and found[0].payload == payload and found[0].share > 0.75
    assert not found[1].found()

"""A pipeline of the reference library behind FastAPI, as it is usually done: one request at a time, in a thread."""

from __future__ import annotations

import base64
import io
import sys
import threading
from typing import Any

import torch
import uvicorn
from diffusers import DDIMScheduler, DiffusionPipeline
from fastapi import FastAPI
from pydantic import BaseModel

app, one = FastAPI(), threading.Lock()


class Wanted(BaseModel):
    prompt: str
    seed: int = 0
    steps: int = 20
    guidance: float = 7.5


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ok"}


@app.post("/v1/images/generations")
def generations(wanted: Wanted) -> dict[str, Any]:
    with one, torch.inference_mode():
        image = pipeline(
            wanted.prompt, num_inference_steps=wanted.steps, guidance_scale=wanted.guidance,
            generator=torch.Generator().manual_seed(wanted.seed),
        ).images[0]  # fmt: skip
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return {"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]}


if __name__ == "__main__":
    pipeline: Any = DiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")

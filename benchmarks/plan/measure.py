"""Run one case for real in this process and print what it took as JSON: `python benchmarks/plan/measure.py NAME WHAT`.

WHAT is `memory` (bytes at the peak, by the kernel's high-water mark, over what the process held after a first small run
of the same kind), `time` (seconds) or `flops` (torch's FlopCounterMode around the same work, of training one step).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, Case, real, spoken_by, subject
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from mezzotint.files import write_json
from mezzotint.generate import denoiser
from mezzotint.layers.config import write_config
from mezzotint.plan.generating import Job, settled
from mezzotint.plan.subject import Subject
from mezzotint.plan.zoo import gathered
from mezzotint.sampling import bounded, sample, seeded_noise

aten = torch.ops.aten
Act = Callable[[], object]


def drawing(planned: Subject, job: Job) -> Act:
    """Text, the whole path and decoding as `generate` does them; the weights are made here."""
    settings, _ = settled(planned, job)
    model, encoders = real(planned), spoken_by(planned)
    guided = settings.guidance.scale != 1.0 and not planned.contract.guidance.distilled
    factor = planned.contract.latent.factor

    @torch.inference_mode()
    def draw() -> object:
        size, batch = (settings.width, settings.height), job.batch
        for encoder, network in encoders:
            encoder.read(network, torch.zeros(1 + guided, encoder.length, dtype=torch.long))
        told = [planned.conditioning(batch, size, torch.float32) for _ in range(1 + guided)]
        step = bounded(denoiser(model, settings, told[0], told[1] if guided else None), settings.sampler,
                       planned.contract.sampling.clip)  # fmt: skip
        noise = torch.randn(batch, planned.contract.latent.channels, size[1] // factor, size[0] // factor)
        x = sample(step, noise, settings.path, settings.sampler, seeded_noise(range(batch)))
        return model.codec.decode(x)

    return draw


def learning(
    case: Case, planned: Subject, root: Path, steps: int, side: int | None = None
) -> Callable[[], list[float]]:
    """A run of the real training loop; it returns when each step ended."""
    from mezzotint.training import recipe
    from mezzotint.training.loop import Watch, train

    said, method = case.options, case.options["method"]
    side = side or said["size"][0]
    data = root / f"data-{side}"
    if not (root / "base").exists():
        written(planned, root / "base", case.model)
    pictures(data, said["images"], side)
    content: dict[str, Any] = {
        "method": method, "out": str(root / f"run-{side}"), "steps": steps, "batch": said["batch"],
        "accumulation": said.get("accumulation", 1), "recompute": bool(said.get("recompute", False)),
        "data": {"folder": str(data), "size": [side, side], "cache": str(root / f"cache-{side}")},
        "ema": {"decay": 0.999 if said.get("ema", True) else 0.0}, "checkpoints": {"every": 10_000},
        "validation": {"every": 10_000}, "base": {"path": str(root / "base")},
    }  # fmt: skip
    if case.model == "text":
        content["base"]["prediction"] = "velocity"
    if method == "vae":
        del content["base"]
        content["vae"] = {"start": str(root / "base" / "vae"), "trains": "all"}
    elif method == "lora":
        content["lora"] = {"rank": said["rank"]}
    elif method in ("controlnet", "lcm"):
        content[method] = {}
    elif method == "textual-inversion":
        content["textual_inversion"] = {"word": "<thing>", "initial": "cell"}
    if method == "controlnet":
        content["controlnet"] = {"condition": "edges"}
    ends: list[float] = []

    def run() -> list[float]:
        ends.clear()
        train(recipe.check(content, "the case"), watch=Watch(step=lambda *_: ends.append(time.perf_counter())))
        return ends

    return run


def written(planned: Subject, path: Path, model: str) -> None:
    """A model folder as published ones are, with small random numbers."""
    from cases import ENTRIES

    family, materials = gathered(ENTRIES[model], path)
    for part, material in materials.parts.items():
        kinds = {family.backbone: planned.backbone, family.codec: planned.codec}
        if part in kinds:
            kind, config = kinds[part]
            network: Any = kind.network(config)
            write_json(path / part / "config.json", write_config(config, material.kind))
            name = "diffusion_pytorch_model"
        else:
            network = next(e for e in planned.encoders if e.folder == part).build()
            write_json(path / part / "config.json", dict(material.config))
            name = "model"
        tensors = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
        save_file(tensors, path / part / f"{name}.safetensors", {"format": "pt"})
        del network, tensors
    if materials.scheduler:
        write_json(path / "scheduler" / "scheduler_config.json", dict(materials.scheduler))
    index = {"_class_name": family.pipeline(materials), **materials.index}
    write_json(path / "model_index.json", index)
    if model == "flux2":
        import text_parts

        text_parts.tiny_qwen3_tokenizer(path / "tokenizer")


def pictures(path: Path, count: int, side: int) -> None:
    """Noise, each picture with a caption of its own."""
    path.mkdir(parents=True)
    rows = []
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"a cell, number {i}"}))
    (path / "metadata.jsonl").write_text("\n".join(rows) + "\n")


def peak(act: Act) -> int:
    """Bytes at the high-water mark of a run, over what the process held before it."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark starts anew
    before = _status("VmRSS")
    act()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(rows[key].split()[0])


def counted(act: Act) -> int:
    """What torch counts, taught the attention kernel of processors."""

    def forward(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    taught = {aten._scaled_dot_product_flash_attention_for_cpu: forward,
              aten._scaled_dot_product_flash_attention_for_cpu_backward: backward}  # fmt: skip
    with FlopCounterMode(display=False, custom_mapping=taught) as run:
        act()
    return run.get_total_flops()


def main(name: str, what: str) -> dict[str, Any]:
    case = next(case for case in CASES if case.name == name)
    planned = subject(case.model)
    torch.manual_seed(0)
    if case.trains:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            if what == "flops":
                return {"flops": counted(learning(case, planned, root, 1))}
            run = learning(case, planned, root, case.options["steps"])
            if what == "memory":  # the same on smaller pictures first: libraries and vocabularies are there then
                learning(case, planned, root, 1, case.options["size"][0] // 2)()
                return {"memory": peak(run)}
            ends = run()
            return {"time": statistics.median(b - a for a, b in itertools.pairwise(ends))}
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in case.options.items()}
    if what == "memory":
        drawing(subject("latents"), Job(size=(64, 64), steps=1))()  # libraries have taken then what they take at first
        settled(planned, Job(**options))
        return {"memory": peak(lambda: drawing(planned, Job(**options))())}
    draw = drawing(planned, Job(**options))
    if what == "flops":
        return {"flops": counted(draw)}
    draw()
    spans = []
    for _ in range(2):
        start = time.perf_counter()
        draw()
        spans.append(time.perf_counter() - start)
    return {"time": min(spans)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2])))

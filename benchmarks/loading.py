"""Time and peak memory of loading a large network, beside diffusers and plain safetensors, in processes of their own.

    python benchmarks/loading.py            # Stable Diffusion 1.5's U-Net with random weights: 7 GB of disk for a while
    python benchmarks/loading.py --whole    # the whole model: U-Net, autoencoder, CLIP-L

Every case runs in a fresh process, the readers in turn and each round another one first, `--rounds` times; the medians
are printed. `peak` is the
growth of resident memory (VmHWM) during loading and one look at every number, over the size of the loaded weights;
`load` are the seconds until the network is there, `read` those of the first look at every number (mapped weights come
from disk only then). Files are in the page cache, as after a download or an earlier start. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mezzotint
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import ConditionalUNetConfig
from mezzotint.checkpoints import configure, fill, open_tensors, read_json, write_sharded
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.files import write_json
from mezzotint.text.clip_network import ClipConfig, ClipText
from mezzotint.text.vocabulary import clip_vocabulary

STEM = "diffusion_pytorch_model"
CONFIG = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
    "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
TINY = CONFIG | {"block_out_channels": [32, 32, 32, 32], "norm_num_groups": 8, "cross_attention_dim": 64}
SCHEDULER = {
    "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
    "num_train_timesteps": 1000, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False,
}  # fmt: skip
CASES = (  # file, wanted, shards
    ("float32", "float32", 1), ("float16", "float32", 1), ("float32", "float16", 1),
    ("float16", "float32", 4), ("float16", "float16", 4),
)  # fmt: skip


def ours(folder: Path, dtype: torch.dtype) -> nn.Module:
    config = configure(ConditionalUNetConfig, read_json(folder / "config.json"), folder / "config.json")
    return fill(lambda: UNet(config), open_tensors(folder), dtype, folder)


def diffusers(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)


def safetensors(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The usual few lines: load the file, convert it, assign it."""
    from safetensors.torch import load_file

    config = configure(ConditionalUNetConfig, read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):
        network = UNet(config)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    network.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)
    return network.eval().requires_grad_(False)


def whole(folder: Path, dtype: torch.dtype) -> nn.Module:
    model = mezzotint.load(folder, dtype=dtype)
    assert model.text is not None
    return nn.ModuleList([model.backbone, model.codec.autoencoder, *model.text.networks.values()])


def whole_diffusers(folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )
    return nn.ModuleList([pipeline.unet, pipeline.vae, pipeline.text_encoder])


READERS: dict[str, Callable[[Path, torch.dtype], nn.Module]] = {
    "mezzotint": ours, "diffusers": diffusers, "safetensors": safetensors,
}  # fmt: skip


WHOLE = {"mezzotint": whole, "diffusers": whole_diffusers}


def make(folder: Path, config: dict[str, object], dtype: str, shards: int) -> Path:
    """A part's folder with random weights, written without ever being in memory as a whole."""
    with torch.device("meta"):
        shapes = UNet(ConditionalUNetConfig.from_config(config)).state_dict()
    return write(folder, config, shapes, dtype, shards)


def make_whole(root: Path, config: dict[str, object], dtype: str, shards: int) -> Path:
    """A model folder of Stable Diffusion 1.5's kind; the smaller parts keep their size."""
    make(root / "unet", config, dtype, shards)
    width = config["cross_attention_dim"]
    clip = {
        "_class_name": "CLIPTextModel", "architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
        "vocab_size": 49408, "hidden_size": width, "intermediate_size": 4 * int(str(width)), "num_hidden_layers": 12,
        "num_attention_heads": 12 if width == 768 else 1, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
        "projection_dim": width, "layer_norm_eps": 1e-5, "bos_token_id": 49406, "eos_token_id": 49407,
    }  # fmt: skip
    widths = (128, 256, 512, 512)
    vae = {
        "_class_name": "AutoencoderKL", "block_out_channels": widths, "latent_channels": 4, "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512,
    }  # fmt: skip
    with torch.device("meta"):
        write(root / "vae", vae, KLVAE(KLVAEConfig.from_config(vae)).state_dict(), dtype, 1)
        text = ClipText(ClipConfig.from_config(clip), False).state_dict()
    write(root / "text_encoder", clip, text, dtype, 1, "model")
    clip_vocabulary().save_pretrained(root / "tokenizer")
    write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    parts = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    index = {"_class_name": "StableDiffusionPipeline", **{name: ["diffusers", kind] for name, kind in parts.items()}}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    write_json(root / "model_index.json", index | {"safety_checker": [None, None], "feature_extractor": [None, None]})
    return root


def write(
    folder: Path, config: dict[str, object], shapes: Mapping[str, Tensor], dtype: str, shards: int, stem: str = STEM
) -> Path:
    """config.json and random numbers of these shapes."""
    tensors = {name: (0.02 * torch.randn(t.shape[1:], device="cpu")).expand(t.shape) for name, t in shapes.items()}
    kind = getattr(torch, dtype)
    size = sum(tensor.numel() for tensor in shapes.values()) * kind.itemsize
    write_json(folder / "config.json", config)
    write_sharded(folder, stem, tensors, dtype=kind, limit=size // shards + 2**27 if shards > 1 else size)
    return folder


def measure(reader: str, folder: Path, tiny: Path, dtype: torch.dtype) -> dict[str, float]:
    """One load in this process, after a tiny one so that the program's own pages are not counted."""
    readers = WHOLE if (folder / "model_index.json").is_file() else READERS
    look(readers[reader](tiny, dtype))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident(), time.perf_counter()
    network = readers[reader](folder, dtype)
    loaded = time.perf_counter()
    look(network)
    size = sum(parameter.nbytes for parameter in network.parameters())
    return {
        "peak": (resident() - before) / size, "load": loaded - start, "read": time.perf_counter() - loaded,
        "gigabytes": size / 1e9,
    }  # fmt: skip


def look(network: nn.Module) -> None:
    for parameter in network.parameters():
        assert parameter.amax().isfinite()


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_cache(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as stream:
            while stream.read(2**26):
                pass


def compare(rounds: int, place: Path, whole_model: bool) -> None:
    readers, maker = (WHOLE, make_whole) if whole_model else (READERS, make)
    print(f"{'file':>8} {'wanted':>8} {'shards':>6} {'reader':>12} {'peak':>6} {'load s':>7} {'read s':>7}")
    for stored, wanted, shards in CASES:
        tiny = maker(place / "tiny", TINY, stored, 1)
        folder = maker(place / "large", CONFIG, stored, shards)
        found: dict[str, list[dict[str, float]]] = {reader: [] for reader in readers}
        order = list(readers)
        in_cache(folder)
        for round_ in range(rounds):
            for reader in (*order[round_ % len(order) :], *order[: round_ % len(order)]):
                command = [sys.executable, __file__, "--one", reader, str(folder), str(tiny), wanted]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[reader].append(json.loads(done.stdout.splitlines()[-1]))
        for reader, runs in found.items():
            peak, load, read = (statistics.median(run[key] for run in runs) for key in ("peak", "load", "read"))
            print(f"{stored:>8} {wanted:>8} {shards:>6} {reader:>12} {peak:6.2f} {load:7.2f} {read:7.2f}", flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(tiny)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="a whole model instead of its U-Net")
    parser.add_argument("--one", nargs=4, metavar=("READER", "FOLDER", "TINY", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        reader, folder, tiny, dtype = options.one
        print(json.dumps(measure(reader, Path(folder), Path(tiny), getattr(torch, dtype))))
        return
    with tempfile.TemporaryDirectory(prefix="loading-") as place:
        if shutil.disk_usage(place).free < 12e9:
            raise SystemExit("this needs 12 GB of free disk for a while: set TMPDIR to a place that has it")
        compare(options.rounds, Path(place), options.whole)


if __name__ == "__main__":
    main()

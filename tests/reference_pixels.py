"""DDPM, improved DDPM and ADM: tiny random checkpoints as the reference library writes them, and what it draws.

Noise is drawn in the course of a run, so both sides draw it from one generator (`one_noise`).
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from networks import randomise, relative
from original_networks import Weights, guided_diffusion
from parity_rows import Row
from torch import Tensor

import mezzotint as mz
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.checkpoints.keymap import restored
from mezzotint.checkpoints.layouts.adm import Order, adm
from mezzotint.checkpoints.layouts.ddpm import ddpm
from mezzotint.conditioning import Conditioning
from mezzotint.families import Model

SIDE, BATCH, CLASSES = 8, 2, 5
STEPS = 12  # of the runs with a learned variance
WEIGHTS = "diffusion_pytorch_model"
BOTH = ("folder", "single file")
ORDERS: tuple[Order, ...] = ("legacy", "new")

# Ho et al.'s kind of network; attention at the coarser one of two levels.
PLAIN: dict[str, Any] = {
    "sample_size": SIDE, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "attention_head_dim": None, "norm_eps": 1e-6,
}  # fmt: skip
# ADM's kind: resolution changes in residual blocks, the variance is learned, heads of 16 channels, classes.
GUIDED: dict[str, Any] = {
    "sample_size": SIDE, "out_channels": 6, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet", "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16, "attn_norm_num_groups": 32, "num_class_embeds": CLASSES,
}  # fmt: skip
# Improved diffusion's kind: as many heads at every level, which the reference library cannot say.
IMPROVED = UNetConfig(
    sample_size=SIDE, out_channels=6, block_out_channels=(32, 64), layers_per_block=1,
    down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
    resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32, attention_head_dim=None, num_attention_heads=4,
)  # fmt: skip
HO: dict[str, Any] = {"variance_type": "fixed_large"}
COSINE: dict[str, Any] = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"}

# Our sampler: the reference's scheduler and what it is told more than the file says.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_2m_sde_karras": (
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc_karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """What a run ends with: latents (B, C, h, w), and pictures."""

    latents: Tensor
    images: list[Any]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours - theirs).norm() / theirs.norm())


def levels_apart(ours: list[Any], theirs: list[Any]) -> int:
    """The largest difference of two lists of pictures, in levels of 255."""
    pairs = [(torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).int() for p in pair)
             for pair in zip(ours, theirs, strict=True)]  # fmt: skip
    return max(int((a - b).abs().max()) for a, b in pairs)


@contextmanager
def one_noise(batch: int = BATCH, seed: int = 5) -> Iterator[Callable[[], None]]:
    """Both sides draw from one generator, in the order in which they ask; call what is given to begin anew.

    The reference's guided pipelines ask for both branches at once: they get the same noise twice.
    """
    generator, ours = torch.Generator().manual_seed(seed), import_module("mezzotint.generate")

    def theirs(shape: Any, *_: Any, **__: Any) -> Tensor:
        drawn = torch.randn(batch, *shape[1:], generator=generator)
        return drawn.repeat(shape[0] // batch, *(1 for _ in shape[1:]))

    patched: list[tuple[Any, str, Any]] = [
        (module, "randn_tensor", theirs)
        for name, module in list(sys.modules.items())
        if name.startswith("diffusers.") and "randn_tensor" in vars(module)
    ]
    patched.append((ours, "seeded_noise", lambda seeds: lambda like: torch.randn(like.shape, generator=generator)))
    before = [getattr(module, name) for module, name, _ in patched]
    for module, name, value in patched:
        setattr(module, name, value)
    try:
        yield lambda: generator.manual_seed(seed) and None
    finally:
        for (module, name, _), value in zip(patched, before, strict=True):
            setattr(module, name, value)


def next_noise(channels: int, side: int) -> Tensor:
    """What comes next in `one_noise`."""
    return import_module("mezzotint.generate").seeded_noise([])(torch.empty(BATCH, channels, side, side))


def scheduler(sampler: str, folder: Path) -> Any:
    """The reference's scheduler that our sampler stands for, made from the one in a folder."""
    import diffusers

    name, extra = SCHEDULERS[sampler]
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return getattr(diffusers, name).from_config(settings, **extra)


def opened(kind: str, folder: Path) -> Any:
    """A pipeline of the reference library from disk."""
    import diffusers
    from diffusers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipeline = getattr(diffusers, kind).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, **call: Any) -> Drawn:
    """What a pipeline draws, and the latents behind it, which some pipelines do not give away."""
    step, seen = pipeline.scheduler.step, list[Tensor]()

    @functools.wraps(step)
    def watched(*args: Any, **options: Any) -> Any:
        result = step(*args, **options)
        seen[:] = [result.prev_sample]
        return result

    pipeline.scheduler.step = watched
    try:
        images = pipeline(**call).images
    finally:
        pipeline.scheduler.step = step
    return Drawn(seen[0][: len(images)], images)


def walked(
    network: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    steps: int,
    known: Tensor | None = None,
    strength: float = 1.0,
) -> Tensor:
    """The reference's schedulers around any network, from noise or from a picture's latents (`known`)."""
    scheduler.set_timesteps(steps)
    start = steps - int(steps * strength)
    x = noise * scheduler.init_noise_sigma
    if known is not None:
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        x = scheduler.add_noise(known, noise, scheduler.timesteps[start : start + 1])
    with torch.no_grad():
        for t in scheduler.timesteps[start:]:
            raw = network(scheduler.scale_model_input(x, t), t.expand(len(x)))
            x = scheduler.step(raw, t, x).prev_sample
    return x


def calmed(network: Any, seed: int = 0) -> None:
    """Random weights under which a run does not magnify the rounding of its first steps."""
    randomise(network, seed)
    with torch.no_grad():
        for parameter in network.conv_out.parameters():
            parameter.mul_(0.1)


def tiny_network(options: Mapping[str, Any], seed: int = 0) -> Any:
    from diffusers import UNet2DModel

    network: Any = UNet2DModel(**options).eval()
    calmed(network, seed)
    with torch.no_grad():
        if network.class_embedding is not None:
            network.class_embedding.weight.mul_(10)  # a class must make a difference
    return network


def tiny_folder(folder: Path, options: Mapping[str, Any], scheduler: Mapping[str, Any], kind: str = "DDPM") -> Path:
    """A DDPMPipeline or DDIMPipeline folder."""
    import diffusers

    schedule = getattr(diffusers, f"{kind}Scheduler")(**scheduler)
    getattr(diffusers, f"{kind}Pipeline")(unet=tiny_network(options), scheduler=schedule).save_pretrained(folder)
    return folder


def tiny_flat(source: Path, folder: Path, indexed: bool) -> Path:
    """As the first DDPMs were published: all in one folder, old names of attention, a pickle, few settings said."""
    from diffusers import UNet2DModel

    folder.mkdir()
    config = json.loads((source / "unet" / "config.json").read_text())
    late = ("add_attention", "attn_norm_num_groups", "class_embed_type", "downsample_type", "dropout",
            "num_class_embeds", "num_train_timesteps", "resnet_time_scale_shift", "upsample_type")  # fmt: skip
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in late}))
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors: dict[str, Tensor] = {}
    for name, tensor in UNet2DModel.from_pretrained(source, subfolder="unet").state_dict().items():
        for today, once in new.items():
            name = name.replace(f".{today}.", f".{once}.")
        tensors[name] = tensor
    torch.save(tensors, folder / f"{WEIGHTS}.bin")
    schedule = {
        "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02, "beta_schedule": "linear",
        "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "tensor_format": "pt",
        "timestep_values": None, "trained_betas": None, "variance_type": "fixed_small",
    }  # fmt: skip
    (folder / "scheduler_config.json").write_text(json.dumps(schedule))
    if indexed:
        shutil.copy(source / "model_index.json", folder)
    return folder


def network_config(folder: Path) -> UNetConfig:
    return UNetConfig.from_config(json.loads((folder / "unet" / "config.json").read_text()))


def stated(folder: Path, config: Mapping[str, Any], scheduler: Path | Mapping[str, Any] | None) -> None:
    """config.json and scheduler_config.json beside an original file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    if scheduler is not None:
        said = json.loads(scheduler.read_text()) if isinstance(scheduler, Path) else dict(scheduler)
        (folder / "scheduler_config.json").write_text(json.dumps(said))


def original_port(source: Path, folder: Path) -> Path:
    """The port of Ho's network in one pickle; its size and schedule beside it."""
    stated(folder, {"sample_size": SIDE}, source / "scheduler" / "scheduler_config.json")
    tensors = tiny_network(PLAIN).state_dict()
    torch.save(restored(tensors, ddpm(network_config(source))), folder / "model.ckpt")
    return folder / "model.ckpt"


def original_guided(source: Path, folder: Path, order: Order) -> Path:
    """An ADM in one pickle."""
    config = {"sample_size": SIDE, "attention_head_dim": 16, "_qkv_order": order}
    stated(folder, config, source / "scheduler" / "scheduler_config.json")
    tensors = tiny_network(GUIDED).state_dict()
    torch.save(restored(tensors, adm(network_config(source), order)), folder / "model.pt")
    return folder / "model.pt"


def original_improved(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """An improved DDPM that is told rescaled timesteps, in one pickle; and its tensors."""
    config = {"sample_size": SIDE, "num_attention_heads": 4, "_rescale_timesteps": True}
    stated(folder, config, {"_class_name": "DDPMScheduler", "num_train_timesteps": 4000, **COSINE})
    network = UNet(IMPROVED)
    calmed(network)
    tensors = restored(network.state_dict(), adm(IMPROVED, "legacy"))
    torch.save(tensors, folder / "model.pt")
    return folder / "model.pt", tensors


def improved_network(tensors: Mapping[str, Tensor], told: float = 0.25) -> Callable[[Tensor, Tensor], Tensor]:
    """Improved diffusion's network from its formulas; `told` is 1000 / 4000."""
    weights = Weights(tensors)
    return lambda x, t: guided_diffusion(
        weights, x, told * t, None, heads=lambda width: 4, order="legacy", layers=IMPROVED.layers_per_block
    )


def improved_run(network: Callable[[Tensor, Tensor], Tensor], folder: Path, steps: int) -> Tensor:
    """What the reference's DDPM makes of a network, under the scheduler file in a folder; inside `one_noise`."""
    from diffusers import DDPMScheduler

    return walked(network, DDPMScheduler.from_pretrained(folder), next_noise(3, SIDE), steps)


def labelled(pipeline: Any, label: list[int]) -> Any:
    """DDPMPipeline has no argument for classes: its network gets them from here."""
    pipeline.unet.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "class_labels": torch.tensor(label)}), with_kwargs=True
    )
    return pipeline


def draw(model: Model, sampler: str, steps: int, count: int = BATCH, **request: Any) -> Drawn:
    result = mz.generate(model, mz.Request(sampler=sampler, steps=steps, count=count, **request))
    return Drawn(result.latents, result.images)


def backbone_error(model: Model, theirs: Callable[[Tensor, Tensor], Tensor], label: list[int] | None = None) -> float:
    """The largest difference of raw outputs over the largest value."""
    x = torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([17, 803])
    with torch.no_grad():
        ours = model.backbone(x, t.float(), Conditioning(label=torch.tensor(label) if label else None))
        return relative(ours, theirs(x, t))


def plain_runs(folder: Path, model: Model) -> dict[str, float]:
    """Every sampler with which the reference's own pipelines draw: the name of the run -> error of its latents."""
    found: dict[str, float] = {}
    pipeline, implicit = opened("DDPMPipeline", folder), opened("DDIMPipeline", folder)
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("ddpm", 12, {}), ("ddpm", 25, {}), ("ddim", 10, {}), ("ddim", 7, {"eta": 0.6}), ("dpmpp_2m", 7, {}),
        ("dpmpp_2m", 16, {}), ("dpmpp_2m_karras", 8, {}), ("dpmpp_2m_sde", 8, {}), ("unipc", 8, {}),
        ("unipc_karras", 5, {}),
    ]  # fmt: skip
    for sampler, steps, extra in cases:
        drawer = implicit if sampler == "ddim" else pipeline
        drawer.scheduler = scheduler(sampler, folder)
        with one_noise() as anew:
            if sampler.startswith("unipc"):  # which the pipeline itself cannot call
                theirs = walked(lambda x, t: pipeline.unet(x, t).sample, drawer.scheduler, next_noise(3, SIDE), steps)
            else:
                theirs = run(drawer, batch_size=BATCH, num_inference_steps=steps, **extra).latents
            anew()
            ours = draw(model, sampler, steps, **extra).latents
        name = " ".join([f"{sampler} {steps}", *(f"{key} {value}" for key, value in extra.items())])
        found[name] = distance(ours, theirs)
    return found


def parity(root: Path) -> list[Row]:
    """How far ours is from the reference, on tiny random models."""
    return [plain_row(root), improved_row(root), guided_row(root)]


def plain_row(root: Path) -> Row:
    folder = tiny_folder(root / "ddpm", PLAIN, HO)
    model, alone = mz.load(folder), mz.load(original_port(folder, root / "port"))
    network = opened("DDPMPipeline", folder).unet
    with one_noise() as anew:
        first = draw(model, "ddpm", 8).latents
        anew()
        second = draw(alone, "ddpm", 8).latents
    error = backbone_error(model, lambda x, t: network(x, t).sample)
    return Row("DDPM", BOTH, error, runs=plain_runs(folder, model), original=distance(second, first))


def improved_row(root: Path) -> Row:
    path, tensors = original_improved(root / "improved")
    model = mz.load(path)
    with one_noise() as anew:
        theirs = improved_run(improved_network(tensors), path.parent, STEPS)
        anew()
        ours = draw(model, "ddpm", STEPS).latents
    error = backbone_error(model, improved_network(tensors, told=1.0))
    return Row("improved DDPM", BOTH[1:], error, runs={f"ddpm {STEPS}, learned variance": distance(ours, theirs)})


def guided_row(root: Path) -> Row:
    folder, label = tiny_folder(root / "adm", GUIDED, COSINE), CLASSES - 2
    pipeline, model = opened("DDPMPipeline", folder), mz.load(folder)
    network, labels = pipeline.unet, [label] * BATCH
    error = backbone_error(model, lambda x, t: network(x, t, class_labels=torch.tensor(labels)).sample, labels)
    apart: list[float] = []
    with one_noise() as anew:
        theirs = run(labelled(pipeline, labels), batch_size=BATCH, num_inference_steps=STEPS).latents
        anew()
        ours = draw(model, "ddpm", STEPS, label=label).latents
        for order in ORDERS:
            anew()
            alone = mz.load(original_guided(folder, root / f"adm-{order}", order))
            apart.append(distance(draw(alone, "ddpm", STEPS, label=label).latents, ours))
    runs = {f"ddpm {STEPS}, learned variance, by class": distance(ours, theirs)}
    return Row("ADM", BOTH, error, runs=runs, original=max(apart))

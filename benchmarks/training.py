"""Our training step against diffusers' published training loops, on the same weights and draws: time and peak memory.

    python benchmarks/training.py --rounds 9 --output training.json

The rows are full fine-tuning and LoRA (rank 16, attention) of a small text U-Net, a small DiT with classes and a small
MM-DiT, batch 4, float32, AdamW, gradients clipped at 1, a moving average where all trains. Ours is the loop's own step:
draw, gradients, the check for numbers that are not finite, optimiser, average; its latents and text come from its
caches. The reference is written after train_text_to_image.py, train_text_to_image_lora.py and
train_dreambooth_lora_sd3.py (there is no script for DiT; it gets the same structure): torch.optim.AdamW as it comes,
clip_grad_norm_, EMAModel. "script" has autoencoder and text encoders in every step, as those scripts do unless told
otherwise; "network" hands the reference latents and text computed before. Noise, times and pictures are handed to it
ready, so its data loader costs nothing here, and it takes the posterior's mean, so that both sides' losses are the
same; the column "error" says how far they are apart over all rounds.

Both sides run in one process, in turns. Memory is taken afterwards, every arm in a process of its own: "weights" is
what it holds when ready to train, "step" how much more its steps need at their peak, "all" both together. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from paired import Row, Work, measure, table
from PIL import Image
from torch import Tensor, nn

from mezzotint.files import write_json
from mezzotint.text.vocabulary import clip_vocabulary
from mezzotint.training import draws, parallel, recipe, step, weights
from mezzotint.training.loop import learning_rate
from mezzotint.training.methods import Place, method

library: Any = diffusers  # its annotations are narrower than what it takes
FACTOR, IMAGES, BATCH, RANK = 4, 16, 4, 16
CAPTIONS = ("a photo of a cracked solar cell", "the dark area of a cell", "a scratch across the plate", "a sound cell")
ADAPTED = {  # what "attention" stands for
    "mmdit": ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"],
    "unet": ["to_q", "to_k", "to_v", "to_out.0"],
    "dit": ["to_q", "to_k", "to_v", "to_out.0"],
}  # fmt: skip
PIPELINES = {"unet": "StableDiffusionPipeline", "dit": "DiTPipeline", "mmdit": "StableDiffusion3Pipeline"}
CASES = tuple(f"{kind}-{how}" for kind in PIPELINES for how in ("full", "lora"))
ARMS = ("script", "network", "ours")
WARM = 2  # steps before memory is at its peak: moments are made in the first


@dataclass(frozen=True, slots=True)
class Memory:
    """One arm of a case, in MiB over the process with its libraries imported."""

    case: str
    arm: str
    weights: float
    step: float
    all: float


# Models and data, written once.


def spread(network: Any, seed: int) -> Any:
    """Plain random weights everywhere, so that no layer is zero and none is skipped by luck."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
    return network.eval()


def vae(channels: int) -> Any:
    return spread(
        library.AutoencoderKL(
            block_out_channels=(32, 64, 128), down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, latent_channels=channels,
            shift_factor=0.0609 if channels == 16 else None, use_quant_conv=channels == 4,
            use_post_quant_conv=channels == 4,
        ),
        1,
    )  # fmt: skip


def clip(width: int, projected: bool, layers: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, projection_dim=width, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return spread((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), width)


def write_model(folder: Path, kind: str, tiny: bool) -> Path:
    """A pipeline's folder of one of the kinds."""
    layers, side = (1, 8) if tiny else (6, 32)
    scaled: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    if kind == "unet":  # heads of 64; the file's "attention_head_dim" is how many there are
        network = library.UNet2DConditionModel(
            sample_size=side, block_out_channels=(64, 64, 64) if tiny else (64, 128, 256),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(1, 1, 1) if tiny else (1, 2, 4), cross_attention_dim=384,
        )  # fmt: skip
        library.StableDiffusionPipeline(
            vae=vae(4), text_encoder=clip(384, False, layers), tokenizer=clip_vocabulary(), unet=spread(network, 0),
            scheduler=library.DDIMScheduler(**scaled, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(folder)  # fmt: skip
    elif kind == "dit":
        network = library.DiTTransformer2DModel(
            num_layers=2 if tiny else 12, num_attention_heads=2 if tiny else 6, attention_head_dim=64, sample_size=side,
            out_channels=8,
        )  # fmt: skip
        spread(network, 0)
        shared = network.transformer_blocks[0].norm1.emb.state_dict()  # as in released weights
        for block in network.transformer_blocks:
            block.norm1.emb.load_state_dict(shared)
        library.DiTPipeline(network, vae(4), library.DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    else:
        network = library.SD3Transformer2DModel(
            sample_size=side, patch_size=2, in_channels=16, out_channels=16, num_layers=2 if tiny else 6,
            attention_head_dim=64, num_attention_heads=2 if tiny else 6, joint_attention_dim=768,
            caption_projection_dim=128 if tiny else 384, pooled_projection_dim=768, pos_embed_max_size=side,
            qk_norm="rms_norm",
        )  # fmt: skip
        library.StableDiffusion3Pipeline(
            transformer=spread(network, 0), vae=vae(16), tokenizer=clip_vocabulary(), tokenizer_2=clip_vocabulary(),
            text_encoder=clip(384, True, layers), text_encoder_2=clip(384, True, layers), text_encoder_3=None,
            tokenizer_3=None, scheduler=library.FlowMatchEulerDiscreteScheduler(shift=3.0),
        ).save_pretrained(folder)  # fmt: skip
    return folder


def write_pictures(folder: Path, side: int) -> Path:
    folder.mkdir()
    rows: list[str] = []
    for i in range(IMAGES):
        coarse = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)], "label": i % 4}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def planned(root: Path, case: str, tiny: bool) -> recipe.Recipe:
    """The recipe of a case; no dropout of captions and no decay, which the two sides do differently."""
    kind, how = case.split("-")
    side = FACTOR * (8 if tiny else 32)
    content: dict[str, Any] = {
        "method": how, "out": str(root / case), "steps": 10**6, "batch": BATCH,
        "base": {"path": str(root / kind)}, "data": {"folder": str(root / "pictures"), "size": [side, side]},
        "optimiser": {"rate": 1e-4, "decay": 0.0, "schedule": "constant"},
        "ema": {"decay": 0.9999 if how == "full" else 0.0}, "loss": {"variance": 0.0},
    }  # fmt: skip
    content |= {"classes": {"dropout": 0.0}} if kind == "dit" else {"text": {"dropout": 0.0}}
    if kind == "mmdit":
        content["loss"] = {"density": "logit_normal"}
    if how == "lora":
        content["lora"] = {"rank": RANK, "targets": ["attention"]}
    return recipe.check(content, "benchmark")


# Our arm.


def ours(plan: recipe.Recipe) -> Work:
    """A step of the loop."""
    accelerator = parallel.join(plan)
    torch.manual_seed(draws.number(plan.seed, 0, "start"))
    job = method(plan, Place(Path(plan.out), accelerator.device, lambda what, done, total: None))
    prepared = weights.prepare(plan, job, accelerator, None)
    done, batch = 0, job.draw(0)

    def run() -> Tensor:
        nonlocal done, batch
        computed = step.gradients(plan, job, accelerator, prepared.networks, batch, done)
        upcoming = job.draw(done + 1)
        loss, _, _ = step.agree(plan, job, accelerator, batch, done, computed, False)
        weights.advance(prepared, plan, done, learning_rate(plan.optimiser, done, plan.steps))
        done, batch = done + 1, upcoming
        return torch.tensor(loss)

    return run


def record(plan: recipe.Recipe, steps: int) -> None:
    """What the reference is handed: the draws of every step, and where our low-rank matrices begin."""
    folder = Path(plan.out)
    torch.manual_seed(draws.number(plan.seed, 0, "start"))
    job = method(plan, Place(folder, torch.device("cpu"), lambda what, done, total: None))
    keys = ("index", "noise", "t", "label")
    batches = [{key: batch[key] for key in keys if key in batch} for batch in map(job.draw, range(steps))]
    torch.save(batches, folder / "draws.pt")
    network = job.trained[job.averaged]
    down = {key: value.clone() for key, value in network.state_dict().items() if ".lora_A." in key}
    torch.save({_module(key): value for key, value in down.items()}, folder / "down.pt")


def _module(key: str) -> str:
    """A module's name in any of the two libraries' state dicts."""
    return key.partition(".lora_A.")[0].removeprefix("base_model.model.")


# The reference's arm.


def theirs(plan: recipe.Recipe, case: str, encoders: bool) -> Work:
    """A training script's step; without `encoders` on latents and text that were computed before."""
    kind, how = case.split("-")
    assert plan.base is not None
    absent = dict.fromkeys(("text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"))
    pipeline = getattr(library, PIPELINES[kind]).from_pretrained(plan.base.path, **(absent if kind == "mmdit" else {}))
    network = pipeline.unet if kind == "unet" else pipeline.transformer
    draws_: list[dict[str, Tensor]] = torch.load(Path(plan.out) / "draws.pt")
    folder = Path(plan.data.folder)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    arrays = [np.array(Image.open(folder / row["file_name"])) for row in rows]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    prompts = [row["text"] for row in rows]

    trainable = adapted(network, kind, Path(plan.out) / "down.pt") if how == "lora" else whole(network)
    optimiser = torch.optim.AdamW(trainable, lr=plan.optimiser.rate, weight_decay=0.0)
    average: Any = None
    if how == "full":
        from diffusers.training_utils import EMAModel

        average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    latents = frozen_encoder(pipeline.vae, pixels)
    texts = text_reader(pipeline, kind, prompts)
    if not encoders:
        everything = torch.arange(len(rows))
        kept, read = latents(everything), texts(everything)
        latents, texts = kept.__getitem__, lambda index: tuple(part[index] for part in read)
        pipeline = None
    loss_of = losses(kind, network)
    step_number = 0

    def run() -> Tensor:
        nonlocal step_number
        drawn = draws_[step_number]
        loss = loss_of(latents(drawn["index"]), texts(drawn["index"]), drawn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if average is not None:
            average.step(network.parameters())
        step_number += 1
        return torch.tensor(loss.item())

    return run


def whole(network: Any) -> list[nn.Parameter]:
    """Everything trains; the reference's DiT drops labels by itself unless it is in evaluation mode."""
    network.requires_grad_(True)
    return list(network.parameters())


def adapted(network: Any, kind: str, start: Path) -> list[nn.Parameter]:
    """The script's adapter, beginning where ours does."""
    from peft import LoraConfig, get_peft_model

    network.requires_grad_(False)
    settings = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=ADAPTED[kind])
    if hasattr(network, "add_adapter"):
        network.add_adapter(settings)
    else:  # DiT has no adapters of its own in the reference
        get_peft_model(network, settings)
    stored: dict[str, Tensor] = torch.load(start)
    downs = {_module(key): p for key, p in network.named_parameters() if ".lora_A." in key}
    if downs.keys() != stored.keys():
        raise SystemExit(f"the sides adapt other modules: {sorted(downs.keys() ^ stored.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in downs.items():
            parameter.copy_(stored[name])
    return [p for p in network.parameters() if p.requires_grad]


def frozen_encoder(autoencoder: Any, pixels: Tensor) -> Callable[[Tensor], Tensor]:
    autoencoder.requires_grad_(False)
    scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0
    return lambda index: (autoencoder.encode(pixels[index]).latent_dist.mode() - shift) * scale


def text_reader(pipeline: Any, kind: str, prompts: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Text as the scripts read it: tokens made before, encoders run on every batch."""
    if kind == "dit":
        return lambda index: ()
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipeline, name, None) is not None:
            getattr(pipeline, name).requires_grad_(False)
    if kind == "unet":
        told = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
        ids = pipeline.tokenizer(list(prompts), **told).input_ids
        return lambda index: (pipeline.text_encoder(ids[index], return_dict=False)[0],)

    def read(index: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            said = [prompts[i] for i in index.tolist()]
            tokens, _, pooled, _ = pipeline.encode_prompt(said, None, None, do_classifier_free_guidance=False)
        return tokens, pooled

    return read


def losses(kind: str, network: Any) -> Callable[[Tensor, tuple[Tensor, ...], dict[str, Tensor]], Tensor]:
    """From clean latents, text and draws to the loss."""
    if kind == "mmdit":

        def flow(clean: Tensor, text: tuple[Tensor, ...], drawn: dict[str, Tensor]) -> Tensor:
            sigma = (drawn["t"] / 1000).view(-1, 1, 1, 1)
            noisy = (1.0 - sigma) * clean + sigma * drawn["noise"]
            raw = network(noisy, timestep=drawn["t"], encoder_hidden_states=text[0], pooled_projections=text[1])[0]
            return ((raw.float() - (drawn["noise"] - clean).float()) ** 2).reshape(len(clean), -1).mean(1).mean()

        return flow
    settings = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012} if kind == "unet" else {}
    schedule = library.DDPMScheduler(**settings)

    def epsilon(clean: Tensor, text: tuple[Tensor, ...], drawn: dict[str, Tensor]) -> Tensor:
        noisy = schedule.add_noise(clean, drawn["noise"], drawn["t"])
        if kind == "unet":
            raw = network(noisy, drawn["t"], text[0], return_dict=False)[0]
        else:
            raw = network(noisy, drawn["t"], class_labels=drawn["label"], return_dict=False)[0][:, :4]
        return F.mse_loss(raw.float(), drawn["noise"].float(), reduction="mean")

    return epsilon


# Measuring.


def arm(plan: recipe.Recipe, case: str, name: str) -> Work:
    return ours(plan) if name == "ours" else theirs(plan, case, encoders=name == "script")


def times(root: Path, case: str, rounds: int, tiny: bool) -> list[Row]:
    """A row against the script as it runs, and one against its network step."""
    plan = planned(root, case, tiny)
    record(plan, rounds + 1)
    rows: list[Row] = []
    for name in ("script", "network"):
        rows += measure(case, {name: arm(plan, case, name), f"ours / {name}": arm(plan, case, "ours")}, rounds)
        gc.collect()
    return rows


def resident(key: str = "VmRSS") -> float:
    """MiB of this process: now, or at its highest since that was reset (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def peak(root: Path, case: str, name: str, tiny: bool) -> Memory:
    """In this process, which has done nothing else yet."""
    import transformers  # noqa: F401 (every arm's libraries are there before it begins)

    plan = planned(root, case, tiny)
    if case.endswith("lora"):
        import peft  # noqa: F401
    import accelerate  # noqa: F401

    before = resident()
    run = arm(plan, case, name)
    gc.collect()
    ready = resident()
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(WARM):
        run()
    highest = resident("VmHWM")
    return Memory(case, name, ready - before, highest - ready, highest - before)


def memory_table(rows: Sequence[Memory]) -> str:
    lines = [f"{'case':<12}{'arm':<10}{'weights MiB':>14}{'step MiB':>12}{'all MiB':>12}"]
    lines += [f"{row.case:<12}{row.arm:<10}{row.weights:>14.0f}{row.step:>12.0f}{row.all:>12.0f}" for row in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> tuple[list[Row], list[Memory]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of every case (default 9)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="cases to run (default all)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own choice)")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to see that it runs; figures mean nothing")
    parser.add_argument("--output", type=Path, help="write the rows and the machine as JSON here")
    parser.add_argument("--arm", nargs=3, metavar=("ROOT", "CASE", "ARM"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.arm:
        root, case, name = chosen.arm
        print(json.dumps(asdict(peak(Path(root), case, name, chosen.tiny))))
        return [], []
    rows: list[Row] = []
    memory: list[Memory] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        write_pictures(root / "pictures", FACTOR * (8 if chosen.tiny else 32))
        for kind in dict.fromkeys(case.split("-")[0] for case in chosen.only):
            write_model(root / kind, kind, chosen.tiny)
        for case in chosen.only:
            print(f"{case} ...", flush=True)
            rows += times(root, case, chosen.rounds, chosen.tiny)
            for name in ARMS:
                words = [sys.executable, __file__, "--arm", str(root), case, name, "--threads", str(chosen.threads)]
                words += ["--tiny"] * chosen.tiny
                said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
                memory.append(Memory(**json.loads(said.splitlines()[-1])))
    machine = {
        "torch": torch.__version__, "diffusers": diffusers.__version__, "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(), "load_average": os.getloadavg(), "tiny": chosen.tiny, "batch": BATCH, "rank": RANK,
    }  # fmt: skip
    print(f"\n{table(rows)}\n\n{memory_table(memory)}")
    if chosen.output:
        found = {"machine": machine, "rows": [asdict(row) for row in rows], "memory": [asdict(row) for row in memory]}
        write_json(chosen.output, found)
    return rows, memory


if __name__ == "__main__":
    main()

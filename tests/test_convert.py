"""Converted checkpoints: nothing lost either way, the reference draws the same from them, the impossible is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import reference_flux2
import reference_sd
import reference_sd35
import reference_sdxl
import torch
from networks import randomise
from safetensors.torch import load_file, save_file
from text_parts import tiny_bert_tokenizer, tiny_clip
from torch import Tensor

import mezzotint as mz
from mezzotint.checkpoints import open_tensors, read_metadata, write_sharded, write_tensors
from mezzotint.errors import InputError
from mezzotint.families import to_folder
from mezzotint.families.convert import convert
from mezzotint.text.vocabulary import clip_vocabulary

VAE: dict[str, Any] = {
    "block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1,
}  # fmt: skip
LATENT = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}


def saved(root: Path, index: Mapping[str, Any], scheduler: Mapping[str, Any], **parts: Any) -> Path:
    """A model folder of networks with weights that hide nothing, as the reference writes them."""
    for seed, (name, network) in enumerate(parts.items()):
        randomise(network, seed)
        network.save_pretrained(root / name)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    listed = {name: ["diffusers", type(network).__name__] for name, network in parts.items()}
    listed["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (root / "model_index.json").write_text(json.dumps({**listed, **index}))
    return root


def sd(root: Path, kind: int, scheduler: Mapping[str, Any]) -> Path:
    """Stable Diffusion 1 or 2 with CLIP's own vocabulary."""
    from diffusers import AutoencoderKL

    words = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    extras = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    unet = reference_sd.tiny_unet(kind)
    saved(
        root,
        {"_class_name": "StableDiffusionPipeline", **words, **extras},
        scheduler,
        unet=unet,
        vae=AutoencoderKL(**VAE),
    )
    layers, act = (2, "quick_gelu") if kind == 1 else (23, "gelu")
    tiny_clip(root / "text_encoder", 64, layers=layers, act=act, heads=1, vocabulary=49408)
    clip_vocabulary().save_pretrained(root / "tokenizer")
    return root


def dit(root: Path) -> Path:
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    index = {"_class_name": "DiTPipeline", "id2label": {"0": "crack", "1": "scratch"}}
    scheduler = {"_class_name": "DDIMScheduler", "clip_sample": False}
    saved(root, index, scheduler, transformer=network, vae=AutoencoderKL(**VAE))
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():  # the reference stores what all blocks share once a block
        first = name.replace("transformer_blocks.1.norm1.emb", "transformer_blocks.0.norm1.emb")
        tensor.copy_(tensors[first])
    save_file(tensors, file, {"format": "pt"})
    return root


def unet(**more: Any) -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, **more,
    )  # fmt: skip


def ddpm(root: Path) -> Path:
    """Ho's network, of a size that was never published."""
    ported = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6}
    network = unet(**ported, attention_head_dim=None)
    return saved(root, {"_class_name": "DDPMPipeline"}, {"_class_name": "DDPMScheduler"}, unet=network)


def iddpm(root: Path) -> Path:
    scheduler = {
        "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range"
    }  # fmt: skip
    network = unet(out_channels=6, attention_head_dim=32, resnet_time_scale_shift="scale_shift", downsample_padding=1)
    return saved(root, {"_class_name": "DDPMPipeline"}, scheduler, unet=network)


def ldm(root: Path, scaling_factor: float = 1.0) -> Path:
    from diffusers import AutoencoderKL, VQModel

    network = unet(in_channels=3, out_channels=3, attention_head_dim=32, downsample_padding=1, norm_eps=1e-5)
    vq = scaling_factor == 1.0
    vae = (
        VQModel(**VAE, num_vq_embeddings=32, vq_embed_dim=3)
        if vq
        else AutoencoderKL(**VAE, latent_channels=3, scaling_factor=scaling_factor)
    )
    scheduler = {**LATENT, "beta_start": 0.0015, "beta_end": 0.0195}
    return saved(root, {"_class_name": "LDMPipeline"}, scheduler, unet=network, vqvae=vae)


def ldm_text(root: Path) -> Path:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    network = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=8,
        cross_attention_dim=64,
    )  # fmt: skip
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=48, max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=128, encoder_attention_heads=1,
            head_dim=64, d_model=64,
        )
    )  # fmt: skip
    index = {"_class_name": "LDMTextToImagePipeline", "tokenizer": ["transformers", "BertTokenizer"]}
    index["bert"] = ["latent_diffusion", "LDMBertModel"]
    scheduler = {**LATENT, "beta_start": 0.00085, "beta_end": 0.012}
    saved(root, index, scheduler, unet=network, vqvae=AutoencoderKL(**VAE), bert=bert)
    tiny_bert_tokenizer(root / "tokenizer")
    return root


def flux2_dev(root: Path) -> Path:
    """With the groups and levels of the autoencoder that original files imply."""
    from diffusers import AutoencoderKLFlux2

    reference_flux2.write(root, reference_flux2.DEV)
    shutil.rmtree(root / "vae")
    network = AutoencoderKLFlux2(block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=32)
    randomise(network)
    network.save_pretrained(root / "vae")
    return root


VELOCITY = {**LATENT, "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "sd1": lambda root: sd(root, 1, reference_sd.PNDM),
    "sd2 velocity": lambda root: sd(root, 2, VELOCITY),
    "sdxl": lambda root: reference_sdxl.write_base(root),
    "sdxl refiner": lambda root: reference_sdxl.write_refiner(root),
    "sdxl velocity, zero terminal": lambda root: reference_sdxl.write_velocity(root),
    "sd35 large": lambda root: reference_sd35.write(root, reference_sd35.LARGE),
    "sd35 medium without t5": lambda root: reference_sd35.write(root, reference_sd35.MEDIUM, with_t5=False),
    "flux2 dev": flux2_dev,
    "klein base": lambda root: reference_flux2.write(root, reference_flux2.BASE),
    "klein distilled": lambda root: reference_flux2.write(root, reference_flux2.DISTILLED),
    "dit": dit,
    "ddpm": ddpm,
    "iddpm": iddpm,
    "ldm": ldm,
    "ldm kl": lambda root: ldm(root, 0.22),
    "ldm text": ldm_text,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder of a kind, written once."""
    root, made = tmp_path_factory.mktemp("folders"), dict[str, Path]()

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = FOLDERS[kind](root / kind)
        return made[kind]

    return get


SINGLE = "model.safetensors"
PAIR = {"config.json", "scheduler_config.json"}  # beside a file of a shape that was never published
BESIDE = {kind: PAIR for kind in ("dit", "ddpm", "iddpm", "ldm", "ldm kl", "ldm text")}
BESIDE |= {kind: {"ae.safetensors"} for kind in ("flux2 dev", "klein base", "klein distilled")}


def tensors_of(root: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder by part and name."""
    files = sorted(root.rglob("*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.fixture(scope="module")
def converted(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A place with single/ made from a folder, and back/, the folder made from that."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = root = tmp_path_factory.mktemp("converted")
            there = convert(folder(kind), root / "single" / SINGLE, "single-file")
            assert {file.name for file in there.files} == {SINGLE} | BESIDE.get(kind, set())
            needs = None if BESIDE.get(kind) == PAIR and kind not in ("dit", "ldm text") else folder(kind)
            for name in ("vae", "tokenizer") if kind in ("dit", "ldm text") else ():  # parts beside the file
                if (folder(kind) / name).is_dir():
                    shutil.copytree(folder(kind) / name, root / "single" / name)
                    needs = None
            assert convert(root / "single" / SINGLE, root / "back", "diffusers", parts=needs).family == there.family
        return made[kind]

    return get


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_comes_back_from_a_single_file_to_the_bit(
    kind: str, folder: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    place = converted(kind)
    same(tensors_of(place / "back"), tensors_of(folder(kind)))
    convert(place / "back", tmp_path / SINGLE, "single-file")
    same(open_tensors(tmp_path / SINGLE), open_tensors(place / "single" / SINGLE))
    assert read_metadata(tmp_path / SINGLE) == read_metadata(place / "single" / SINGLE)


TEXT = {"prompt": "the crack", "num_inference_steps": 2, "output_type": "latent"}
CALLS: dict[str, dict[str, Any]] = {
    "sd2 velocity": TEXT,
    "sdxl": TEXT,
    "sd35 medium without t5": TEXT,
    "klein base": {**TEXT, "height": 64, "width": 64},
    "dit": {"class_labels": [1], "num_inference_steps": 2, "output_type": "np"},
    "iddpm": {"num_inference_steps": 2, "output_type": "np"},
    "ldm": {"num_inference_steps": 2, "output_type": "np"},
    "ldm text": {"prompt": "crack", "num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32},
}


@pytest.mark.parametrize("kind", CALLS)
def test_the_reference_draws_the_same_from_what_we_wrote(
    kind: str, folder: Callable[[str], Path], converted: Callable[[str], Path]
) -> None:
    import diffusers

    drawn: list[Tensor] = []
    for place in (folder(kind), converted(kind) / "back"):
        none = {"text_encoder_3": None, "tokenizer_3": None} if "without t5" in kind else {}  # as it wants to be told
        pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(place, **none)
        pipeline.set_progress_bar_config(disable=True)
        encoder = getattr(pipeline, "text_encoder", None)
        if kind.startswith(("sd1", "sd2")):
            encoder.__dict__["text_model"] = (
                encoder  # where diffusers 0.42 looks for the norm; transformers 5.6 moved it
            )
        pictures = pipeline(generator=torch.Generator().manual_seed(3), **CALLS[kind]).images
        drawn.append(torch.as_tensor(pictures))
    assert drawn[0].isfinite().all() and drawn[0].std() > 0
    assert (drawn[0] - drawn[1]).norm() <= 1e-5 * drawn[0].norm()


@pytest.mark.parametrize("kind", ["sd2 velocity", "sdxl velocity, zero terminal", "klein distilled", "klein base"])
def test_what_names_and_shapes_cannot_say_is_in_the_header(
    kind: str, folder: Callable[[str], Path], converted: Callable[[str], Path]
) -> None:
    ours, theirs = (
        mz.load(path, parts=folder(kind)).contract for path in (folder(kind), converted(kind) / "single" / SINGLE)
    )
    assert ours.process == theirs.process and ours.guidance == theirs.guidance and ours.size == theirs.size


# Left out, and said so.


def test_a_released_file_becomes_a_folder_and_what_it_carries_besides_is_named(
    converted: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = open_tensors(converted("sd2 velocity") / "single" / SINGLE)
    last = "cond_stage_model.model.transformer.resblocks.22."
    unread = {name.replace(".22.", ".23."): tensor for name, tensor in tensors.items() if name.startswith(last)}
    extras = {
        "model_ema.decay": torch.tensor(0.9999), "model_ema.diffusion_modelout2bias": torch.zeros(4),
        "betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000), "first_stage_model.loss.logvar": torch.ones(1),
        "cond_stage_model.model.text_projection": torch.eye(64), "cond_stage_model.model.logit_scale": torch.ones(()),
    }  # fmt: skip
    file = write_tensors(tmp_path / "released.safetensors", {**tensors, **unread, **extras})
    with pytest.raises(InputError, match="--prediction velocity"):
        convert(file, tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
    done = convert(file, tmp_path / "out", "diffusers", prediction="velocity")
    same(tensors_of(tmp_path / "out"), tensors_of(converted("sd2 velocity") / "back"))
    assert {len(names) for kind, names in done.left_out.items() if "EMA" in kind} == {2}
    assert sorted(name for names in done.left_out.values() for name in names) == sorted({**unread, **extras})
    assert mz.load(tmp_path / "out").process.prediction == "velocity"
    assert mz.load(tmp_path / "out").text.vocabulary.pad == 0  # pyright: ignore  # OpenCLIP's "!"
    convert(tmp_path / "out", tmp_path / SINGLE, "single-file")
    same(open_tensors(tmp_path / SINGLE), tensors)


def test_large_parts_are_written_in_pieces(
    folder: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[str, int, int]]()
    monkeypatch.setattr(to_folder, "write_sharded", lambda *a, **k: write_sharded(*a, **k, limit=200_000))
    source = converted("sd1") / "single" / SINGLE
    convert(source, tmp_path / "out", "diffusers", watch=lambda *told: seen.append(told))
    assert len(list((tmp_path / "out" / "unet").glob("diffusion_pytorch_model-*-of-*.safetensors"))) > 1
    same(tensors_of(tmp_path / "out"), tensors_of(folder("sd1")))
    assert {what for what, _, _ in seen} == {"unet", "vae", "text_encoder"}
    steps = [done for _, done, _ in seen]
    assert steps == sorted(steps) and steps[-1] == seen[0][2] == sum(t.nbytes for t in open_tensors(source).values())


def test_the_number_format_stays(converted: Callable[[str], Path], tmp_path: Path) -> None:
    tensors = open_tensors(converted("sd1") / "single" / SINGLE)
    half = write_tensors(tmp_path / "half.safetensors", tensors, dtype=torch.bfloat16)
    convert(half, tmp_path / "out", "diffusers")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    convert(tmp_path / "out", tmp_path / SINGLE, "single-file")
    same(open_tensors(tmp_path / SINGLE), open_tensors(half))


# Refused.


def edited(folder: Path, file: str, **values: Any) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("vae/config.json", {"scaling_factor": 0.3}, "scaling_factor = 0.3"),
        ("vae/config.json", {"norm_num_groups": 16}, "norm_num_groups = 16"),
        ("unet/config.json", {"attention_head_dim": 4}, "attention_head_dim = "),
        ("unet/config.json", {"flip_sin_to_cos": False}, "flip_sin_to_cos = False"),
        ("text_encoder/config.json", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("text_encoder/config.json", {"num_attention_heads": 4}, "num_attention_heads = 4"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "beta_end = 0.02"),
    ],
)
def test_what_a_single_file_cannot_say_is_refused_by_name(
    file: str, values: dict[str, Any], said: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = Path(shutil.copytree(folder("sd1"), tmp_path / "source"))
    edited(source, file, **values)
    with pytest.raises(InputError) as raised:
        convert(source, tmp_path / SINGLE, "single-file")
    assert said in str(raised.value) and "would be read back as" in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_nothing_that_is_there_is_overwritten_unasked(
    folder: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    source, single = folder("klein base"), converted("klein base") / "single" / SINGLE
    (tmp_path / SINGLE).write_text("mine")
    with pytest.raises(InputError, match=r"model\.safetensors exists.*--force"):
        convert(source, tmp_path / SINGLE, "single-file")
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    convert(source, tmp_path / SINGLE, "single-file", force=True)
    convert(source, tmp_path / "second.safetensors", "single-file")  # the autoencoder beside it is the same
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="mine"):
            convert(single, tmp_path / "mine", "diffusers", parts=source, force=force)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    for target in (source, source.parent):
        with pytest.raises(InputError, match="holds the source"):
            convert(source, target, "diffusers", force=True)


def test_sources_and_targets_that_make_no_sense(
    tiny_folder: Path, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    for source, target, layout, said in (
        (tmp_path / "absent", tmp_path / "x", "diffusers", "no such checkpoint"),
        (tiny_folder, tmp_path / "x.safetensors", "single-file", "one layout alone"),
        (folder("sd1"), tmp_path / "x", "single-file", "must end in .safetensors"),
        (folder("sd1"), tmp_path / "x", "onnx", "diffusers, single-file"),
    ):
        with pytest.raises(InputError, match=said):
            convert(source, target, layout)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("layout", "target"), [("diffusers", "out"), ("single-file", "out.safetensors")])
def test_a_full_disk_leaves_nothing(
    layout: str, target: str, folder: Callable[[str], Path], converted: Callable[[str], Path], tmp_path: Path
) -> None:
    """The system refuses every byte beyond 100 kB of a file, which is what a full disk looks like to a program."""
    resource = pytest.importorskip("resource")
    source = folder("ddpm") if layout == "single-file" else converted("ddpm") / "single" / SINGLE
    (tmp_path / "place").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mezzotint",
            "convert",
            str(source),
            str(tmp_path / "place" / target),
            "--layout",
            layout,
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        env={"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("mezzotint: cannot write"), done.stderr
    assert [path.name for path in (tmp_path / "place").iterdir() if path.suffix != ".json"] == []

"""A model folder: written and read back to the bit, opened by the reference library, and every wrong one refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import relative
from parts import (
    CLASSES,
    EPSILON,
    FLOW,
    bert_folder,
    changed,
    class_model,
    fixed,
    kl_codec,
    model,
    pixel_codec,
    plain_unet,
    text_unet,
    with_contract,
)  # fmt: skip
from safetensors.torch import load_file, save_file

from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.codec import Codec, LatentSpace
from mezzotint.codec.patch_pca import PatchPCA, PatchPCAConfig
from mezzotint.conditioning import Conditioning
from mezzotint.contract import FILE, ClassFacts, read_contract
from mezzotint.errors import InputError
from mezzotint.families import Model, load, save
from mezzotint.process import Prediction, Process, schedules
from mezzotint.text import minilm

WEIGHTS = "diffusion_pytorch_model.safetensors"


def dit_model() -> Model:
    config = DiTConfig(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, num_embeds_ada_norm=3
    )
    return model(fixed(DiT(config)), kl_codec(), classes=ClassFacts(names=CLASSES, null=3), process=FLOW)


def solar_model() -> Model:
    """The starter's shape: a lapped linear codec with whitened channels, and k = 4 mask maps."""
    linear = PatchPCA(PatchPCAConfig(pixel_channels=1, latent_channels=4, patch=8, overlap=2))
    codec = Codec(fixed(linear, seed=3), LatentSpace(scale=(0.5, 1.0, 2.0, 3.0), shift=(0.0, 0.1, -0.1, 0.2)))
    facts = ClassFacts(names=CLASSES, null=3)
    return model(plain_unet(4 + 16 + 4, 4, 4), codec, inpaint=4, classes=facts, process=FLOW, size=(128, 128))


def same(a: Model, b: Model, conditioning: Conditioning, channels: int, inputs: int) -> None:
    x, t = torch.randn(2, inputs, 16, 16), torch.tensor([10.0, 700.0])
    torch.testing.assert_close(a.backbone(x, t, conditioning), b.backbone(x, t, conditioning), rtol=0, atol=0)
    pixels = torch.rand(2, a.codec.pixel_channels, 32, 32) * 2 - 1
    torch.testing.assert_close(a.codec.encode(pixels), b.codec.encode(pixels), rtol=0, atol=0)
    z = torch.randn(2, channels, 8, 8)
    torch.testing.assert_close(a.codec.decode(z), b.codec.decode(z), rtol=0, atol=0)


@pytest.mark.parametrize(("make", "channels", "inputs"), [(class_model, 3, 3), (dit_model, 4, 4), (solar_model, 4, 24)])
def test_every_kind_of_part_comes_back_to_the_bit(
    tmp_path: Path, make: Callable[[], Model], channels: int, inputs: int
) -> None:
    made = make()
    saved = save(made, tmp_path / "m")
    found = load(tmp_path / "m")
    assert found.contract == saved.contract == changed(made.contract, weights=saved.contract.weights)
    assert found.path == tmp_path / "m" and found.family == "native"
    same(made, found, Conditioning(label=torch.tensor([1, 3])), channels, inputs)


def test_a_text_model_brings_its_encoder(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=10)
    made = model(text_unet(3, 3, encoder.width), pixel_codec(), encoder)
    save(made, tmp_path / "m")
    shutil.rmtree(tmp_path / "bert")
    found = load(tmp_path / "m")
    assert found.text is not None
    steer = found.text.encode(["a crack on the cell", "dark area"])
    same(made, found, steer, 3, 3)
    shutil.rmtree(tmp_path / "m" / "text_encoder")
    with pytest.raises(InputError, match=r"text is .* but None in .*text_encoder"):
        load(tmp_path / "m")


def test_the_reference_library_opens_the_parts(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

    velocity = Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY)
    made = model(plain_unet(4, 4, 4), kl_codec(), classes=ClassFacts(names=CLASSES, null=3), process=velocity)
    save(made, tmp_path / "m")
    unet = UNet2DModel.from_pretrained(tmp_path / "m", subfolder="unet")
    x, t, label = torch.randn(2, 4, 16, 16), torch.tensor([10, 700]), torch.tensor([1, 3])
    with torch.no_grad():
        ours = made.backbone(x, t.float(), Conditioning(label=label))
        assert relative(ours, unet(x, t, class_labels=label).sample) < 1e-5
        vae = AutoencoderKL.from_pretrained(tmp_path / "m", subfolder="vae")
        pixels = torch.rand(1, 3, 32, 32) * 2 - 1
        theirs = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
        assert relative(made.codec.encode(pixels), theirs) < 1e-5
        assert relative(made.codec.decode(theirs), vae.decode(theirs / 0.7 + 0.05).sample) < 1e-5
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "m", subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    for i in (0, 500, 999):
        alpha = velocity.level(i).alpha
        assert alpha == pytest.approx(scheduler.alphas_cumprod[i].item() ** 0.5, rel=1e-5, abs=3e-4)


def test_the_reference_library_walks_our_flow(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    process = Process(schedules.rectified_flow(shift=3.0), Prediction.FLOW)
    save(class_model(process=process), tmp_path / "m")
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "m", subfolder="scheduler")
    scheduler.set_timesteps(7)
    from mezzotint.sampling import SAMPLERS

    steps = SAMPLERS["flow_euler"].path(process, 7).steps
    assert [s.now.t for s in steps] == pytest.approx(scheduler.timesteps.tolist(), rel=1e-5)


def test_half_storage_halves_the_file_and_loads_as_asked(tmp_path: Path) -> None:
    made = class_model()
    save(made, tmp_path / "full")
    saved = save(made, tmp_path / "half", dtype=torch.float16)
    sizes = [(tmp_path / name / "unet" / WEIGHTS).stat().st_size for name in ("full", "half")]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    found = load(tmp_path / "half")
    assert found.dtype == torch.float32 and found.contract.weights == saved.contract.weights
    assert load(tmp_path / "half", dtype=torch.bfloat16).dtype == torch.bfloat16
    for ours, theirs in zip(found.backbone.parameters(), made.backbone.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.half().float(), rtol=0, atol=0)


def test_a_number_format_outside_the_contract_is_refused(tmp_path: Path) -> None:
    save(class_model(), tmp_path / "m")
    with pytest.raises(InputError, match=r"dtype is 'float32 or bfloat16' in .* but 'float16' in the request"):
        load(tmp_path / "m", dtype=torch.float16)
    forced = load(tmp_path / "m", dtype=torch.float16, force=True)
    assert forced.dtype == torch.float16 and "float16" in forced.contract.lineage.overrides[0]


def edit(path: Path, key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(tensors | {key: change(tensors[key])}, path, {"format": "pt"})


def reconfigure(folder: Path, **settings: object) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_weights_that_disagree_with_their_contract_are_refused_and_force_is_remembered(tmp_path: Path) -> None:
    save(class_model(), tmp_path / "m")
    edit(tmp_path / "m" / "unet" / WEIGHTS, "conv_in.bias", lambda t: t + 1e-6)
    with pytest.raises(InputError, match=r"weights is '.*' in .*contract\.json but '.*' in .*unet"):
        load(tmp_path / "m")
    (override,) = load(tmp_path / "m", force=True).contract.lineage.overrides
    assert override.startswith("weights is '")


def test_a_swapped_autoencoder_is_refused(tmp_path: Path) -> None:
    save(model(plain_unet(4, 4), kl_codec()), tmp_path / "m")
    edit(tmp_path / "m" / "vae" / WEIGHTS, "decoder.conv_in.bias", lambda t: -t)
    with pytest.raises(InputError, match=r"latent\.codec is .* in .*contract\.json but .* in .*vae"):
        load(tmp_path / "m")


def test_saving_refuses_a_codec_the_contract_does_not_speak_of(tmp_path: Path) -> None:
    made = model(plain_unet(4, 4), kl_codec())
    with pytest.raises(InputError, match=r"latent\.scale is 0\.7"):
        save(replace(made, codec=Codec(made.codec.autoencoder)), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda m: (m / FILE).unlink(), "contract.json is missing"),
        (lambda m: (m / "unet" / "config.json").unlink(), "has no backbone"),
        (lambda m: (m / "unet" / WEIGHTS).unlink(), "no such weights file"),
        (lambda m: (m / "vae" / "config.json").unlink(), "no such file.*vae"),
        (lambda m: (m / "unet" / "config.json").write_text("{}"), "_class_name is None; known here: UNet2DModel"),
        (lambda m: (m / "unet" / "config.json").write_text('{"_class_name": ["x"]}'), "_class_name is"),
        (lambda m: (m / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel", "layer": 3}'), "layer"),
        (lambda m: reconfigure(m, block_out_channels="big"), "not of the kind it must be"),
        (lambda m: reconfigure(m, norm_num_groups=0), "no network can be built|norm_num_groups"),
        (lambda m: reconfigure(m, block_out_channels=[10**12, 32]), "no network can be built"),
        (lambda m: reconfigure(m, layers_per_block=None), "not of the kind it must be"),
        (lambda m: reconfigure(m, in_channels=4), "in_channels is 3 in .* but 4 in"),
        (lambda m: reconfigure(m, down_block_types=["Odd", "AttnDownBlock2D"]), "no network can be built.*Odd"),
        (lambda m: edit(m / "unet" / WEIGHTS, "conv_in.bias", lambda t: t[:3]), "weights is|of another shape"),
        (lambda m: (m / "unet" / WEIGHTS).write_bytes((m / "unet" / WEIGHTS).read_bytes()[:-9]), "not an intact"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_line_or_two(tmp_path: Path, damage, says: str) -> None:
    save(class_model(), tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(InputError, match=says) as error:
        load(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_a_forced_load_of_misshapen_weights_is_still_refused(tmp_path: Path) -> None:
    save(class_model(), tmp_path / "m")
    edit(tmp_path / "m" / "unet" / WEIGHTS, "conv_in.bias", lambda t: t[:3])
    with pytest.raises(InputError, match=r"1 of another shape \(conv_in.bias \(3,\) for \(16,\)\)"):
        load(tmp_path / "m", force=True)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.safetensors", "", "is empty"),
        ("a.ckpt", "", "is empty"),
        ("a.txt", "", "no weights file by its ending"),
        ("f/model_index.json", '{"_class_name": "AudioPipeline"}', "is a folder of AudioPipeline, which is no family"),
        ("f/readme.md", "", "is a folder without a model"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, name: str, content: str, found: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    path = tmp_path / "f" if name.startswith("f/") else tmp_path / name
    with pytest.raises(InputError, match=found):
        load(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        load(tmp_path / "absent")


def test_an_older_model_is_replaced_and_a_users_folder_is_not(tmp_path: Path) -> None:
    save(class_model(), tmp_path / "m")
    later = save(with_contract(class_model(), size=(24, 24)), tmp_path / "m")
    assert read_contract(tmp_path / "m") == later.contract and later.contract.size == (24, 24)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.jpg").touch()
    with pytest.raises(InputError, match="is not a model folder"):
        save(class_model(), tmp_path / "mine")


def test_the_contract_on_disk_is_plain_json(tmp_path: Path) -> None:
    save(class_model(), tmp_path / "m")
    data = json.loads((tmp_path / "m" / FILE).read_text())
    assert Process.from_dict(data["process"]) == EPSILON and data["classes"]["names"] == list(CLASSES)


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    import mezzotint.generate
    import mezzotint.pipeline

    assert callable(mezzotint.generate) and callable(mezzotint.pipeline) and mezzotint.load is load
    assert set(mezzotint.__all__) <= set(dir(mezzotint))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mezzotint.nonsense

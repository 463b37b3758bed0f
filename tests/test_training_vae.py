"""The autoencoder of any model trains further: the reference's loss, an encoder that stays, parts that still fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_flux2
import reference_latent
import reference_sd
import reference_sd35
import torch
from networks import gradient_error, relative
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_parts import KL_VAE, full_recipe, image_folder, vae_recipe

import mezzotint as mz
from mezzotint import families
from mezzotint.codec import DECODING, Codec, LatentSpace
from mezzotint.contract import check_codec, read_contract
from mezzotint.data import folder
from mezzotint.errors import InputError
from mezzotint.training import loop, metrics, recipe, state
from mezzotint.training.codecs import find, read_codec, write_codec
from mezzotint.training.methods import Place
from mezzotint.training.methods.vae import Vae

diffusers = pytest.importorskip("diffusers")

SIDE = 32
WEIGHTS = "diffusion_pytorch_model.safetensors"
PLAIN = {"perceptual": 0.0, "adversarial": 0.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that all tests share, and checkpoints once they are asked for."""
    root = tmp_path_factory.mktemp("vae")
    image_folder(root / "train", 4, size=SIDE)
    return root


def indexed(root: Path, backbone: Any, kind: str, vae: Any) -> Path:
    """A model folder of a transformer and an autoencoder, its text encoders left out."""
    backbone.save_pretrained(root / "transformer")
    vae.save_pretrained(root / "vae")
    parts = {"transformer": ["diffusers", type(backbone).__name__], "vae": ["diffusers", type(vae).__name__]}
    (root / "model_index.json").write_text(json.dumps({"_class_name": kind, **parts}))
    return root


def sd1_folder(root: Path) -> Path:
    return reference_sd.write_plain(root)


def sd1_file(root: Path) -> Path:
    file = root / "sd1.safetensors"
    return file if file.exists() else reference_sd.saved(reference_sd.first_file(sd1_folder(root)), file)


def sd35_folder(root: Path) -> Path:
    options = {**reference_sd35.NETWORK, **reference_sd35.KINDS[reference_sd35.MEDIUM]}
    network = diffusers.SD3Transformer2DModel(**options)
    return indexed(root / "sd35", network, "StableDiffusion3Pipeline", reference_sd35.tiny_vae())


def klein_folder(root: Path) -> Path:
    vae = reference_flux2.tiny_vae(32, 32, True)
    return indexed(root / "klein", reference_flux2.tiny_transformer(False, 2), "Flux2KleinPipeline", vae)


def klein_file(root: Path) -> Path:
    """The autoencoder alone under its original names, as Black Forest Labs publish it."""
    return reference_flux2.original_vae(klein_folder(root / "source"), root / "ae.safetensors")


def ldm_folder(root: Path) -> Path:
    return reference_latent.unconditional(root / "ldm", "vq")


STABILITY = "Stability AI Community License (free below 1 M USD yearly revenue)"
# where it comes from, licence, scale and shift as published (None: statistics), class of the reference
STARTS: dict[str, tuple[Callable[[Path], Path], str, tuple[float, float] | None, str]] = {
    "sd1 folder": (sd1_folder, "CreativeML OpenRAIL-M", (0.18215, 0.0), "AutoencoderKL"),
    "sd1 file": (sd1_file, "CreativeML OpenRAIL-M", (0.18215, 0.0), "AutoencoderKL"),
    "sd35 folder": (sd35_folder, STABILITY, (1.5305, 0.0609), "AutoencoderKL"),
    "klein folder": (klein_folder, "Apache-2.0", None, "AutoencoderKLFlux2"),
    "klein file": (klein_file, "unknown", None, "AutoencoderKLFlux2"),
    "ldm folder": (ldm_folder, "MIT (code); the weights' licence is not stated in the files", (1.0, 0.0), "VQModel"),
}


def plan_of(place: Path, out: Path, start: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Two steps on colour pictures, on the distance and the bottleneck alone; `vae` adds to its table."""
    vae = {**PLAIN, **({} if start is None else {"start": str(start)}), **changes.pop("vae", {})}
    base = vae_recipe(place, steps=2, optimiser={"rate": 1e-3}, ema={"decay": 0.0}, checkpoints={"every": 100})
    data = {"folder": str(place / "train"), "size": [SIDE, SIDE], "channels": 3}
    return {**base, "out": str(out), "vae": vae, "data": data, **changes}


def train(plan: dict[str, Any], resume: bool = False, watch: loop.Watch | None = None) -> Path:
    outcome = loop.train(recipe.check(plan, "test"), resume, watch)
    assert outcome.finished
    return outcome.folder / loop.MODEL


def pictures(place: Path) -> Tensor:
    return folder.read(place / "train", (SIDE, SIDE), 3).pixels(torch.arange(4))


def squared(codec: Codec, pixels: Tensor) -> float:
    with torch.no_grad():
        return (codec.decode(codec.encode(pixels)) - pixels).square().mean().item()


def tensors(codec: Codec, decoding: bool) -> dict[str, Tensor]:
    stored = codec.autoencoder.state_dict()
    return {name: tensor for name, tensor in stored.items() if name.startswith(DECODING) is decoding}


@pytest.mark.parametrize("name", STARTS)
def test_the_decoder_of_every_family_trains_alone(place: Path, tmp_path: Path, name: str) -> None:
    """Encoder, units, licence and layout stay; the reference opens what is written, and finds the same numbers."""
    make, licence, scale, kind = STARTS[name]
    root = place if make in (sd1_folder, sd1_file) else tmp_path
    start = make(root)
    base = find(start)
    found = train(plan_of(place, tmp_path / "run", start))
    codec, at = read_codec(found)
    assert at == found and codec.decodes == (base.codec.digest(),) and codec.digest() != base.codec.digest()
    frozen, moved = (tensors(base.codec, decoding) for decoding in (False, True))
    assert frozen and all(torch.equal(tensor, tensors(codec, False)[key]) for key, tensor in frozen.items())
    assert all(not torch.equal(tensor, tensors(codec, True)[key]) for key, tensor in moved.items())
    assert codec.encoder_digest() == base.codec.encoder_digest()
    said = json.loads((found / "latent_space.json").read_text())
    assert (said["licence"], said["base"]) == (licence, base.codec.digest())
    assert codec.space == base.codec.space and codec.autoencoder.config == base.codec.autoencoder.config
    pixels = pictures(place)
    with torch.no_grad():
        assert torch.equal(codec.encode(pixels), base.codec.encode(pixels))
        theirs = getattr(diffusers, kind).from_pretrained(found).eval()
        latents = codec.encode(pixels)
        if scale is None:
            assert relative(latents, reference_encoded(theirs, pixels)) < 1e-5
            expected = reference_decoded(theirs, latents)
        else:
            assert codec.space == LatentSpace(*scale)
            told = theirs.config.scaling_factor, getattr(theirs.config, "shift_factor", None) or 0.0
            assert told == scale
            expected = theirs.decode(latents / scale[0] + scale[1]).sample
        assert relative(codec.decode(latents), expected) < 1e-5


def reference_encoded(theirs: Any, pixels: Tensor) -> Tensor:
    """FLUX.2's latents by the reference: means in patches, whitened by the statistics."""
    z = diffusers.Flux2Pipeline._patchify_latents(theirs.encode(pixels).latent_dist.mode())
    mean, deviation = statistics(theirs)
    return (z - mean) / deviation


def reference_decoded(theirs: Any, latents: Tensor) -> Tensor:
    mean, deviation = statistics(theirs)
    return theirs.decode(diffusers.Flux2Pipeline._unpatchify_latents(latents * deviation + mean)).sample


def statistics(theirs: Any) -> tuple[Tensor, Tensor]:
    mean, variance = (value.view(1, -1, 1, 1) for value in (theirs.bn.running_mean, theirs.bn.running_var))
    return mean, (variance + theirs.config.batch_norm_eps).sqrt()


@pytest.mark.parametrize("name", ["sd1 folder", "klein folder", "ldm folder"])
def test_the_loss_of_a_step_and_its_gradients_are_the_references(place: Path, tmp_path: Path, name: str) -> None:
    """The reference's posterior with the same noise and its divergence, or its codebook (not its older mistake)."""
    make, _, _, kind = STARTS[name]
    start = make(place if make is sd1_folder else tmp_path)
    weight, settings = 0.03, {"trains": "all", "kl": 0.03, "reconstruction": "l2", "codebook": 0.7}
    plan = recipe.check(plan_of(place, tmp_path / "run", start, vae=settings), "test")
    job = Vae(plan, Place(tmp_path, torch.device("cpu"), lambda *_: None))
    part = start / ("vqvae" if kind == "VQModel" else "vae")
    theirs = getattr(diffusers, kind).from_pretrained(part).train().double()
    job.network.double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in job.draw(3).items()}
    pixels, noise = batch["pixels"], batch["noise"]
    if kind == "VQModel":
        theirs.quantize.legacy = False
        codes, squeezed, _ = theirs.quantize(theirs.encode(pixels).latents)
        drawn = theirs.decode(codes, force_not_quantize=True).sample
        expected = (drawn - pixels).square().mean() + 0.7 * squeezed
    else:
        posterior = theirs.encode(pixels).latent_dist
        if kind == "AutoencoderKLFlux2":
            noise = diffusers.Flux2Pipeline._unpatchify_latents(noise)
        drawn = theirs.decode(posterior.mean + posterior.std * noise).sample
        expected = (drawn - pixels).square().mean() + weight * posterior.kl().mean() / pixels[0].numel()
    loss, numbers = job.loss(batch, 3)
    assert abs(loss.item() - expected.item()) < 1e-12 * abs(expected.item())
    assert ("loss/codebook" in numbers) is (kind == "VQModel") is not ("loss/kl" in numbers)
    loss.backward()
    expected.backward()
    assert gradient_error(job.network, theirs) < 1e-9


def test_a_decoder_that_trains_alone_is_told_nothing_of_the_posterior(place: Path, tmp_path: Path) -> None:
    """Whatever the weight of the divergence, the loss is the reference's distance; no gradient reaches the encoder."""
    start = sd1_folder(place)
    plan = recipe.check(plan_of(place, tmp_path / "run", start, vae={"kl": 7.0, "sample": False}), "test")
    job = Vae(plan, Place(tmp_path, torch.device("cpu"), lambda *_: None))
    theirs = diffusers.AutoencoderKL.from_pretrained(start / "vae")
    batch = job.draw(0)
    loss, numbers = job.loss(batch, 0)
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(batch["pixels"]).latent_dist.mode()).sample - batch["pixels"]
    assert abs(loss.item() - expected.abs().mean().item()) < 1e-6 and "loss/kl" not in numbers
    loss.backward()
    for key, parameter in job.network.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad is key.startswith(DECODING), key


def test_the_adversary_is_balanced_on_the_last_convolution(place: Path, tmp_path: Path) -> None:
    """Esser et al. 2021, eq. 7: both gradients on the weights that write the pixels, computed here again."""
    settings = {"adversarial": 0.5, "discriminator_channels": 8, "discriminator_layers": 2}
    plan = recipe.check(plan_of(place, tmp_path / "run", sd1_folder(place), vae=settings), "test")
    job = Vae(plan, Place(tmp_path, torch.device("cpu"), lambda *_: None))
    batch = job.draw(0)
    _, numbers = job.loss(batch, 0)
    drawn, _ = job.trained["autoencoder"](batch["pixels"], batch["noise"])
    last = job.network.decoder.conv_out.weight
    pulls = [
        torch.autograd.grad(value, last, retain_graph=True)[0].norm()
        for value in ((drawn - batch["pixels"]).abs().mean(), job.trained["discriminator"](drawn).mean())
    ]
    assert numbers["balance"].item() == pytest.approx((pulls[0] / (pulls[1] + 1e-4)).item(), rel=1e-4)


def test_a_decoder_learns_four_pictures(place: Path, tmp_path: Path) -> None:
    """The squared error falls to a small part, with the latents as they were."""
    start = sd1_folder(place)
    before = squared(read_codec(start)[0], pictures(place))
    optimiser = {"rate": 4e-3, "warmup": 5, "decay": 0.0}
    plan = plan_of(place, tmp_path / "run", start, steps=40, optimiser=optimiser, vae={"reconstruction": "l2"})
    codec, _ = read_codec(train(plan))
    assert squared(codec, pictures(place)) < 0.1 * before
    losses = [record["loss"] for record in metrics.read(tmp_path / "run") if "loss" in record]
    assert losses[-1] < 0.2 * losses[0]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, total: int, loss: float) -> None:
        if step == 3:
            raise Killed

    settings = {"steps": 4, "checkpoints": {"every": 2}, "ema": {"decay": 0.9}}
    start = sd1_folder(place)
    whole = train(plan_of(place, tmp_path / "whole", start, **settings))
    plan = plan_of(place, tmp_path / "broken", start, **settings)
    with pytest.raises(Killed):
        train(plan, watch=loop.Watch(step=kill))
    kept = state.newest(tmp_path / "broken" / loop.CHECKPOINTS)
    assert kept is not None and kept.name == "step-00000002"
    trained = load_file(kept / "autoencoder.safetensors")
    assert trained and all(name.removeprefix("network.").startswith(DECODING) for name in trained)
    broken = train(plan, resume=True)
    assert (whole / WEIGHTS).read_bytes() == (broken / WEIGHTS).read_bytes()
    other = shutil.copytree(start, tmp_path / "other")
    stored = load_file(other / "vae" / WEIGHTS)
    save_file({**stored, "decoder.conv_in.bias": stored["decoder.conv_in.bias"] + 1}, other / "vae" / WEIGHTS)
    shutil.rmtree(broken)
    state_of_plan = tmp_path / "broken" / loop.RECIPE
    shutil.move(start, tmp_path / "away")  # another autoencoder where the start was
    shutil.copytree(other, start)
    try:
        with pytest.raises(InputError, match="its codec had digest"):
            loop.train(recipe.read(state_of_plan), resume=True)
    finally:
        shutil.rmtree(start)
        shutil.move(tmp_path / "away", start)


def test_a_trained_decoder_takes_its_place_in_stable_diffusion(place: Path, tmp_path: Path) -> None:
    """The folder goes where vae/ was: the same latents are drawn, the reference decodes them to the same pixels."""
    start = sd1_folder(place)
    found = train(plan_of(place, tmp_path / "run", start))
    model = shutil.copytree(start, tmp_path / "model")
    shutil.rmtree(model / "vae")
    shutil.copytree(found, model / "vae")
    request = mz.Request(prompt="a crack", steps=2, width=SIDE, height=SIDE, seed=1)
    before, after = (mz.generate_batch(mz.load(path), [request])[0] for path in (start, model))
    assert torch.equal(before.latents, after.latents)
    theirs = diffusers.AutoencoderKL.from_pretrained(model / "vae")
    swapped = mz.load(model)
    with torch.no_grad():
        drawn = swapped.codec.decode(after.latents)
        assert relative(drawn, theirs.decode(after.latents / 0.18215).sample) < 1e-5
        assert relative(drawn, mz.load(start).codec.decode(before.latents)) > 1e-3
    assert find(model).codec.digest() == read_codec(found)[0].digest()
    part, whole = find(start / "vae"), find(start)  # a part of a model is under the model's licence
    assert (part.codec.digest(), part.at, part.licence) == (whole.codec.digest(), whole.at, whole.licence)


def ours(place: Path) -> Path:
    """A model of our own in the whitened latent space of an autoencoder of our own."""
    if not (place / "ours").exists():
        codec = train(plan_of(place, place / "codec", vae={"config": KL_VAE}))
        data = {"folder": str(place / "train"), "size": [SIDE, SIDE], "channels": 3}
        settings = {"steps": 1, "data": data, "codec": {"path": str(codec)}, "checkpoints": {"every": 9}}
        plan = full_recipe(place, "full", **settings)
        for table in ("inpaint", "validation"):
            del plan[table]
        shutil.copytree(train(plan), place / "ours")
    return place / "ours"


def test_our_models_take_a_decoder_of_their_own_latents_and_no_other(place: Path, tmp_path: Path) -> None:
    start = ours(place)
    contract = read_contract(start)
    first = train(plan_of(place, tmp_path / "first", start))
    second = train(plan_of(place, tmp_path / "second", first))  # trained further once more
    original = contract.latent.codec
    codec, at = read_codec(second)
    assert codec.decodes == (original, read_codec(first)[0].digest())
    assert check_codec(contract, start, codec, at) == contract  # and nothing is recorded as overridden
    assert codec.space == contract.latent.space() != LatentSpace()
    elsewhere = Codec(codec.autoencoder, LatentSpace(scale=2.0), codec.decodes)  # the same latents in other units
    with pytest.raises(InputError, match=r"latent.scale is .* but 2.0"):
        check_codec(contract, start, elsewhere, at)

    model = shutil.copytree(start, tmp_path / "model")
    shutil.rmtree(model / "vae")
    shutil.copytree(second, model / "vae")
    loaded = families.load(model)
    assert loaded.codec.digest() == codec.digest() and loaded.contract == contract
    saved = families.save(loaded, tmp_path / "saved")  # a copy that we write says so too
    assert families.load(tmp_path / "saved").codec.decodes == saved.codec.decodes == codec.decodes
    assert find(model / "vae").codec.space == find(start / "vae").codec.space == codec.space

    moved = train(plan_of(place, tmp_path / "moved", start, vae={"trains": "all"}))
    assert read_codec(moved)[0].decodes == () and read_codec(moved)[0].space == codec.space
    shutil.rmtree(model / "vae")
    shutil.copytree(moved, model / "vae")
    with pytest.raises(InputError, match=r"latent.codec is .* but ") as caught:
        families.load(model)
    assert f"in {model / 'contract.json'}" in str(caught.value) and f"in {model / 'vae'}" in str(caught.value)

    # a claim does not outlive the encoder that it was made for
    shutil.rmtree(model / "vae")
    shutil.copytree(second, model / "vae")
    shutil.copy(moved / WEIGHTS, model / "vae" / WEIGHTS)
    for path in (model, model / "vae"):
        with pytest.raises(InputError, match="are not those it was written for"):
            find(path)
    with pytest.raises(InputError, match="are not those it was written for"):
        families.load(model)


def test_a_base_learns_on_with_the_decoder_that_its_recipe_names(place: Path, tmp_path: Path) -> None:
    start = ours(place)
    found = train(plan_of(place, tmp_path / "decoder", start))
    data = {"folder": str(place / "train"), "size": [SIDE, SIDE], "channels": 3}
    plan = full_recipe(place, steps=1, out=str(tmp_path / "run"), data=data, base={"path": str(start)})
    for table in ("inpaint", "validation", "process", "backbone"):
        del plan[table]
    model = families.load(train({**plan, "codec": {"path": str(found)}}))
    assert model.codec.digest() == read_codec(found)[0].digest() != read_contract(start).latent.codec
    assert model.contract.latent == read_contract(start).latent


def test_a_new_flux2_autoencoder_keeps_its_units_as_statistics(place: Path, tmp_path: Path) -> None:
    """The reference's own class whitens with what is written."""
    config = {**KL_VAE, "block_out_channels": [8, 16], "latent_channels": 2}
    found = train(plan_of(place, tmp_path / "run", vae={"name": "flux2_vae", "config": config}))
    codec, _ = read_codec(found)
    latents, theirs = codec.encode(pictures(place)), diffusers.AutoencoderKLFlux2.from_pretrained(found)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3 and (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
    with torch.no_grad():
        assert relative(latents, reference_encoded(theirs, pictures(place))) < 1e-4


def test_a_new_codebook_learns(place: Path, tmp_path: Path) -> None:
    config = {**KL_VAE, "latent_channels": 3, "num_vq_embeddings": 32}
    settings = {"name": "vq", "config": config, "reconstruction": "l2"}
    train(plan_of(place, tmp_path / "run", steps=30, optimiser={"rate": 4e-3, "decay": 0.0}, vae=settings))
    records = [record for record in metrics.read(tmp_path / "run") if "loss" in record]
    assert records[-1]["loss/distance"] < 0.5 * records[0]["loss/distance"]


def test_what_cannot_be_trained_further_is_named(place: Path, tmp_path: Path) -> None:
    def job(start: Path | None, **vae: Any) -> Vae:
        plan = recipe.check(plan_of(place, tmp_path / "run", start, vae=vae), "test")
        return Vae(plan, Place(tmp_path, torch.device("cpu"), lambda *_: None))

    data = {"folder": str(place / "train"), "size": [SIDE, SIDE], "channels": 3}
    plan = full_recipe(place, steps=1, out=str(tmp_path / "pixels"), data=data)
    for table in ("inpaint", "validation"):
        del plan[table]
    with pytest.raises(InputError, match="has no autoencoder: it works on pixels"):
        job(train(plan))
    with pytest.raises(InputError, match=r"no such autoencoder or model: .*absent"):
        job(tmp_path / "absent")
    with pytest.raises(InputError, match="neither an autoencoder folder"):
        job(place)
    save_file({"lora_A.weight": torch.zeros(2)}, tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match="is a LoRA"):
        job(tmp_path / "lora.safetensors")
    with pytest.raises(InputError, match=r"vae.config is for a new autoencoder"):
        job(sd1_folder(place), config=KL_VAE)
    with pytest.raises(InputError, match=r'vae.trains = "decoder" needs a vae.start'):
        job(None, config=KL_VAE, trains="decoder")
    written = write_codec(find(sd1_folder(place)).codec, tmp_path / "codec")
    said = json.loads((written / "latent_space.json").read_text())
    (written / "latent_space.json").write_text(json.dumps({**said, "decodes": "abc"}))
    with pytest.raises(InputError, match="decodes must be a list of digests"):
        job(written)

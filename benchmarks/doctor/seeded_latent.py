"""Faults of the latent space: units, order, another autoencoder, overflow, damage, caches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from patient import (
    WEIGHTS,
    Patient,
    Unfit,
    autoencoder,
    contract,
    copied,
    generator,
    resealed,
    settings,
    tensors,
    uniform,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.codec.patch_pca import PatchPCAConfig, principal_components
from mezzotint.data import folder
from mezzotint.doctor.case import Case
from mezzotint.families import native

FAMILIES = (0.18215, 0.13025, 1.5305, 0.3611, 0.41407, 1.0)  # SD 1, SDXL, SD 3.5, FLUX, Kandinsky, none


def config(patient: Patient) -> dict[str, float]:
    return json.loads((patient.path / "vae" / "config.json").read_text())


def space(patient: Patient, change: Callable[[str, list[float]], Sequence[float]]) -> Patient:
    """Scale and shift of a native model by channel, with the digest of a codec that is used so."""

    def changed(facts: dict) -> None:  # pyright: ignore[reportMissingTypeArgument]
        latent = facts["latent"]
        for key in ("scale", "shift"):
            now = latent[key] if isinstance(latent[key], list) else [latent[key]] * latent["channels"]
            latent[key] = list(change(key, now))

    contract(patient, changed)
    resealed(patient)
    return patient


def scale_of_family(patient: Patient, rng: Random) -> Patient:
    """The scaling factor of another family, or none."""
    true = config(patient)["scaling_factor"]
    far = [value for value in FAMILIES if abs(torch.tensor(value / true).log()) > 0.35]
    settings(patient.path / "vae" / "config.json", scaling_factor=rng.choice(far))
    return patient


def scale_inverse(patient: Patient, rng: Random) -> Patient:
    """Divided where it should be multiplied."""
    true = config(patient)["scaling_factor"]
    if abs(torch.tensor(true).log()) < 0.2:
        raise Unfit("its scaling factor is nearly 1")
    settings(patient.path / "vae" / "config.json", scaling_factor=round(1 / true, 5))
    return patient


def scale_native(patient: Patient, rng: Random) -> Patient:
    """One factor on all channels."""
    factor = uniform(rng, 1.6, 4.0) ** rng.choice((-1, 1))
    return space(patient, lambda key, now: [v * factor for v in now] if key == "scale" else now)


def scale_dropped(patient: Patient, rng: Random) -> Patient:
    """The codec's statistics are not applied at all."""
    return space(patient, lambda key, now: [1.0 if key == "scale" else 0.0] * len(now))


def shift_dropped(patient: Patient, rng: Random) -> Patient:
    settings(patient.path / "vae" / "config.json", shift_factor=None)
    return patient


def shift_doubled(patient: Patient, rng: Random) -> Patient:
    settings(patient.path / "vae" / "config.json", shift_factor=2 * config(patient)["shift_factor"])
    return patient


def shift_added(patient: Patient, rng: Random) -> Patient:
    """A shift of another model's configuration, on one that has none: 0.4 to 0.9 of a deviation."""
    amount = uniform(rng, 0.4, 0.9) * rng.choice((-1, 1)) / config(patient)["scaling_factor"]
    settings(patient.path / "vae" / "config.json", shift_factor=round(amount, 5))
    return patient


def shift_native(patient: Patient, rng: Random) -> Patient:
    """The means of another data set: every channel off by 0.4 to 1 of its deviation."""
    scale = patient.contract["latent"]["scale"]
    return space(
        patient,
        lambda key, now: now if key == "scale" else [
            v + rng.choice((-1, 1)) * uniform(rng, 0.4, 1.0) / s for v, s in zip(now, scale, strict=True)
        ],
    )  # fmt: skip


def deranged(rng: Random, count: int) -> list[int]:
    """A permutation that leaves at most a third in place."""
    while True:
        order = rng.sample(range(count), count)
        if sum(i == j for i, j in enumerate(order)) <= count // 3:
            return order


def order(patient: Patient, rng: Random) -> Patient:
    """The same autoencoder with its latent channels in another order, in encoder and decoder alike."""
    if not patient.is_native:
        with autoencoder(patient) as found:
            count = found["post_quant_conv.weight"].shape[1]
            now = deranged(rng, count)
            both = now + [count + i for i in now]
            for name in ("quant_conv.weight", "quant_conv.bias"):
                found[name] = found[name][both]
            found["post_quant_conv.weight"] = found["post_quant_conv.weight"][:, now]
        return patient
    with autoencoder(patient, sealed=False) as found:
        now = deranged(rng, len(found["analysis"]))
        for name in ("analysis", "synthesis"):
            found[name] = found[name][now]
    return space(patient, lambda key, values: [values[i] for i in now])


def codec_other(patient: Patient, rng: Random) -> Patient:
    """Another autoencoder of the same architecture, with its own scaling factor."""
    shutil.rmtree(patient.path / "vae")
    copied(patient.nest.model("vae-other"), patient.path / "vae")
    return patient


def codec_refitted(sealed: bool) -> Callable[[Patient, Random], Patient]:
    """Principal components of other images under another rule for their signs, with statistics of their own."""

    def seed(patient: Patient, rng: Random) -> Patient:
        assert patient.data is not None
        facts = patient.contract
        own = PatchPCAConfig.from_config(config(patient))
        images = folder.read(patient.data, tuple(facts["size"]), own.pixel_channels)
        some = torch.tensor(rng.sample(range(len(images)), min(len(images) // 2, 400)))
        codec = principal_components(own, images.pixels(some).transpose(2, 3))
        signs = torch.where(torch.rand(own.latent_channels, generator=generator(rng)) < 0.5, -1.0, 1.0)
        with autoencoder(patient, sealed=False) as found:
            for name in ("analysis", "synthesis"):
                found[name] = codec.state_dict()[name] * signs.view(-1, 1, 1, 1)
            found["mean"] = codec.state_dict()["mean"]
        if sealed:
            z = native.read_autoencoder(patient.path / "vae", None).encode(images.pixels(some))
            of = {"scale": (1 / z.std((0, 2, 3))).tolist(), "shift": z.mean((0, 2, 3)).tolist()}
            space(patient, lambda key, now: of[key])
        return patient

    return seed


def overflow(patient: Patient, rng: Random) -> Patient:
    """Convolutions before a group norm grow, which takes the size out again: in float32 nothing changes.

    The codec's settings do not ask for float32, as those of SDXL's first release did.
    """
    config = patient.path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": False}))
    with autoencoder(patient) as found:
        before = [n.removesuffix(".conv1.weight") for n in found if n.endswith("conv1.weight") and "resnets" in n]
        for place in rng.sample(before, rng.choice((1, 2, 3))):
            factor = uniform(rng, 1e5, 1e6)
            for end in ("weight", "bias"):
                found[f"{place}.conv1.{end}"] *= factor
    return patient


def noisy_decoder(patient: Patient, rng: Random) -> Patient:
    """Weights of the decoder moved at random, by a share of their deviation."""
    share, draw = uniform(rng, 0.25, 0.6), generator(rng)
    with autoencoder(patient) as found:
        for name, tensor in found.items():
            if name.startswith(("decoder.", "synthesis")) and tensor.ndim > 1:
                found[name] = tensor + share * tensor.std() * torch.randn(tensor.shape, generator=draw)
    return patient


def decoder_other(patient: Patient, rng: Random) -> Patient:
    """The decoder of another training behind this encoder."""
    other = patient.nest.model("vae-other") / WEIGHTS
    if not other.is_file():
        raise Unfit("vae-other is not there")
    theirs = load_file(other)
    with autoencoder(patient) as found:
        for name in found:
            if name.startswith(("decoder.", "post_quant_conv.")):
                found[name] = theirs[name]
    return patient


def blurred(patient: Patient, rng: Random) -> Patient:
    """A decoder that gives back no detail: its pictures averaged over patches, or the components of little variance
    left out."""
    side, keep = rng.choice((5, 7, 9)), uniform(rng, 0.1, 0.25)

    def smooth(module: nn.Module, given: object, picture: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(picture, (side // 2,) * 4, mode="reflect"), side, stride=1)

    def change(case: Case) -> Case:
        case.bare.codec.autoencoder.get_submodule("decoder.conv_out").register_forward_hook(smooth)
        return case

    with autoencoder(patient) as found:
        if "synthesis" not in found:
            return replace(patient, change=change)
        found["synthesis"][max(1, round(keep * len(found["synthesis"]))) :] = 0
    return patient


# Caches of the training run.


def cached(patient: Patient) -> Patient:
    """The patient with a copy of the cache of its run, where that was made from the images of this seed."""
    if patient.nest.run(patient.name).is_symlink():
        raise Unfit("its cache was made from the images of another seed")
    return replace(patient, cache=copied(patient.nest.run(patient.name) / "cache", patient.scratch / "cache"))


def cache_file(patient: Patient, name: str) -> Path:
    assert patient.cache is not None
    found = sorted(file for file in patient.cache.glob("*.safetensors") if file.stem == name)
    if not found:
        raise Unfit(f"its run kept no cache of {name}")
    return found[0]


def cache_scaled(patient: Patient, rng: Random) -> Patient:
    """Latents of another scale under the header of this codec."""
    patient, factor = cached(patient), uniform(rng, 1.4, 6.0) ** rng.choice((-1, 1))
    with tensors(cache_file(patient, "train")) as found:
        found["latents"] = found["latents"] * factor
    return patient


def cache_turned(patient: Patient, rng: Random) -> Patient:
    """Latents of a codec with another basis under the header of this one."""
    patient = cached(patient)
    with tensors(cache_file(patient, "train")) as found:
        latents = found["latents"]  # (N, V, C, h, w)
        turn, _ = torch.linalg.qr(torch.randn(latents.shape[2], latents.shape[2], generator=generator(rng)))
        found["latents"] = torch.einsum("dc,nvchw->nvdhw", turn, latents)
    return patient


def cache_moved(patient: Patient, rng: Random) -> Patient:
    """Rows of other images: files were renamed, or listed in another order."""
    patient = cached(patient)
    with tensors(cache_file(patient, "train")) as found:
        found["latents"] = found["latents"].roll(rng.randint(1, len(found["latents"]) - 1), 0)
    return patient


def cache_text(patient: Patient, rng: Random) -> Patient:
    """Text states of another encoder under the header of this one."""
    patient = cached(patient)
    draw = generator(rng)
    with tensors(cache_file(patient, "text")) as found:
        states: Tensor = found["tokens"]
        turn, _ = torch.linalg.qr(torch.randn(states.shape[-1], states.shape[-1], generator=draw))
        found["tokens"] = states @ turn
    return patient

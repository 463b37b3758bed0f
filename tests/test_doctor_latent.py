"""What a codec does to the user's images: nothing, blur, noise, overflow in half precision."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from doctor_parts import FLOW
from parts import kl_codec, model, pixel_codec, plain_unet
from torch import Tensor
from torch.nn import functional as F

from mezzotint.codec import Codec
from mezzotint.contract import DtypeFacts
from mezzotint.data.folder import NO_LABEL
from mezzotint.doctor import fidelity
from mezzotint.doctor.case import Case
from mezzotint.doctor.pictures import Pictures
from mezzotint.doctor.probes import latent

SIDE, COUNT = 64, 6


def pictures() -> Pictures:
    """Noise whose power falls with the square of the frequency, as that of photographs does."""
    rng = torch.Generator().manual_seed(4)
    radius = (torch.fft.fftfreq(SIDE)[:, None] ** 2 + torch.fft.rfftfreq(SIDE)[None] ** 2).sqrt().clamp(min=1 / SIDE)
    spectrum = torch.fft.rfft2(torch.randn(COUNT, 3, SIDE, SIDE, generator=rng)) / radius
    pixels = torch.fft.irfft2(spectrum)
    pixels = (pixels / pixels.std() * 0.35).clamp(-1, 1)
    names = tuple(f"{i}.png" for i in range(COUNT))
    return Pictures(Path("images"), names, pixels, ("",) * COUNT, torch.full((COUNT,), NO_LABEL), COUNT)


class Blurred(Codec):
    """Decodes what is coarser than some eight pixels."""

    def decode(self, latents: Tensor) -> Tensor:
        small = F.interpolate(super().decode(latents), scale_factor=1 / 8, mode="area")
        return F.interpolate(small, scale_factor=8, mode="bilinear")


class Noisy(Codec):
    """Decodes with as much noise as there is picture."""

    def decode(self, latents: Tensor) -> Tensor:
        rng = torch.Generator().manual_seed(1)
        return super().decode(latents) + 0.35 * torch.randn(latents.shape, generator=rng)


def seen(codec: Codec) -> Case:
    return Case(Path("model"), model(plain_unet(codec.channels, codec.channels), codec, process=FLOW), pictures())


def causes(case: Case) -> list[tuple[str, str]]:
    return [(each.cause, each.grade) for each in fidelity.examine(case).findings]


def test_pixels_come_back_whole() -> None:
    checked = fidelity.examine(seen(pixel_codec()))
    assert checked.findings == ()
    assert checked.measures[0].value == pytest.approx(1.0)
    bands = fidelity.by_frequency(pictures().pixels, pictures().pixels)
    assert [band.kept for band in bands] == pytest.approx([1.0] * len(bands))


def test_what_is_kept_by_frequency_is_what_a_filter_keeps() -> None:
    """Of a picture times 0.7 the error is 0.3 of it at every frequency: 1 - 0.09 of the power is kept."""
    bands = fidelity.by_frequency(pictures().pixels, 0.7 * pictures().pixels)
    assert [band.kept for band in bands] == pytest.approx([0.91] * len(bands), abs=1e-5)


def test_a_line_keeps_what_the_decoder_keeps_of_contrast() -> None:
    class Pale(Codec):
        def decode(self, latents: Tensor) -> Tensor:
            return 0.6 * super().decode(latents)

    case = seen(Pale(pixel_codec().autoencoder))
    assert fidelity.line(case, pictures().pixels, 2) == pytest.approx(0.6, abs=1e-5)


def test_a_decoder_that_blurs_is_named_for_what_it_loses() -> None:
    assert causes(seen(Blurred(pixel_codec().autoencoder))) == [("latent.detail", "harmful")]


def test_blur_is_told_from_noise_by_the_power_that_comes_back() -> None:
    whole = [fidelity.Band(low, high, 0.98, 1.0) for low, high in pairwise(fidelity.EDGES)]
    lost, added = replace(whole[-1], kept=-0.2, power=0.4), replace(whole[-1], kept=-3.0, power=5.0)
    assert not fidelity._blurred(whole, 0.99) and not fidelity._noisy(whole)
    assert fidelity._blurred([*whole[:-1], lost], 0.85) == [lost]
    assert not fidelity._blurred([*whole[:-1], lost], 0.95)  # next to nothing of the images is in it
    assert fidelity._noisy([*whole[:-1], added]) and not fidelity._blurred([*whole[:-1], added], 0.5)


def test_a_damaged_decoder_is_named() -> None:
    assert causes(seen(Noisy(pixel_codec().autoencoder))) == [("latent.reconstruction", "broken")]


def test_pain_04_a_codec_that_overflows_in_half_precision_is_named_though_float32_is_unchanged() -> None:
    codec = kl_codec()
    case = seen(codec)
    before = codec.decode(codec.encode(pictures().pixels))
    assert latent.largest(case, pictures().pixels)[0] < latent.HALF
    network = codec.autoencoder
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "resnets.0.conv1" in name and name.startswith("decoder.mid"):
                parameter.mul_(1e6)  # the group norm behind it takes the size out again
    assert torch.allclose(codec.decode(codec.encode(pictures().pixels)), before, atol=1e-3)
    peak, where = latent.largest(case, pictures().pixels)
    assert peak > latent.HALF and "decoder.mid" in where
    halves = DtypeFacts(codec=("float32", "float16"))
    claimed = replace(case.bare, contract=case.bare.contract.model_copy(update={"dtypes": halves}))
    for bare, grade in ((claimed, "harmful"), (case.bare, "note")):
        found = latent.examine(replace(case, bare=bare, memory={})).findings
        assert ("latent.overflow", grade) in [(each.cause, each.grade) for each in found]

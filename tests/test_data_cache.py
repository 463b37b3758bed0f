"""Caches of latents and text: exact, mapped, bound to what made them; what cannot be right is said with its name."""

from __future__ import annotations

import shutil
import warnings
from collections import namedtuple
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from training_parts import KL_VAE, image_folder

from mezzotint.codec import Codec
from mezzotint.codec.kl_vae import KLVAE, KLVAEConfig
from mezzotint.conditioning import Conditioning
from mezzotint.data import cache, folder, table
from mezzotint.errors import InputError
from mezzotint.files import sha256_json


def kl_vae() -> KLVAE:
    torch.manual_seed(0)
    return KLVAE(KLVAEConfig.from_config({**KL_VAE, "in_channels": 1, "out_channels": 1})).eval()


def test_pain_04_a_half_precision_overflow_is_caught_at_caching(tmp_path: Path) -> None:
    """An autoencoder like SDXL's: its weights fit float16, its activations on bright pictures do not."""
    data = image_folder(tmp_path / "train", 3)
    for i in (0, 1):  # dim, so that they stay below 65,504
        Image.fromarray(np.random.default_rng(i).integers(120, 136, (16, 16)).astype(np.uint8)).save(data / f"{i}.png")
    images = folder.read(data, (16, 16), 1)
    network = kl_vae()
    with torch.no_grad():
        first = network.encoder.conv_in
        first.weight.copy_(first.weight.abs() * 3e4 / first.weight.abs().max())
    assert all(bool(p.half().isfinite().all()) for p in network.parameters())
    place = tmp_path / "latents.safetensors"
    exact = cache.latents(place, images, [()], Codec(network).encode, "a", Path("vae"))
    assert exact.isfinite().all() and 0.1 < float(exact.std()) < 10  # float32 has no trouble with it
    place.unlink()
    with pytest.raises(
        InputError, match=r"vae overflows on .*train/2.png: its latents are not finite in float16. Use fl"
    ):
        cache.latents(place, images, [()], Codec(network.half()).encode, "a", Path("vae"), dtype="float16", batch=1)
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_pain_04_latents_of_half_precision_do_not_serve_float32(tmp_path: Path) -> None:
    images, place = folder.read(image_folder(tmp_path / "train", 2), (16, 16), 1), tmp_path / "latents.safetensors"
    encode = lambda x: x / 3  # noqa: E731
    half = lambda x: encode(x.half())  # noqa: E731
    found = cache.latents(place, images, [()], half, "a", Path("vae"), dtype="float16")
    exact = encode(images.pixels(torch.arange(2)))
    assert found.dtype == torch.float32 and 0 < float((found[:, 0] - exact).abs().max()) < 1e-3
    with safe_open(place, framework="pt") as stored:
        header = stored.metadata()
    assert header["dtype"] == "float16" and header["data"] == images.manifest.digest and header["size"] == "16x16"
    with pytest.raises(InputError, match="was made with dtype float16, this run has float32 of vae"):
        cache.latents(place, images, [()], encode, "a", Path("vae"))
    with pytest.raises(ValueError, match=r"said to be made in float32, and came in torch.float16"):
        cache.latents(tmp_path / "b", images, [()], half, "a", Path("vae"))


def test_pain_04_latents_that_see_no_picture_are_refused_and_strange_ones_named(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "train", 3)
    Image.new("L", (16, 16)).save(data / "1.png")
    images, place = folder.read(data, (16, 16), 1), tmp_path / "latents.safetensors"
    with pytest.raises(InputError, match=r"the codec vae gives .*0.png latents that are all 0: it does not see"):
        cache.latents(place, images, [()], lambda x: torch.zeros_like(x), "a", Path("vae"))
    with pytest.warns(UserWarning, match=r"1 of 3 images of .*train are of one colour, 1.png first"):
        cache.latents(place, images, [()], lambda x: x, "a", Path("vae"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.latents(place, images, [()], lambda x: x, "a", Path("vae"))  # said once, when it is made
    far = r"latents of 1 of 3 images of .*train reach up to 59 \(1.png\)"  # black is -1
    with pytest.warns(UserWarning, match="of one colour"), pytest.warns(UserWarning, match=far):
        encode = lambda x: x + 60 * (x.mean((1, 2, 3), keepdim=True) == -1)  # noqa: E731
        cache.latents(tmp_path / "far", images, [()], encode, "a", Path("vae"))


class Words:
    """A text encoder whose rows are closed forms of the prompt; it notes what it was asked."""

    def __init__(self, length: int = 3) -> None:
        self.asked: list[list[str]] = []
        self.length = length

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        self.asked.append(list(prompts))
        return self.rows(prompts)

    def rows(self, prompts: Sequence[str]) -> Conditioning:
        value = torch.tensor([float(len(p)) for p in prompts])
        tokens = (value[:, None, None] + torch.arange(self.length * 2).view(1, self.length, 2) / 8).bfloat16()
        mask = torch.arange(self.length)[None] <= value[:, None]
        return Conditioning(tokens=tokens, mask=mask, pooled=value[:, None] * torch.tensor([[1.0, 1 / 3]]))


CAPTIONS = ["dog", "a", "dog", "", "bird", "ox"]


def test_text_rows_are_those_of_the_encoder_in_its_dtypes(tmp_path: Path) -> None:
    encode, place = Words(), tmp_path / "cache" / "text.safetensors"
    seen: list[tuple[int, int]] = []
    watch = lambda done, total: seen.append((done, total))  # noqa: E731
    rows = cache.text(place, CAPTIONS, encode, "e" * 64, Path("model"), batch=3, watch=watch)
    wanted = ["", "a", "bird", "dog", "ox"]
    assert cache.distinct(CAPTIONS) == wanted and encode.asked == [[""], ["a", "bird", "dog"], ["ox"]]
    assert seen == [(1, 5), (4, 5), (5, 5)]
    expected = Words().rows(wanted)
    for name in ("tokens", "mask", "pooled"):
        ours, theirs = getattr(rows, name), getattr(expected, name)
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        assert torch.equal(load_file(place)[name], theirs)
    again = cache.text(place, CAPTIONS, encode, "e" * 64, Path("model"))
    assert len(encode.asked) == 3 and torch.equal(_tokens(again), _tokens(rows))
    only = cache.text(
        tmp_path / "b", ["x"], lambda p: Conditioning(tokens=torch.ones(len(p), 2, 2)), "e", Path("model")
    )
    assert only.mask is None and only.pooled is None and only.tokens is not None and only.tokens.shape == (2, 2, 2)


def test_text_of_other_encoders_or_captions_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "text.safetensors"
    cache.text(place, CAPTIONS, Words(), "a" * 64, Path("old/model"))
    before = place.read_bytes()
    with pytest.raises(
        InputError, match=r"text.safetensors was made with encoders a{16}, this run has b{16} of new/mod"
    ):
        cache.text(place, CAPTIONS, Words(), "b" * 64, Path("new/model"))
    had, has = (sha256_json(cache.distinct(captions))[:16] for captions in (CAPTIONS, CAPTIONS[:3]))
    with pytest.raises(
        InputError, match=f"was made with captions {had}, this run has {has} of train. Delete the cache"
    ):
        cache.text(place, CAPTIONS[:3], Words(), "a" * 64, Path("old/model"), source=Path("train"))
    images = folder.read(image_folder(tmp_path / "train", 2), (16, 16), 1)
    with pytest.raises(InputError, match="was made with format mezzotint-text-1, this run has mezzotint-latents-2"):
        cache.latents(place, images, [()], lambda x: x, "a", Path("vae"))
    assert place.read_bytes() == before


@pytest.mark.parametrize("left", [0, 4, 60, -1])
def test_a_cache_cut_short_is_damaged(left: int, tmp_path: Path) -> None:
    place = tmp_path / "text.safetensors"
    cache.text(place, CAPTIONS, Words(), "a", Path("model"))
    place.write_bytes(place.read_bytes()[:left])
    with pytest.raises(InputError, match=r"text.safetensors is damaged .*; delete it"):
        cache.text(place, CAPTIONS, Words(), "a", Path("model"))


def test_a_state_that_is_not_finite_names_its_caption(tmp_path: Path) -> None:
    """T5 in float16 overflows on some prompts."""

    def encode(prompts: Sequence[str]) -> Conditioning:
        rows = torch.ones(len(prompts), 2, 4, dtype=torch.float16)
        return Conditioning(
            tokens=torch.stack([r * (1e9 if p == "dog" else 1) for r, p in zip(rows, prompts, strict=True)])
        )

    with pytest.raises(
        InputError, match=r"encoders of model overflow on 'dog': its tokens in torch.float16 are not finite"
    ):
        cache.text(tmp_path / "text", CAPTIONS, encode, "a", Path("model"))
    assert list(tmp_path.iterdir()) == []


def test_rows_that_do_not_fit_together_leave_nothing(tmp_path: Path) -> None:
    lengths: Iterator[int] = iter((3, 3, 4))
    with pytest.raises(ValueError, match="rows 3 on are"):
        cache.text(tmp_path / "a", CAPTIONS, lambda p: Words(next(lengths)).rows(p), "a", Path("model"), batch=2)
    with pytest.raises(ValueError, match="2 rows came"):
        table.write(tmp_path / "b", 3, {}, [{"x": torch.ones(2, 2)}])
    with pytest.raises(KeyboardInterrupt):
        table.write(tmp_path / "c", 4, {}, interrupted())
    assert list(tmp_path.iterdir()) == []


def interrupted() -> Iterator[dict[str, Tensor]]:
    yield {"x": torch.ones(2, 2)}
    raise KeyboardInterrupt


def test_a_cache_larger_than_the_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, calls = folder.read(image_folder(tmp_path / "train", 6), (16, 16), 1), []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(InputError, match=r"cannot write .*: it takes 0.0 GB and 0.0 GB are free. Free space or choose"):
        cache.latents(tmp_path / "out", images, [()], lambda x: calls.append(x) or x, "a", Path("vae"), batch=2)
    assert len(calls) == 1 and not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    """The system refuses every byte beyond 100 kB of a file, which is what a full disk looks like to a program."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            InputError, match=r"cannot write .*x.safetensors: File too large. Free space or choose another"
        ):
            table.write(tmp_path / "x.safetensors", 100, {}, ({"x": torch.ones(10, 1000)} for _ in range(10)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_a_cache_is_never_whole_in_memory(tmp_path: Path) -> None:
    """40 MB in batches of 400 kB: neither writing nor reading needs memory of that order; rows are the file's."""
    place, part = tmp_path / "x", torch.arange(100_000, dtype=torch.float32).view(4, -1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmHWM")
    table.write(place, 400, {}, ({"x": part + i} for i in range(100)))
    assert place.stat().st_size > 40e6 and status("VmHWM") - before < 8e6
    before = status("RssAnon")
    rows = table.read(place)[1]["x"]
    for i in range(0, 400, 4):
        assert torch.equal(rows[i : i + 4], part + i // 4)
    assert status("RssAnon") - before < 8e6  # pages of the file are the system's to drop


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _tokens(rows: Conditioning) -> Tensor:
    assert rows.tokens is not None
    return rows.tokens

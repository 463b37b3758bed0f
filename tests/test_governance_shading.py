"""The watermark in start noise against closed forms: standard normal still, found where it is and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mezzotint.errors import InputError
from mezzotint.governance import shading
from mezzotint.governance.shading import Key

KEY, OTHER = Key.of(bytes(range(32))), Key.of(bytes(range(1, 33)))
SHAPE = (4, 32, 32)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mark(seed: int) -> tuple[bytes, bytes]:
    return shading.nonce_of(KEY, {"prompt": "a"}, seed), shading.payload_of(KEY, b"abcd")


def test_the_payload_comes_back_and_magnitudes_are_the_seeds() -> None:
    n = noise(0)
    z = shading.shaded(n, KEY, *mark(0))
    assert torch.equal(z.abs(), n.abs())
    found = shading.read(z, KEY, *mark(0))
    assert found.payload == bytes.fromhex(KEY.id) + b"abcd" and found.accuracy == 1.0
    assert found.share == 1.0
    assert found.log_chance == pytest.approx(-n.numel() * math.log(2)) and found.found(tried=10**9)


def test_marked_noise_is_standard_normal() -> None:
    """Over many nonces: mean, variance, kurtosis, the share of positive numbers, and neighbours are independent."""
    z = torch.stack([shading.shaded(noise(i), KEY, *mark(i)) for i in range(200)]).double()  # 819 200 numbers
    count = z.numel()
    assert abs(float(z.mean())) < 4 / count**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    assert abs(float((z > 0).double().mean()) - 0.5) < 4 * 0.5 / count**0.5
    for other in (z.roll(1, -1), z.roll(1, 0), z.flatten(1).roll(64, 1).view_as(z)):  # beside it, the next picture's,
        assert abs(float((z * other).mean())) < 4 / count**0.5  # and where the payload repeats
    ranks = torch.distributions.Normal(0, 1).cdf(z.flatten()).sort().values
    gap = (ranks - torch.arange(1, count + 1) / count).abs().max()  # Kolmogorov and Smirnov
    assert float(gap) < 1.95 / count**0.5


def test_requests_and_seeds_have_nonces_of_their_own_and_the_same_have_one() -> None:
    facts = [{"prompt": "a", "steps": 20}, {"steps": 20, "prompt": "a"}, {"prompt": "b", "steps": 20}]
    nonces = [shading.nonce_of(KEY, each, seed) for each in facts for seed in (1, 2)]
    assert nonces[:2] == nonces[2:4] and len(set(nonces)) == 4
    assert shading.nonce_of(OTHER, facts[0], 1) != nonces[0]


def test_unmarked_pictures_match_by_chance_alone_whatever_they_look_like() -> None:
    """Even a picture all of whose noise is positive: the keystream is independent of it."""
    flat = torch.ones(SHAPE)
    count = flat.numel()
    equal = np.array([round(count * shading.read(flat, KEY, *mark(i)).share) for i in range(2000)])
    assert abs(equal.mean() - count / 2) < 4 * (count / 4 / 2000) ** 0.5
    assert equal.var() == pytest.approx(count / 4, rel=0.13)
    chances = np.exp([shading.log_tail(count, int(each)) for each in equal])
    for level in (0.5, 0.1, 0.01):
        assert abs((chances <= level).mean() - level) < 4 * (level / 2000) ** 0.5 + 0.01
    assert not any(shading.read(shading.shaded(noise(i), OTHER, *mark(i)), KEY, *mark(i)).found() for i in range(50))


def test_the_chance_is_the_exact_binomial_tail() -> None:
    for numbers, equal in ((10, 8), (10, 0), (64, 64), (100, 50), (4096, 2300)):
        exact = sum(math.comb(numbers, k) for k in range(equal, numbers + 1)) / 2**numbers
        assert shading.log_tail(numbers, equal) == pytest.approx(math.log(exact), abs=1e-9)


def test_a_mark_stands_in_a_noisy_estimate_and_more_trials_ask_for_more() -> None:
    z = shading.shaded(noise(3), KEY, *mark(3))
    rough = z + 3.0 * noise(4)  # nine parts of variance are the inversion's error
    found = shading.read(rough, KEY, *mark(3))
    share = 0.5 + math.atan(1 / 3.0) / math.pi  # of signs that survive, in closed form
    assert found.share == pytest.approx(share, abs=4 * 0.5 / z.numel() ** 0.5)
    assert found.found() and found.accuracy > 0.9
    weak = shading.Reading(b"", 0, 64, 0.5, math.log(1e-8))
    assert weak.found(tried=10) and not weak.found(tried=1000)


def test_the_right_one_of_many_marks_is_found_quickly() -> None:
    marks = [mark(i) for i in range(3000)]
    z = shading.shaded(noise(1), KEY, *marks[1234]) + 2.0 * noise(2)
    place, reading = shading.best(z, KEY, marks)
    assert place == 1234 and reading.found(len(marks))
    _, nothing = shading.best(noise(5), KEY, marks)
    assert not nothing.found(len(marks))
    with pytest.raises(InputError, match="no mark to look for"):
        shading.best(z, KEY, [])


def test_numbers_that_fill_no_octet_are_marked_too() -> None:
    odd = noise(0, (1, 7, 9))
    assert shading.read(shading.shaded(odd, KEY, *mark(0)), KEY, *mark(0)).share == 1.0
    assert shading.best(shading.shaded(odd, KEY, *mark(1)), KEY, [mark(0), mark(1)])[0] == 1


def test_a_key_is_made_once_and_kept_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEZZOTINT_HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="no such key"):
        shading.key_at()
    made = shading.key_at(create=True)
    place = tmp_path / "home" / "watermark.key"
    assert shading.key_at() == made == shading.key_at(create=True) and place.stat().st_mode & 0o777 == 0o600
    place.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        shading.key_at()
    for content, said in ((b"xyz", "hexadecimal"), (b"\xff\xfe", "hexadecimal"), (b"abcd", "at least 32 bytes")):
        place.unlink()
        place.touch(0o600)
        place.write_bytes(content)
        with pytest.raises(InputError, match=said):
            shading.key_at()

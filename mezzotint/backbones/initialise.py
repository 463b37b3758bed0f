"""How a network starts when it is trained from scratch."""

from __future__ import annotations

from torch import nn

from mezzotint.backbones.layers.attention import ImageAttention
from mezzotint.backbones.layers.resnet import ResnetBlock
from mezzotint.backbones.layers.transformer import SpatialTransformer
from mezzotint.backbones.unet import UNet


def initialise(network: nn.Module) -> nn.Module:
    """Set the start weights in place and return the network: every residual branch and the output begin at zero.

    U-Net (Ho et al. 2020, appendix B; Dhariwal & Nichol 2021, code): the second convolution of each residual block, the output
    projection of each attention and the last convolution are zero, so the network starts as its shortcuts and predicts 0.
    Class embeddings start small (standard deviation 0.02). All other layers keep PyTorch's own initialisation.
    """
    for part in network.modules():
        if isinstance(part, ResnetBlock):
            _zero(part.conv2)
        elif isinstance(part, ImageAttention):
            _zero(part.to_out[0])
        elif isinstance(part, SpatialTransformer):
            _zero(part.proj_out)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    if isinstance(network, UNet):
        _zero(network.conv_out)
    return network


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)

"""How a network starts when it is trained from scratch."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from mezzotint.backbones.dit import Block, DiT, Embedder
from mezzotint.backbones.unet import UNet
from mezzotint.layers.attention import ImageAttention
from mezzotint.layers.resnet import ResnetBlock
from mezzotint.layers.transformer import SpatialTransformer

Network = TypeVar("Network", bound=nn.Module)


def initialise(network: Network) -> Network:
    """Set the start weights of a U-Net or a DiT in place: residual branches and the output begin at zero.

    U-Net (Ho et al. 2020, appendix B; the code of Dhariwal & Nichol 2021): zero are the second convolution of each
    residual block, the last projection of each attention, and the last convolution; so the network starts as its
    shortcuts and predicts 0. Class embeddings start small (deviation 0.02). The rest keeps PyTorch's initialisation.
    DiT (Peebles & Xie 2023, section 3.2, adaLN-zero): zero are all modulations and the last layer; Xavier for the other
    linear layers; 0.02 for embedders, which start as copies of one another since every block stores its own.
    Other networks (a KL autoencoder) keep PyTorch's own initialisation and are refused with ValueError.
    """
    if isinstance(network, DiT):
        _dit(network)
    elif isinstance(network, UNet):
        _unet(network)
    else:
        raise ValueError(f"there is no start recipe for {type(network).__name__}")
    return network


def _unet(network: UNet) -> None:
    for part in network.modules():
        if isinstance(part, ResnetBlock):
            _zero(part.conv2)
        elif isinstance(part, ImageAttention):
            _zero(part.to_out[0])
        elif isinstance(part, SpatialTransformer):
            _zero(part.proj_out)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
    _zero(network.conv_out)


def _dit(network: DiT) -> None:
    for part in network.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            _zero_bias(part)
        elif isinstance(part, nn.Conv2d):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))  # it is a linear layer on patches
            _zero_bias(part)
    embedder: Embedder | None = None
    for part in network.modules():
        if isinstance(part, Block):
            _zero(part.norm1.linear)
            if embedder is None:
                embedder = part.norm1.emb
                for weight in (parameter for parameter in embedder.parameters() if parameter.ndim == 2):
                    nn.init.normal_(weight, std=0.02)
            else:
                part.norm1.emb.load_state_dict(embedder.state_dict())
    _zero(network.proj_out_1)
    _zero(network.proj_out_2)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def _zero_bias(layer: nn.Linear | nn.Conv2d) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)

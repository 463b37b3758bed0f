"""How a network starts when it is trained from scratch, and how a control network starts from its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from mezzotint.backbones.controlnet import STEM, ControlNet, ControlNetConfig, UNetControlNetConfig
from mezzotint.backbones.dit import Block, DiT
from mezzotint.backbones.flux2 import Flux2
from mezzotint.backbones.mmdit import MMDiT
from mezzotint.backbones.mmdit_controlnet import MMDiTControlNet, MMDiTControlNetConfig
from mezzotint.backbones.unet import UNet
from mezzotint.backbones.unet_config import UNetConfig
from mezzotint.errors import InputError
from mezzotint.layers.attention import ImageAttention
from mezzotint.layers.config import write_config
from mezzotint.layers.joint import JointBlock
from mezzotint.layers.resnet import ResnetBlock
from mezzotint.layers.transformer import SpatialTransformer

Network = TypeVar("Network", bound=nn.Module)

DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")  # what a U-Net has and its control network has not


def initialise(network: Network) -> Network:
    """Set the start weights of a backbone in place: residual branches and the output begin at zero.

    U-Net (Ho et al. 2020, appendix B; the code of Dhariwal & Nichol 2021): zero are the second convolution of each
    residual block, the last projection of each attention, and the last convolution; so the network starts as its
    shortcuts and predicts 0. Class embeddings start small (deviation 0.02). The rest keeps PyTorch's initialisation.
    DiT (Peebles & Xie 2023, section 3.2, adaLN-zero), and by the same rules MMDiT and FLUX.2: zero are all modulations
    and the last layer; Xavier for the other linear layers; 0.02 for embedders. A DiT's embedders start as copies of one
    another since every block stores its own.
    Other networks (a KL autoencoder) keep PyTorch's own initialisation and are refused with ValueError.
    """
    match network:
        case DiT():
            blocks = [part for part in network.modules() if isinstance(part, Block)]
            first = blocks[0].norm1.emb
            last = (network.proj_out_1, network.proj_out_2)
            _transformer(network, [first], [*(block.norm1.linear for block in blocks), *last])
            for block in blocks[1:]:
                block.norm1.emb.load_state_dict(first.state_dict())
        case MMDiT():
            blocks = [part for part in network.modules() if isinstance(part, JointBlock)]
            norms = [norm for block in blocks for norm in (block.norm1, block.norm1_context) if norm is not None]
            last = (network.norm_out.linear, network.proj_out)
            _transformer(network, [network.time_text_embed], [*(norm.linear for norm in norms), *last])
        case Flux2():
            shared = (network.double_stream_modulation_img, network.double_stream_modulation_txt)
            last = (network.single_stream_modulation, network.norm_out, network.proj_out)
            _transformer(network, [network.time_guidance_embed], [*shared, *last])
        case UNet():
            _unet(network)
        case _:
            raise ValueError(f"there is no start recipe for {type(network).__name__}")
    return network


def from_base(
    backbone: nn.Module, factor: int = 8, options: Mapping[str, object] | None = None
) -> ControlNet | MMDiTControlNet:
    """A control network that starts as a copy of the backbone's first half and changes nothing yet.

    U-Net (Zhang et al. 2023, section 3.2): the encoder down to the middle block is copied; 1x1 convolutions behind it
    and the last one of the fresh stem are zero. MMDiT: the first half of its blocks is copied; what reads the hint and
    the layers behind the blocks are zero. `factor` is pixels a latent, which the stem bridges; `options` are fields of
    the control network's config.json that shall differ. Weights are float32 of the base's values. InputError where the
    backbone can have no control network, or the options do not fit it.
    """
    chosen = dict(options or {})
    if isinstance(backbone, MMDiT):
        return _joint(backbone, chosen)
    if not isinstance(backbone, UNet):
        raise InputError(f"there is no control network for {type(backbone).__name__}: a U-Net or an MMDiT can have one")
    base = backbone.config
    kind = UNetControlNetConfig if isinstance(base, UNetConfig) else ControlNetConfig
    stem = {"conditioning_embedding_out_channels": _stem(factor, base.block_out_channels[0])}
    config = kind.from_config({**write_config(kind.of(cast(Any, base)), ""), **stem, **chosen})
    network = ControlNet(config)
    fresh = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
    _copy(network, {k: v for k, v in backbone.state_dict().items() if not k.startswith(DECODER)}, fresh)
    for layer in (network.controlnet_cond_embedding.conv_out, network.controlnet_down_blocks):
        _zero(layer)
    _zero(network.controlnet_mid_block)
    return network


def _joint(backbone: MMDiT, options: Mapping[str, object]) -> MMDiTControlNet:
    """The first half of an MMDiT's blocks, or as many as `options` say; the last block drops the text and cannot be."""
    base = backbone.config
    layers = options.get("num_layers", max(1, base.num_layers // 2))
    if not isinstance(layers, int) or not 0 < layers < base.num_layers:
        raise InputError(f"a control network of this model has 1 to {base.num_layers - 1} layers, not {layers!r}")
    half = {
        "num_layers": layers,
        "dual_attention_layers": [index for index in base.dual_attention_layers if index < layers],
        "force_zeros_for_pooled_projection": False,
    }
    config = MMDiTControlNetConfig.from_config({**write_config(base, ""), **half, **options})
    network = MMDiTControlNet(config)
    skipped = tuple(f"transformer_blocks.{index}." for index in range(layers, base.num_layers))
    skipped += ("norm_out.", "proj_out.")
    skipped += tuple(f"{name}." for name in ("pos_embed", "context_embedder") if getattr(network, name) is None)
    theirs = {name: value for name, value in backbone.state_dict().items() if not name.startswith(skipped)}
    _copy(network, theirs, ("controlnet_blocks.", "pos_embed_input."))
    _zero(network.controlnet_blocks)
    _zero(network.pos_embed_input)
    return network


def _copy(network: nn.Module, weights: Mapping[str, Tensor], fresh: tuple[str, ...]) -> None:
    """Put all weights in place; InputError where one is left over, or one that is not fresh is missing."""
    try:
        result = network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"these options of a control network do not fit its base: {error}") from error
    wrong = result.unexpected_keys + [name for name in result.missing_keys if not name.startswith(fresh)]
    if wrong:
        raise InputError(
            f"these options of a control network do not fit its base: {len(wrong)} weights, {wrong[0]} first"
        )


def _stem(factor: int, reach: int) -> tuple[int, ...]:
    """Widths of the hint's convolutions, each but the first halving the resolution.

    The published ones lead to 320 channels; a narrower base has them narrower in proportion, since at the picture's
    full resolution they would cost as much as the whole copied encoder.
    """
    halvings = factor.bit_length() - 1
    if factor != 1 << halvings:
        raise InputError(f"a control network halves its picture until it fits the latents; {factor} is no power of two")
    widths = (*STEM, *STEM[-1:] * halvings)[: halvings + 1]
    return tuple(max(8, round(min(1.0, reach / 320) * width / 8) * 8) for width in widths)


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


def _transformer(network: nn.Module, embedders: Iterable[nn.Module], zeros: Iterable[nn.Module]) -> None:
    """Xavier for every linear layer, and for a convolution on patches, which is one; then what starts otherwise."""
    for part in network.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for embedder in embedders:
        for weight in (parameter for parameter in embedder.parameters() if parameter.ndim == 2):
            nn.init.normal_(weight, std=0.02)
    for layer in zeros:
        _zero(layer)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)

"""Black Forest Labs' own layout of FLUX.2: the transformer's file and `ae.safetensors`."""

from __future__ import annotations

from mezzotint.backbones.flux2_config import Flux2Config
from mezzotint.checkpoints.keymap import Entry, Fused, Swapped, entry
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, size
from mezzotint.checkpoints.layouts.vae import vae, vae_config
from mezzotint.codec.flux2_vae import Flux2VAEConfig
from mezzotint.errors import InputError
from mezzotint.layers.config import write_config

AROUND = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
# in a double block: their stream, then what its parts are called in ours
STREAMS = {
    "img": {
        "attn.norm.query_norm.scale": "attn.norm_q.weight",
        "attn.norm.key_norm.scale": "attn.norm_k.weight",
        "attn.proj": "attn.to_out.0",
        "mlp.0": "ff.linear_in",
        "mlp.2": "ff.linear_out",
    },
    "txt": {
        "attn.norm.query_norm.scale": "attn.norm_added_q.weight",
        "attn.norm.key_norm.scale": "attn.norm_added_k.weight",
        "attn.proj": "attn.to_add_out",
        "mlp.0": "ff_context.linear_in",
        "mlp.2": "ff_context.linear_out",
    },
}
PROJECTIONS = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
QUANT = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}


def flux2(config: Flux2Config) -> list[Entry]:
    """Black Forest Labs' names of the transformer, without the `model.diffusion_model.` of whole-model files."""
    rows = [entry(theirs, ours) for theirs, ours in AROUND.items()]
    # theirs is (shift, scale), ours (scale, shift)
    rows.append(entry("final_layer.adaLN_modulation.1", "norm_out.linear", change=Swapped()))
    for index in range(config.num_layers):
        theirs, ours = f"double_blocks.{index}", f"transformer_blocks.{index}"
        for stream, names in STREAMS.items():
            rows += [entry(f"{theirs}.{stream}_{name}", f"{ours}.{name_ours}") for name, name_ours in names.items()]
            projections = [f"{ours}.attn.{name}" for name in PROJECTIONS[stream]]
            rows.append(entry(f"{theirs}.{stream}_attn.qkv", *projections, change=Fused((1, 1, 1))))
    for index in range(config.num_single_layers):
        theirs, ours = f"single_blocks.{index}", f"single_transformer_blocks.{index}"
        rows += [entry(f"{theirs}.{name}", f"{ours}.{name_ours}") for name, name_ours in SINGLE.items()]
    return rows


def flux2_config(shapes: Shapes) -> dict[str, object]:
    """The config.json of a transformer from its original file's names and shapes; InputError where they do not fit.

    Shapes cannot say how a head's channels fall to the four axes of positions (a quarter each), the base of the angles
    (2000) and the norms' epsilon (1e-6): all published files have these.
    """
    strange = sorted(name for name in shapes if not name.endswith((".weight", ".scale")))
    if strange:
        raise InputError(
            f"FLUX.2 has no tensor {strange[0]}; files in 8 or fewer bits cannot be read: take the bfloat16"
        )
    width, channels = size(shapes, "img_in.weight", 0), size(shapes, "img_in.weight", 1)
    out_channels, single = size(shapes, "final_layer.linear.weight", 0), "single_blocks.0"
    head = size(shapes, f"{single}.norm.query_norm.scale", 0)
    hidden = size(shapes, f"{single}.linear2.weight", 1) - width  # what attention and perceptron wrote, side by side
    if head % 8 or width % head:
        raise InputError(f"heads of {head} channels do not fit a width of {width} and four axes: this is no FLUX.2")
    config = Flux2Config(
        in_channels=channels,
        out_channels=None if out_channels == channels else out_channels,
        num_layers=counted(shapes, "double_blocks."),
        num_single_layers=counted(shapes, "single_blocks."),
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=size(shapes, "txt_in.weight", 1),
        timestep_guidance_channels=size(shapes, "time_in.in_layer.weight", 1),
        mlp_ratio=hidden / width,
        axes_dims_rope=(head // 4,) * 4,
        guidance_embeds="guidance_in.in_layer.weight" in shapes,
    )
    return write_config(config, "Flux2Transformer2DModel")


def flux2_vae(config: Flux2VAEConfig) -> list[Entry]:
    """The names of `ae.safetensors`: latent diffusion's, but for where the convolutions beside the latents stand."""
    elsewhere = {*QUANT.values(), "quantize.embedding"}
    rows = [row for row in vae(config) if row.theirs not in elsewhere]
    return [*rows, *(entry(theirs, ours) for theirs, ours in QUANT.items()), entry("bn", "bn")]


def flux2_vae_config(shapes: Shapes) -> dict[str, object]:
    """The config.json of an autoencoder from `ae.safetensors`' names and shapes; InputError where they do not fit.

    Shapes cannot say the groups of a norm (32), the epsilon beside the stored variance (1e-4) or the picture's size.
    """
    size(shapes, "bn.running_mean", 0)  # what no other autoencoder of these names has
    plain = vae_config(shapes)
    levels = range(counted(shapes, "decoder.up."))
    decoder = tuple(size(shapes, f"decoder.up.{level}.block.0.conv1.weight", 0) for level in levels)
    config = Flux2VAEConfig.from_config(
        {
            **{key: value for key, value in plain.items() if key not in ("scaling_factor", "shift_factor")},
            "decoder_block_out_channels": None if decoder == plain["block_out_channels"] else decoder,
            **{f"use_{ours}": f"{theirs}.weight" in shapes for theirs, ours in QUANT.items()},
        }
    )
    return write_config(config, "AutoencoderKLFlux2")

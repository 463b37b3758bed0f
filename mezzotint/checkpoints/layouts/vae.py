"""The autoencoders of latent diffusion and Stable Diffusion: Gaussian (KL) and vector-quantised (VQ)."""

from __future__ import annotations

from typing import Any

from mezzotint.checkpoints.keymap import Entry, entry
from mezzotint.checkpoints.layouts.ddpm import level, middle
from mezzotint.checkpoints.layouts.shapes import Shapes, counted, only, size


def vae(config: Any) -> list[Entry]:
    """The names of an autoencoder, as they follow `first_stage_model.`, for an AutoencoderKL or a VQModel.

    The decoder's levels count from the finest, the folder's from the coarsest. The projections of attention are 1x1
    convolutions; a file that stores them as matrices comes back as convolutions of the same numbers.
    """
    rows = [entry(name, name) for name in ("quant_conv", "post_quant_conv", "quantize.embedding")]
    for half in ("encoder", "decoder"):
        rows += [entry(f"{half}.{name}", f"{half}.{name}") for name in ("conv_in", "conv_out")]
        rows += [entry(f"{half}.norm_out", f"{half}.conv_norm_out"), *middle(f"{half}.mid", f"{half}.mid_block")]
    count, layers = len(config.block_out_channels), config.layers_per_block
    for index, kind in enumerate(config.down_block_types):
        theirs, ours = f"encoder.down.{index}", f"encoder.down_blocks.{index}"
        rows += level(theirs, ours, layers, kind.startswith("Attn"))
        rows.append(entry(f"{theirs}.downsample.conv", f"{ours}.downsamplers.0.conv"))
    for index, kind in enumerate(config.up_block_types):
        theirs, ours = f"decoder.up.{count - 1 - index}", f"decoder.up_blocks.{index}"
        rows += level(theirs, ours, layers + 1, kind.startswith("Attn"))
        rows.append(entry(f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv"))
    return rows


def vae_config(
    shapes: Shapes, *, scaling_factor: float | None = None, shift_factor: float | None = None
) -> dict[str, Any]:
    """The configuration of an AutoencoderKL, or of a VQModel where there is a codebook, from an original file's shapes.

    Shapes cannot say the latents' `scaling_factor` (0.18215 in Stable Diffusion 1 and 2, 0.13025 in XL, 1.0 in the
    LDMs over VQ codes, 1.5305 in Stable Diffusion 3) or `shift_factor` (0.0609 in Stable Diffusion 3, none elsewhere).
    None takes Stable Diffusion 3's where there are 16 channels without convolutions around them, 1.0 for a codebook,
    0.18215 for all others: a caller who knows that the file is an XL must say so. Nor the size of the pictures, nor
    how many groups a norm has (32 in all of them).
    """
    count, quantised = counted(shapes, "encoder.down."), "quantize.embedding.weight" in shapes
    latent = size(shapes, "decoder.conv_in.weight", 1)
    found: dict[str, Any] = {
        "_class_name": "VQModel" if quantised else "AutoencoderKL",
        "in_channels": size(shapes, "encoder.conv_in.weight", 1),
        "out_channels": size(shapes, "decoder.conv_out.weight", 0),
        "block_out_channels": tuple(size(shapes, f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(count)),
        "layers_per_block": only(
            "numbers of blocks", {counted(shapes, f"encoder.down.{i}.block.") for i in range(count)}
        ),
        "down_block_types": _types(shapes, "encoder.down", "DownEncoderBlock2D", count),
        "up_block_types": _types(shapes, "decoder.up", "UpDecoderBlock2D", count)[::-1],
        "latent_channels": latent,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in shapes,
    }
    if quantised:
        codes, width = (size(shapes, "quantize.embedding.weight", axis) for axis in (0, 1))
        scale = 1.0 if scaling_factor is None else scaling_factor
        return {**found, "num_vq_embeddings": codes, "vq_embed_dim": width, "scaling_factor": scale}
    quant, post = (f"{name}.weight" in shapes for name in ("quant_conv", "post_quant_conv"))
    third = latent == 16 and not quant and not post
    return {
        **found,
        "use_quant_conv": quant,
        "use_post_quant_conv": post,
        "scaling_factor": (1.5305 if third else 0.18215) if scaling_factor is None else scaling_factor,
        "shift_factor": (0.0609 if third else None) if shift_factor is None else shift_factor,
    }


def _types(shapes: Shapes, half: str, plain: str, count: int) -> tuple[str, ...]:
    attends = [f"{half}.{index}.attn.0.q.weight" in shapes for index in range(count)]
    return tuple(f"Attn{plain}" if attending else plain for attending in attends)

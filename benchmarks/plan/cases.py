"""What is planned and then really run: published families scaled down through their configurations, and the starter.

A case is plain data; `subject` makes what the planner sees, `real` the same with numbers in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mezzotint.backbones.flux2_config import Flux2Config
from mezzotint.backbones.mmdit import MMDiTConfig
from mezzotint.backbones.presets import dit, small_latent_unet, small_text_unet
from mezzotint.backbones.unet_config import ConditionalUNetConfig, UNetConfig
from mezzotint.codec import Codec
from mezzotint.codec.flux2_vae import Flux2VAEConfig
from mezzotint.codec.kl_vae import KLVAEConfig
from mezzotint.families.family import Asked
from mezzotint.families.model import Model
from mezzotint.plan import subject as subjects
from mezzotint.plan import zoo
from mezzotint.plan.encoders import Encoder
from mezzotint.plan.subject import Subject
from mezzotint.plan.zoo import Entry

STARTER = Path(__file__).parents[2] / "models" / "solar-cells"


@dataclass(frozen=True)
class Case:
    """A job on a model: options of `Job`, or of `Training` where `method` is said."""

    name: str
    model: str
    options: dict[str, Any]

    @property
    def trains(self) -> bool:
        return "method" in self.options


def _clip(width: int, layers: int) -> dict[str, Any]:
    return zoo.CLIP_L | {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width,
                         "num_hidden_layers": layers, "num_attention_heads": width // 64}  # fmt: skip


def _vae(channels: int, widths: tuple[int, ...], **more: Any) -> tuple[str, Any]:
    levels = len(widths)
    return "AutoencoderKL", partial(
        KLVAEConfig, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=widths, layers_per_block=2, latent_channels=channels, **more,
    )  # fmt: skip


def _sd1() -> ConditionalUNetConfig:
    return ConditionalUNetConfig(sample_size=32, block_out_channels=(96, 192, 384, 384), cross_attention_dim=256,
                                 attention_head_dim=4)  # fmt: skip


def _xl() -> ConditionalUNetConfig:
    return ConditionalUNetConfig(
        sample_size=32, block_out_channels=(64, 128, 256), attention_head_dim=(1, 2, 4), cross_attention_dim=512,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 4), addition_embed_type="text_time", addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=256 + 6 * 32,
    )  # fmt: skip


def _sd3() -> MMDiTConfig:
    return MMDiTConfig(
        sample_size=32, num_layers=8, num_attention_heads=8, attention_head_dim=64, joint_attention_dim=512,
        caption_projection_dim=512, pooled_projection_dim=512, pos_embed_max_size=64, qk_norm="rms_norm",
        dual_attention_layers=(0, 1, 2),
    )  # fmt: skip


def _flux() -> Flux2Config:
    return Flux2Config(num_layers=2, num_single_layers=4, num_attention_heads=6, joint_attention_dim=768,
                       guidance_embeds=False)  # fmt: skip


def _pixels() -> UNetConfig:
    return UNetConfig(
        sample_size=64, block_out_channels=(64, 128, 256), layers_per_block=2, freq_shift=1, flip_sin_to_cos=False,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=64,
    )  # fmt: skip


F8 = _vae(4, (32, 64, 128, 128))
F8_3 = _vae(16, (32, 64, 128, 128), scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False)  # fmt: skip
QWEN = zoo.QWEN3_4B | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4,
                       "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip
TABLE = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}
ENTRIES: dict[str, Entry] = {
    "sd1": Entry("sd1", ("UNet2DConditionModel", _sd1), F8, {"text_encoder": _clip(256, 6)}),
    "sdxl": Entry("sdxl", ("UNet2DConditionModel", _xl), F8,
                  {"text_encoder": _clip(256, 4), "text_encoder_2": _clip(256, 6) | {
                      "architectures": ["CLIPTextModelWithProjection"]}}, scheduler=zoo.EULER),
    "sd3": Entry("sd35", ("SD3Transformer2DModel", _sd3), F8_3,
                 {name: _clip(256, 4) | {"architectures": ["CLIPTextModelWithProjection"]}
                  for name in ("text_encoder", "text_encoder_2")}),
    "flux2": Entry("flux2", ("Flux2Transformer2DModel", _flux),
                   ("AutoencoderKLFlux2", partial(Flux2VAEConfig, block_out_channels=(32, 64, 128, 128))),
                   {"text_encoder": QWEN}, zoo.KLEIN[False]),
    "dit-s/2": Entry("dit", ("DiTTransformer2DModel", partial(dit, "S/2", 4, 8, 10, 32)), F8),
    "dit-b/4": Entry("dit", ("DiTTransformer2DModel", partial(dit, "B/4", 4, 8, 10, 32)), F8),
    "pixels": Entry("ddpm", ("UNet2DModel", _pixels), scheduler=TABLE),
    "latents": Entry("ldm", ("UNet2DModel", partial(small_latent_unet, 4, 4, None, 96, 32)), F8, scheduler=TABLE),
    "text": Entry("sd2", ("UNet2DConditionModel", partial(small_text_unet, 4, 4, 256, 96, 32)), F8,
                  {"text_encoder": _clip(256, 6)}, scheduler=zoo.VELOCITY),
}  # fmt: skip


def _draw(model: str, side: int, batch: int, **more: Any) -> Case:
    options = {"size": [side, side], "batch": batch, "images": batch, "steps": 3, **more}
    return Case(f"{model} {side} x{batch}{_said(more)}", model, options)


def _learn(model: str, method: str, side: int, batch: int, **more: Any) -> Case:
    options = {"method": method, "size": [side, side], "batch": batch, "images": 8, "steps": 4, **more}
    return Case(f"{model} {method} {side} x{batch}{_said(more)}", model, options)


def _said(more: dict[str, Any]) -> str:
    return "".join(f" {key}={value:g}" if not isinstance(value, str) else f" {value}" for key, value in more.items())


CASES: tuple[Case, ...] = (
    _draw("sd1", 256, 1), _draw("sd1", 256, 4), _draw("sd1", 384, 1), _draw("sd1", 512, 1, guidance=1.0),
    _draw("sdxl", 256, 1), _draw("sdxl", 512, 1), _draw("sdxl", 256, 4, sampler="heun"),
    _draw("sd3", 256, 1), _draw("sd3", 256, 4), _draw("sd3", 512, 1),
    _draw("flux2", 256, 1), _draw("flux2", 512, 1), _draw("flux2", 256, 4, guidance=1.0),
    _draw("dit-s/2", 256, 2), _draw("dit-s/2", 256, 8), _draw("dit-b/4", 256, 4), _draw("dit-b/4", 256, 16),
    _draw("pixels", 64, 4), _draw("pixels", 128, 4), _draw("latents", 256, 8), _draw("text", 256, 2),
    _draw("text", 512, 1, sampler="ddim"), _draw("solar-cells", 128, 1), _draw("solar-cells", 128, 16),
    _learn("sd1", "full", 256, 2), _learn("sd1", "full", 256, 2, recompute=True),
    _learn("sd1", "lora", 256, 2, rank=16), _learn("sd1", "full", 256, 4, accumulation=2),
    _learn("text", "full", 256, 4), _learn("text", "lora", 256, 4, rank=8),
    _learn("text", "controlnet", 256, 2), _learn("text", "lcm", 256, 2), _learn("text", "textual-inversion", 256, 2),
    _learn("sd3", "lora", 256, 1, rank=16), _learn("sd3", "full", 256, 2), _learn("flux2", "lora", 256, 1, rank=16),
    _learn("dit-s/2", "full", 256, 4), _learn("dit-s/2", "full", 256, 4, ema=False), _learn("dit-b/4", "full", 256, 8),
    _learn("latents", "full", 256, 8), _learn("pixels", "full", 64, 8), _learn("text", "vae", 128, 2),
)  # fmt: skip


def subject(model: str) -> Subject:
    """What the planner sees."""
    if model == "solar-cells":
        return subjects.native(STARTER)
    return subjects.of(model, *zoo.gathered(ENTRIES[model], Path(model)), Asked())


def real(planned: Subject) -> Model:
    """The model without text, with small random numbers."""
    backbone = planned.backbone[0].network(planned.backbone[1]).eval().requires_grad_(False)
    codec = planned.codec[0].network(planned.codec[1]).eval().requires_grad_(False)
    return Model(planned.contract, backbone, Codec(codec, planned.contract.latent.space()))


def spoken_by(planned: Subject) -> list[tuple[Encoder, torch.nn.Module]]:
    """The text encoders with numbers."""
    return [(encoder, encoder.build().eval().requires_grad_(False)) for encoder in planned.encoders]


def tokens(case: Case) -> int:
    """Positions that the backbone looks at, for the plot."""
    side = case.options["size"][0]
    return math.prod((side // 8, side // 8)) * case.options["batch"]

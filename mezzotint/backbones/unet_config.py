"""The two published configurations of the U-Net; both come down to one plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mezzotint.backbones.unet_plan import Plan, attention_of, heads_of, per_level
from mezzotint.errors import InputError
from mezzotint.layers.config import OURS, divides, one_of, read_config
from mezzotint.layers.stages import Attend, Common, Stage

ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """A U-Net of the DDPM, improved DDPM, ADM and unconditional LDM kind; the fields of a UNet2DModel's config.json.

    The last two are ours: what improved diffusion and ADM published and that class cannot say.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    # as many heads at every level, whatever attention_head_dim says
    num_attention_heads: int | None = field(default=None, metadata=OURS)
    # width of the clock's sinusoid; None: that of the first level
    clock_channels: int | None = field(default=None, metadata=OURS)

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> UNetConfig:
        """Read a UNet2DModel's config.json; InputError names any option that cannot be built."""
        fixed = {"center_input_sample": False, "time_embedding_type": "positional", "num_train_timesteps": None}
        return read_config(cls, data, fixed)

    def plan(self) -> Plan:
        """One stage for each block type: where attention stands, how resolution changes, how many heads."""
        scale_shift = _check_shared(self)
        one_of("class_embed_type", self.class_embed_type, (None, "timestep", "identity"))
        one_of("mid_block_type", self.mid_block_type, (None, "UNetMidBlock2D"))
        one_of("downsample_type", self.downsample_type, ("conv", "resnet"))
        one_of("upsample_type", self.upsample_type, ("conv", "resnet"))

        def stage(block_type: str, suffix: str, channels: int, layers: int, resample_type: str) -> Stage:
            attend = attention_of(block_type, suffix, ("", "Resnet", "Attn"))
            residual = block_type.startswith("Resnet") or (attend is Attend.PIXELS and resample_type == "resnet")
            heads = (
                heads_of(channels, self.attention_head_dim, self.num_attention_heads) if attend is Attend.PIXELS else 1
            )
            return Stage(channels, layers, attend, heads, 1, self.norm_num_groups, residual)

        deepest = self.block_out_channels[-1]
        mid = None
        if self.mid_block_type is not None:
            inherited = None if scale_shift else self.norm_num_groups  # the published rule, odd as it is
            groups = inherited if self.attn_norm_num_groups is None else self.attn_norm_num_groups
            attend = Attend.PIXELS if self.add_attention else Attend.NONE
            heads = 1
            if self.add_attention:
                heads = heads_of(deepest, self.attention_head_dim, self.num_attention_heads)
            mid = Stage(deepest, 1, attend, heads, 1, groups)
        time_channels = self.time_embedding_dim or 4 * self.block_out_channels[0]
        common = Common(
            time_channels=time_channels,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            scale_shift=scale_shift,
            dropout=self.dropout,
            downsample_padding=self.downsample_padding,
        )
        widths, layers = self.block_out_channels, self.layers_per_block
        down = [
            stage(block, "DownBlock2D", width, layers, self.downsample_type)
            for block, width in zip(self.down_block_types, widths, strict=True)
        ]
        up = [
            stage(block, "UpBlock2D", width, layers + 1, self.upsample_type)
            for block, width in zip(self.up_block_types, reversed(widths), strict=True)
        ]
        clock = self.clock_channels or widths[0]
        return Plan(common, tuple(down), mid, self.mid_block_scale_factor, tuple(up), clock, time_channels)


@dataclass(frozen=True, slots=True)
class ConditionalUNetConfig:
    """A U-Net of the Stable Diffusion 1.x, 2.x, SDXL and LCM kind; the fields of a UNet2DConditionModel's config.json.

    `attention_head_dim` is the NUMBER OF HEADS, as it is in every published file (a misnomer that cannot be undone
    there). `upcast_attention` is read and kept; scaled_dot_product_attention accumulates in float32 by itself.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    upcast_attention: bool | None = False
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    time_cond_proj_dim: int | None = None

    @classmethod
    def from_config(cls, data: Mapping[str, object]) -> ConditionalUNetConfig:
        """Read a UNet2DConditionModel's config.json; InputError names any option that cannot be built."""
        return read_config(cls, data, CONDITIONAL_FIXED)

    def plan(self) -> Plan:
        """One stage for each block type in the lists; text is read where the type says CrossAttn."""
        scale_shift = _check_shared(self)
        one_of("class_embed_type", self.class_embed_type, (None, "timestep", "identity", "projection"))
        one_of("addition_embed_type", self.addition_embed_type, (None, "text_time"))
        one_of("mid_block_type", self.mid_block_type, (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"))
        for needed in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if self.addition_embed_type and getattr(self, needed) is None:
                raise InputError(f"'addition_embed_type' = 'text_time' needs '{needed}'")
        count = len(self.block_out_channels)
        layers = per_level("layers_per_block", self.layers_per_block, count)
        heads = per_level("attention_head_dim", self.attention_head_dim, count)
        depth = per_level("transformer_layers_per_block", self.transformer_layers_per_block, count)

        def stage(block_type: str, suffix: str, level: int, extra: int) -> Stage:
            channels = self.block_out_channels[level]
            attend = attention_of(block_type, suffix, ("", "Resnet", "CrossAttn"))
            if attend is Attend.TEXT:
                divides("attention_head_dim", channels, heads[level])
            resample = block_type.startswith("Resnet")
            return Stage(channels, layers[level] + extra, attend, heads[level], depth[level], None, resample)

        mid = None
        if self.mid_block_type == "UNetMidBlock2DCrossAttn":
            divides("attention_head_dim", self.block_out_channels[-1], heads[-1])
            mid = Stage(self.block_out_channels[-1], 1, Attend.TEXT, heads[-1], depth[-1])
        elif self.mid_block_type == "UNetMidBlock2D":
            mid = Stage(self.block_out_channels[-1], 0)
        time_channels = self.time_embedding_dim or 4 * self.block_out_channels[0]
        common = Common(
            time_channels=time_channels,
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            scale_shift=scale_shift,
            dropout=self.dropout,
            context_channels=self.cross_attention_dim,
            linear_projection=self.use_linear_projection,
            downsample_padding=self.downsample_padding,
        )
        down = [stage(block, "DownBlock2D", level, 0) for level, block in enumerate(self.down_block_types)]
        up = [stage(block, "UpBlock2D", count - 1 - level, 1) for level, block in enumerate(self.up_block_types)]
        clock = self.block_out_channels[0]
        return Plan(common, tuple(down), mid, self.mid_block_scale_factor, tuple(up), clock, time_channels)


CONDITIONAL_FIXED: dict[str, object] = {
    "center_input_sample": False,
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}


def _check_shared(config: UNetConfig | ConditionalUNetConfig) -> bool:
    """Refuse what neither file kind may say; True when the time embedding scales as well as shifts."""
    count = len(config.block_out_channels)
    for name, types in (("down_block_types", config.down_block_types), ("up_block_types", config.up_block_types)):
        if len(types) != count:
            raise InputError(f"'{name}' names {len(types)} blocks but 'block_out_channels' has {count} levels")
    for channels in config.block_out_channels:
        divides("norm_num_groups", channels, config.norm_num_groups)
    one_of("act_fn", config.act_fn, ACTIVATIONS)
    one_of("downsample_padding", config.downsample_padding, (0, 1))
    one_of("resnet_time_scale_shift", config.resnet_time_scale_shift, ("default", "scale_shift"))
    return config.resnet_time_scale_shift == "scale_shift"

"""FLUX.2 (Black Forest Labs 2025): a flow transformer over text and image tokens, without a single bias."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.backbones.flux2_config import Flux2Config
from mezzotint.backbones.unet import needed
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.layers.attention import attend
from mezzotint.layers.embedding import TimestepEmbedding, sinusoid
from mezzotint.layers.rotary import rotary_table, rotate

CLOCK = 1000  # the clock's last tick, and what a guidance scale is multiplied by before its sinusoid
APART = 10  # the first reference stands at 10 on the axis of pictures, the second at 20; the new picture at 0
UNREAD = ("mask", "pooled", "time_ids", "label", "concat", "control", "skip")

Modulations = tuple[Tensor, ...]  # (B, 1, D) each: shift, scale and gate of every branch


def linear(in_channels: int, out_channels: int) -> nn.Linear:
    """A matrix: no layer of FLUX.2 adds a bias."""
    return nn.Linear(in_channels, out_channels, bias=False)


class Embedder(nn.Module):
    """e = perceptron(sinusoid t) + perceptron(sinusoid 1000 g); the second only where guidance was distilled."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.width = config.timestep_guidance_channels
        self.timestep_embedder = TimestepEmbedding(self.width, config.channels, bias=False)
        self.guidance_embedder = None
        if config.guidance_embeds:
            self.guidance_embedder = TimestepEmbedding(self.width, config.channels, bias=False)

    def forward(self, t: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
        # weights were trained on a time in [0, 1] and multiply it back: in float32 that is not always t
        embedding = self.timestep_embedder(self._sinusoid(t.float() / CLOCK).to(dtype))
        if self.guidance_embedder is not None:
            scale = needed(conditioning, "guidance").float()
            embedding = embedding + self.guidance_embedder(self._sinusoid(scale).to(dtype))
        return embedding  # (B, D)

    def _sinusoid(self, value: Tensor) -> Tensor:
        return sinusoid(value * CLOCK, self.width, cosine_first=True, shift=0.0)


class Modulation(nn.Module):
    """What the embedding does to all blocks of a kind: shift, scale and gate for each of `branches` branches."""

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.linear = linear(channels, 3 * branches * channels)
        self.parts = 3 * branches

    def forward(self, embedding: Tensor) -> Modulations:
        return self.linear(embedding)[:, None].chunk(self.parts, dim=-1)  # (B, 1, D) each


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) (1 + scale) + shift, the norm without weights."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)


def gated(x: Tensor) -> Tensor:
    """SwiGLU: silu(a) * b of two halves (Shazeer 2020, eq. 5)."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


class FeedForward(nn.Module):
    """W2 (silu(a) * b), where (a, b) = W1 x (Shazeer 2020, eq. 6, without biases)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = linear(channels, 2 * hidden)
        self.linear_out = linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(gated(self.linear_in(x)))


class JointAttention(nn.Module):
    """Attention over text and image tokens as one sequence, text first, each with projections of its own."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        channels, head = config.channels, config.attention_head_dim
        self.to_q, self.add_q_proj = linear(channels, channels), linear(channels, channels)
        self.to_k, self.add_k_proj = linear(channels, channels), linear(channels, channels)
        self.to_v, self.add_v_proj = linear(channels, channels), linear(channels, channels)
        self.to_out, self.to_add_out = nn.ModuleList([linear(channels, channels)]), linear(channels, channels)
        self.norm_q, self.norm_added_q = nn.RMSNorm(head, config.eps), nn.RMSNorm(head, config.eps)
        self.norm_k, self.norm_added_k = nn.RMSNorm(head, config.eps), nn.RMSNorm(head, config.eps)

    def forward(self, image: Tensor, text: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        q = torch.cat(
            [self.norm_added_q(self._split(self.add_q_proj(text))), self.norm_q(self._split(self.to_q(image)))], dim=1
        )  # (B, M + N, heads, d)
        k = torch.cat(
            [self.norm_added_k(self._split(self.add_k_proj(text))), self.norm_k(self._split(self.to_k(image)))], dim=1
        )
        v = torch.cat([self.add_v_proj(text), self.to_v(image)], dim=1)  # (B, M + N, D)
        joint = attend(rotate(q, table).flatten(2), rotate(k, table).flatten(2), v, self.heads)
        text, image = joint.split([text.shape[1], image.shape[1]], dim=1)
        return self.to_out[0](image), self.to_add_out(text)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class ParallelAttention(nn.Module):
    """Attention and perceptron side by side: one projection in and one out (Dehghani et al. 2023)."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        channels, hidden, head = config.channels, config.hidden, config.attention_head_dim
        self.heads, self.parts = config.num_attention_heads, [channels] * 3 + [2 * hidden]
        self.to_qkv_mlp_proj = linear(channels, sum(self.parts))
        self.norm_q, self.norm_k = nn.RMSNorm(head, config.eps), nn.RMSNorm(head, config.eps)
        self.to_out = linear(channels + hidden, channels)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v, wide = self.to_qkv_mlp_proj(x).split(self.parts, dim=-1)  # (B, N, D) three times, (B, N, 2 H)
        q, k = self.norm_q(q.unflatten(-1, (self.heads, -1))), self.norm_k(k.unflatten(-1, (self.heads, -1)))
        mixed = attend(rotate(q, table).flatten(2), rotate(k, table).flatten(2), v, self.heads)
        return self.to_out(torch.cat([mixed, gated(wide)], dim=-1))  # (B, N, D)


class DoubleBlock(nn.Module):
    """Joint attention, then a perceptron for each of the two streams: x += gate branch(modulate(x))."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = JointAttention(config)
        self.ff = FeedForward(config.channels, config.hidden)
        self.ff_context = FeedForward(config.channels, config.hidden)

    def forward(
        self, image: Tensor, text: Tensor, on_image: Modulations, on_text: Modulations, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = on_image  # (B, 1, D) each
        text_shift, text_scale, text_gate, text_shift_ff, text_scale_ff, text_gate_ff = on_text
        from_image, from_text = self.attn(
            modulate(image, shift, scale, self.eps), modulate(text, text_shift, text_scale, self.eps), table
        )
        image = torch.addcmul(image, gate, from_image)  # (B, N, D)
        image = torch.addcmul(image, gate_ff, self.ff(modulate(image, shift_ff, scale_ff, self.eps)))
        text = torch.addcmul(text, text_gate, from_text)  # (B, M, D)
        changed = self.ff_context(modulate(text, text_shift_ff, text_scale_ff, self.eps))
        return image, torch.addcmul(text, text_gate_ff, changed)


class SingleBlock(nn.Module):
    """One stream of text and image tokens: x += gate parallel(modulate(x))."""

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn = ParallelAttention(config)

    def forward(self, x: Tensor, modulation: Modulations, table: Tensor) -> Tensor:
        shift, scale, gate = modulation
        return torch.addcmul(x, gate, self.attn(modulate(x, shift, scale, self.eps), table))


class Flux2(nn.Module):
    """Five to eight double blocks and twenty or more single ones; all blocks of a kind share one modulation.

    x (B, C, h, w) patchified latents, t (B,) in 0 .. 1000, conditioning -> (B, C_out, h, w). Reads `tokens`
    (B, M, D_t), `references` (B, C, h_k, w_k) each, which are looked at and not predicted, and, where guidance was
    distilled, `guidance` (B,), the plain scale. ValueError where one is missing, or where the conditioning carries
    what this network cannot use: a mask (padding is read like text), maps to join, control features, blocks to skip.
    """

    def __init__(self, config: Flux2Config) -> None:
        super().__init__()
        axes, head, channels = config.axes_dims_rope, config.attention_head_dim, config.channels
        if len(axes) != 4 or any(width % 2 for width in axes) or sum(axes) != head:
            raise InputError(f"'axes_dims_rope' = {axes} must be four even numbers that add up to head_dim, {head}")
        self.config = config
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.time_guidance_embed = Embedder(config)
        self.double_stream_modulation_img = Modulation(channels, branches=2)
        self.double_stream_modulation_txt = Modulation(channels, branches=2)
        self.single_stream_modulation = Modulation(channels, branches=1)
        self.x_embedder = linear(config.in_channels, channels)
        self.context_embedder = linear(config.joint_attention_dim, channels)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = nn.ModuleDict({"linear": linear(channels, 2 * channels)})
        self.proj_out = linear(channels, self.out_channels)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        refuse_unread(conditioning)
        pictures = (x, *(conditioning.references or ()))
        image = torch.cat([picture.flatten(2).transpose(1, 2) for picture in pictures], dim=1)  # (B, N, C)
        tokens = needed(conditioning, "tokens")  # (B, M, D_t)
        sizes = tuple((picture.shape[-2], picture.shape[-1]) for picture in pictures)
        config = self.config
        table = position_table(tokens.shape[1], sizes, config.axes_dims_rope, config.rope_theta, x.device)
        embedding = F.silu(self.time_guidance_embed(t, conditioning, x.dtype))  # (B, D)

        image, text = self.x_embedder(image), self.context_embedder(tokens)  # (B, N, D), (B, M, D)
        on_image, on_text = self.double_stream_modulation_img(embedding), self.double_stream_modulation_txt(embedding)
        for block in self.transformer_blocks:
            image, text = block(image, text, on_image, on_text, table)
        joint, modulation = torch.cat([text, image], dim=1), self.single_stream_modulation(embedding)
        for block in self.single_transformer_blocks:
            joint = block(joint, modulation, table)  # (B, M + N, D)

        rows, columns = sizes[0]
        image = joint[:, text.shape[1] : text.shape[1] + rows * columns]  # (B, h w, D): references end here
        scale, shift = self.norm_out["linear"](embedding)[:, None].chunk(2, dim=-1)
        image = self.proj_out(modulate(image, shift, scale, config.eps))  # (B, h w, C_out)
        return image.transpose(1, 2).unflatten(-1, (rows, columns))


def refuse_unread(conditioning: Conditioning) -> None:
    """ValueError where a conditioning carries a part that would silently do nothing."""
    unread = [name for name in UNREAD if getattr(conditioning, name) not in (None, ())]
    if unread:
        raise ValueError(f"FLUX.2 cannot use conditioning.{', conditioning.'.join(unread)}")


@lru_cache(maxsize=16)
def position_table(
    text: int, pictures: tuple[tuple[int, int], ...], axes: tuple[int, ...], theta: float, device: torch.device
) -> Tensor:
    """The rotary table of a sequence: `text` tokens, then the pictures' rows; (2, M + N, head_dim / 2).

    Positions have four axes (picture, row, column, word): word i is at (0, 0, 0, i), the pixel (y, x) of the new
    picture at (0, y, x, 0) and of reference k = 1, 2, ... at (10 k, y, x, 0).
    """
    # the table outlives the call: made under inference mode it could not be used in training later
    with torch.inference_mode(False), torch.device("cpu"):  # float64 is not to be had on every device
        words, zero = torch.arange(text)[:, None] * torch.tensor([0, 0, 0, 1]), torch.tensor([0])  # (M, 4), (1,)
        grids = [
            torch.cartesian_prod(zero + APART * k, torch.arange(rows), torch.arange(columns), zero)
            for k, (rows, columns) in enumerate(pictures)
        ]  # (h_k w_k, 4) each
        return rotary_table(torch.cat([words, *grids]), axes, theta).to(device)

"""The original networks restated as functions of their own files' tensors, from the papers' formulas.

Each takes a table of tensors under the original names and notes which it read, so that a test can see that none is
left over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """Tensors by name, and the names that were read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = tensors, set[str]()

    def __contains__(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return self.tensors[name]

    def of(self, module: str) -> tuple[Tensor, Tensor]:
        return self[f"{module}.weight"], self[f"{module}.bias"]

    def linear(self, module: str, x: Tensor) -> Tensor:
        return F.linear(x, *self.of(module))

    def conv(self, module: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
        weight, bias = self.of(module)
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2 if padding is None else padding)

    def norm(self, module: str, x: Tensor, eps: float) -> Tensor:
        return F.group_norm(x, 32, *self.of(module), eps)

    def unread(self) -> set[str]:
        return self.tensors.keys() - self.read


def cosine_first(t: Tensor, channels: int) -> Tensor:
    omega = 10000.0 ** (-torch.arange(channels // 2).double() / (channels // 2))
    angle = t.double()[:, None] * omega
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def twice(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def half(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def guided_diffusion(
    w: Weights, x: Tensor, t: Tensor, label: Tensor | None, *, heads: Callable[[int], int], order: str, layers: int
) -> Tensor:
    """Improved diffusion, ADM and LDM without text; `heads` of a width, `layers` residual blocks a level."""
    e = cosine_first(t, w["time_embed.0.weight"].shape[1])
    e = w.linear("time_embed.2", F.silu(w.linear("time_embed.0", e)))
    if label is not None:
        e = e + w["label_emb.weight"][label]

    def residual(name: str, x: Tensor, resample: Callable[[Tensor], Tensor]) -> Tensor:
        h = w.conv(f"{name}.in_layers.2", resample(F.silu(w.norm(f"{name}.in_layers.0", x, 1e-5))))
        told = w.linear(f"{name}.emb_layers.1", F.silu(e))[:, :, None, None]
        if told.shape[1] == 2 * h.shape[1]:
            scale, shift = told.chunk(2, dim=1)
            h = w.norm(f"{name}.out_layers.0", h, 1e-5) * (1 + scale) + shift
        else:
            h = w.norm(f"{name}.out_layers.0", h + told, 1e-5)
        h = w.conv(f"{name}.out_layers.3", F.silu(h))
        skip = f"{name}.skip_connection"
        return (w.conv(skip, x) if skip in w else resample(x)) + h

    def attention(name: str, x: Tensor) -> Tensor:
        b, c, *_ = x.shape
        n = heads(c)
        weight, bias = w.of(f"{name}.qkv")
        qkv = F.conv1d(w.norm(f"{name}.norm", x, 1e-5).flatten(2), weight, bias)  # (B, 3 C, N)
        if order == "new":
            q, k, v = qkv.reshape(b, 3, n, c // n, -1).unbind(1)
        else:
            q, k, v = qkv.reshape(b, n, 3, c // n, -1).unbind(2)
        score = torch.einsum("bnct,bncs->bnts", q, k) / math.sqrt(c // n)
        h = torch.einsum("bnts,bncs->bnct", score.softmax(-1), v).reshape(b, c, -1)
        return x + F.conv1d(h, *w.of(f"{name}.proj_out")).reshape(x.shape)

    def block(name: str, x: Tensor, halves: bool = False) -> Tensor:
        for place in range(3):
            part = f"{name}.{place}"
            if f"{part}.in_layers" in w:
                doubles = name.startswith("output") and place > 0
                x = residual(part, x, half if halves else twice if doubles else torch.clone)
            elif f"{part}.qkv" in w:
                x = attention(part, x)
            elif f"{part}.op" in w:
                x = w.conv(f"{part}.op", x, stride=2, padding=1)
            elif f"{part}.conv" in w:
                x = w.conv(f"{part}.conv", twice(x))
            elif part in w:
                x = w.conv(part, x)
        return x

    skips, index = [], 0
    while f"input_blocks.{index}" in w:
        x = block(f"input_blocks.{index}", x, halves=index > 0 and index % (layers + 1) == 0)
        skips.append(x)
        index += 1
    x, index = block("middle_block", x), 0
    while f"output_blocks.{index}" in w:
        x = block(f"output_blocks.{index}", torch.cat([x, skips.pop()], dim=1))
        index += 1
    return w.conv("out.2", F.silu(w.norm("out.0", x, 1e-5)))


def ddpm_residual(w: Weights, name: str, x: Tensor, e: Tensor | None = None) -> Tensor:
    h = w.conv(f"{name}.conv1", F.silu(w.norm(f"{name}.norm1", x, 1e-6)))
    if e is not None:
        h = h + w.linear(f"{name}.temb_proj", F.silu(e))[:, :, None, None]
    h = w.conv(f"{name}.conv2", F.silu(w.norm(f"{name}.norm2", h, 1e-6)))
    return h + (w.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut" in w else x)


def ddpm_attention(w: Weights, name: str, x: Tensor) -> Tensor:
    h = w.norm(f"{name}.norm", x, 1e-6)
    q, k, v = (w.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
    score = torch.einsum("bct,bcs->bts", q, k) * x.shape[1] ** -0.5
    h = torch.einsum("bts,bcs->bct", score.softmax(-1), v)
    return x + w.conv(f"{name}.proj_out", h.reshape(x.shape))


def ddpm_middle(w: Weights, name: str, x: Tensor, e: Tensor | None = None) -> Tensor:
    x = ddpm_attention(w, f"{name}.attn_1", ddpm_residual(w, f"{name}.block_1", x, e))
    return ddpm_residual(w, f"{name}.block_2", x, e)


def halved(w: Weights, name: str, x: Tensor) -> Tensor:
    return w.conv(name, F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)


def ddpm_port(w: Weights, x: Tensor, t: Tensor, *, levels: int, layers: int) -> Tensor:
    """Ho et al.'s network as its PyTorch port names it."""
    channels = w["temb.dense.0.weight"].shape[1]
    omega = 10000.0 ** (-torch.arange(channels // 2).double() / (channels // 2 - 1))
    angle = t.double()[:, None] * omega
    e = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    e = w.linear("temb.dense.1", F.silu(w.linear("temb.dense.0", e)))

    def layer(level: str, index: int, x: Tensor) -> Tensor:
        x = ddpm_residual(w, f"{level}.block.{index}", x, e)
        return ddpm_attention(w, f"{level}.attn.{index}", x) if f"{level}.attn.{index}" in w else x

    skips = [w.conv("conv_in", x)]
    for level in range(levels):
        for index in range(layers):
            skips.append(layer(f"down.{level}", index, skips[-1]))
        if level < levels - 1:
            skips.append(halved(w, f"down.{level}.downsample.conv", skips[-1]))
    x = ddpm_middle(w, "mid", skips[-1], e)
    for level in reversed(range(levels)):
        for index in range(layers + 1):
            x = layer(f"up.{level}", index, torch.cat([x, skips.pop()], dim=1))
        if level > 0:
            x = w.conv(f"up.{level}.upsample.conv", twice(x))
    return w.conv("conv_out", F.silu(w.norm("norm_out", x, 1e-6)))


def autoencoder(w: Weights, x: Tensor, *, levels: int, layers: int, half: str) -> Tensor:
    """Latent diffusion's `encoder` (pixels to moments or codes) or `decoder`, without the 1x1 convolutions around."""

    def layer(name: str, index: int, x: Tensor) -> Tensor:
        x = ddpm_residual(w, f"{name}.block.{index}", x)
        return ddpm_attention(w, f"{name}.attn.{index}", x) if f"{name}.attn.{index}" in w else x

    x = w.conv(f"{half}.conv_in", x)
    if half == "decoder":
        x = ddpm_middle(w, "decoder.mid", x)
    for level in range(levels) if half == "encoder" else reversed(range(levels)):
        name = f"encoder.down.{level}" if half == "encoder" else f"decoder.up.{level}"
        for index in range(layers if half == "encoder" else layers + 1):
            x = layer(name, index, x)
        if f"{name}.downsample" in w:
            x = halved(w, f"{name}.downsample.conv", x)
        if f"{name}.upsample" in w:
            x = w.conv(f"{name}.upsample.conv", twice(x))
    if half == "encoder":
        x = ddpm_middle(w, "encoder.mid", x)
    return w.conv(f"{half}.conv_out", F.silu(w.norm(f"{half}.norm_out", x, 1e-6)))


def diffusion_transformer(w: Weights, x: Tensor, t: Tensor, label: Tensor, *, heads: int) -> Tensor:
    """The original DiT with its stored positions, for square pictures."""
    e = w.linear("t_embedder.mlp.2", F.silu(w.linear("t_embedder.mlp.0", cosine_first(t, 256))))
    e = F.silu(e + w["y_embedder.embedding_table.weight"][label])
    weight, bias = w.of("x_embedder.proj")
    patch, width = weight.shape[-1], weight.shape[0]
    x = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2) + w["pos_embed"]

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    index = 0
    while f"blocks.{index}" in w:
        name = f"blocks.{index}"
        parts = w.linear(f"{name}.adaLN_modulation.1", e).chunk(6, dim=1)
        qkv = w.linear(f"{name}.attn.qkv", norm(x, *parts[:2]))  # (B, N, 3 D)
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
        h = (q @ k.transpose(-1, -2) / math.sqrt(width // heads)).softmax(-1) @ v
        x = x + parts[2][:, None] * w.linear(f"{name}.attn.proj", h.transpose(1, 2).flatten(2))
        h = F.gelu(w.linear(f"{name}.mlp.fc1", norm(x, *parts[3:5])), approximate="tanh")
        x = x + parts[5][:, None] * w.linear(f"{name}.mlp.fc2", h)
        index += 1
    x = norm(x, *w.linear("final_layer.adaLN_modulation.1", e).chunk(2, dim=1))
    x = w.linear("final_layer.linear", x)  # (B, N, p p C)
    side = math.isqrt(x.shape[1])
    x = x.reshape(len(x), side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, side * patch, side * patch)

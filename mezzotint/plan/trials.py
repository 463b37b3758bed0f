"""The kernels whose speed is measured: their sizes bracket those of diffusion models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

Act = Callable[[], object]
COLD, MOST = 48 * 2**20, 64  # bytes of copies of a weight, and copies, that are used in turn
# batch, rows, inner, columns
LINEAR = (
    (1, 64, 512, 512), (1, 2, 1024, 4096), (1, 256, 1280, 1280), (1, 1024, 512, 2048), (1, 4096, 320, 320),
    (1, 2048, 1280, 1280), (32, 128, 128, 128),
)  # fmt: skip
# images, channels in, channels out, kernel, side
CONVOLUTION = (
    (2, 4, 64, 3, 32), (2, 64, 64, 3, 64), (2, 128, 128, 3, 32), (2, 320, 320, 3, 32), (2, 256, 256, 3, 16),
    (2, 512, 512, 3, 8), (2, 512, 512, 3, 4), (1, 128, 128, 3, 128), (2, 128, 256, 1, 32), (1, 64, 3, 3, 128),
)  # fmt: skip
# heads over the batch, queries, keys, width of a head
ATTENTION = (
    (8, 64, 64, 64), (16, 256, 256, 64), (8, 1024, 1024, 64), (8, 1024, 77, 40), (4, 4096, 4096, 40),
    (8, 1024, 1024, 24), (16, 256, 256, 8),
)  # fmt: skip
NUMBERS = (1 << 12, 1 << 16, 1 << 20, 1 << 23)  # of float32 in one operand
TENSORS, UPDATED = 16, (1 << 14, 1 << 20)  # weights that train, and numbers in each


def tasks(
    at: torch.device, dtype: torch.dtype, numbers: Sequence[int]
) -> list[tuple[str, tuple[int, ...], float, Act]]:
    """Kernel, sizes as in `Call.shape`, operations or bytes of a run, and the run."""
    updates = _updates(at) if dtype is torch.float32 else ()
    return [*_products(at, dtype), *_convolutions(at, dtype), *_attentions(at, dtype), *_moves(at, dtype, numbers),
            *updates]  # fmt: skip


def _products(at: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], float, Act]]:
    for shape in LINEAR:
        batch, rows, inner, columns = shape
        a = _random(at, dtype, batch, rows, inner)
        weights = _cold(_random(at, dtype, batch, columns, inner), shared=batch == 1)
        if batch == 1:
            act = lambda a=a[0], w=weights: F.linear(a, next(w)[0])  # noqa: E731
        else:
            act = lambda a=a, w=weights: a @ next(w).transpose(1, 2)  # noqa: E731
        yield "linear", shape, 2.0 * batch * rows * inner * columns, act


def _convolutions(at: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], float, Act]]:
    for images, inside, out, kernel, side in CONVOLUTION:
        x = _random(at, dtype, images, inside, side, side)
        weights = _cold(_random(at, dtype, out, inside, kernel, kernel))
        shape, work = (images * side**2, inside, out, kernel), 2.0 * images * side**2 * inside * out * kernel**2
        yield "convolution", shape, work, lambda x=x, w=weights, p=kernel // 2: F.conv2d(x, next(w), padding=p)
        if inside > 8 and out > 8:
            gradient = _random(at, dtype, images, out, side, side)
            yield "convolution_backward", shape, 2 * work, _backwards(x, weights, gradient, kernel // 2)


def _cold(weight: Tensor, shared: bool = True) -> Iterator[Tensor]:
    """A weight in as many copies as caches cannot hold, one after the other: a network comes back to each of its own
    when all others were used."""
    copies = min(MOST, 1 + COLD // (weight.numel() * weight.itemsize)) if shared else 1
    return cycle([weight.clone() for _ in range(copies)])


def _backwards(x: Tensor, weights: Iterator[Tensor], gradient: Tensor, padding: int) -> Act:
    return lambda: torch.ops.aten.convolution_backward(
        gradient, x, next(weights), None, [1, 1], [padding, padding], [1, 1], False, [0, 0], 1, [True, True, False]
    )


def _attentions(at: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], float, Act]]:
    for shape in ATTENTION:
        heads, queries, keys, width = shape
        q, k, v = (_random(at, dtype, 1, heads, n, width) for n in (queries, keys, keys))
        work = 4.0 * heads * queries * keys * width
        yield "attention", shape, work, lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
        if queries == keys <= 1024 and width >= 40:
            for tensor in (q, k, v):
                tensor.requires_grad_(True)
            with torch.enable_grad():
                y = F.scaled_dot_product_attention(q, k, v)
            gradient = torch.ones_like(y)
            back = lambda y=y, p=(q, k, v), g=gradient: torch.autograd.grad(y, p, g, retain_graph=True)  # noqa: E731
            yield "attention_backward", shape, 2.5 * work, back


def _moves(
    at: torch.device, dtype: torch.dtype, numbers: Sequence[int]
) -> Iterator[tuple[str, tuple[int, ...], float, Act]]:
    aten = torch.ops.aten
    for count in numbers:
        x, y = _random(at, dtype, 2, 64, count // 128), _random(at, dtype, 2, 64, count // 128)
        rows, size = x.view(-1, 64), x.itemsize
        ones, zeros = torch.ones(64, device=at, dtype=dtype), torch.zeros(64, device=at, dtype=dtype)
        mean, deviation = torch.zeros(2, 32, device=at, dtype=dtype), torch.ones(2, 32, device=at, dtype=dtype)
        middle, spread = (torch.ones(len(rows), 1, device=at, dtype=dtype) for _ in range(2))
        groups = count // 128, 32
        both: Sequence[tuple[str, int, Act]] = (
            ("copying", 2, lambda x=x: x.clone()),
            ("other", 3, lambda x=x, y=y: x + y),
            ("silu", 2, lambda x=x: F.silu(x)),
            ("gelu", 2, lambda x=x: F.gelu(x)),
            ("gelu_tanh", 2, lambda x=x: F.gelu(x, approximate="tanh")),
            ("activation", 2, lambda x=x: torch.sigmoid(x)),
            ("silu_backward", 3, lambda x=x, y=y: aten.silu_backward(x, y)),
            ("gelu_backward", 3, lambda x=x, y=y: aten.gelu_backward(x, y)),
            ("norm", 2, lambda r=rows, o=ones, z=zeros: F.layer_norm(r, (64,), o, z)),
            ("native_group_norm", 2, lambda x=x, o=ones, z=zeros: F.group_norm(x, 32, o, z)),
            ("native_group_norm_backward", 3, lambda x=x, y=y, o=ones, m=mean, d=deviation, g=groups:
                aten.native_group_norm_backward(y, x, m, d, o, 2, 64, g[0], g[1], [True, True, True])),
            ("native_layer_norm_backward", 3, lambda r=rows, o=ones, z=zeros, m=middle, s=spread:
                aten.native_layer_norm_backward(r, r, [64], m, s, o, z, [True, True, True])),
        )  # fmt: skip
        for kernel, operands, act in both:
            moved = operands * count * size
            yield kernel, (moved,), float(moved), act


def _updates(at: torch.device) -> Iterator[tuple[str, tuple[int, ...], float, Act]]:
    """Passes over weights in place, of many tensors at a time and of more than caches hold.

    No new memory is taken, which makes them several times faster than what only moves numbers elsewhere.
    """
    for count in UPDATED:
        weights, gradients, means, squares = ([torch.rand(count, device=at) for _ in range(TENSORS)] for _ in range(4))
        steps = [torch.ones((), device=at) for _ in weights]
        passes: Sequence[tuple[str, int, Act]] = (
            ("gradient norm", 4, lambda g=gradients: torch.nn.utils.get_total_norm(g)),
            ("clipping", 8, lambda g=gradients: torch._foreach_mul_(g, 1.0)),
            ("AdamW", 28, lambda w=weights, g=gradients, m=means, s=squares, n=steps: torch._fused_adamw_(
                w, g, m, s, [], n, lr=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False,
                maximize=False)),
            ("moving average", 12, lambda a=means, w=weights: torch._foreach_lerp_(a, w, 0.001)),
        )  # fmt: skip
        for kernel, each, act in passes:
            moved = each * count * TENSORS
            yield kernel, (moved,), float(moved), act


def _random(at: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=at).to(dtype)

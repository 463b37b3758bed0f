"""One step of a run: the losses of the pieces of a batch, their gradients, and what all processes make of them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.training import draws, parallel
from mezzotint.training.methods import Batch, Method
from mezzotint.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class Computed:
    """What a process found; nothing of it has been waited for, so an accelerator may still be at it."""

    losses: tuple[Tensor, ...]  # of its pieces
    numbers: dict[str, Tensor]  # means over its pieces
    norms: dict[str, Tensor]  # of the gradient of each network, over all processes


def gradients(
    plan: Recipe, job: Method, accelerator: Accelerator, networks: dict[str, nn.Module], batch: Batch, step: int
) -> Computed:
    """Leave in every parameter the mean gradient of a batch's pieces, clipped; piece i is process i mod n's.

    Each piece has a seed of its own, so that dropout does not depend on who computes it.
    """
    pieces = plan.accumulation * accelerator.num_processes
    mine = range(accelerator.process_index, pieces, accelerator.num_processes)
    losses: list[Tensor] = []
    numbers: dict[str, list[Tensor]] = {}
    for index in mine:
        torch.manual_seed(draws.number(plan.seed, step, f"network {index}"))
        piece = {key: value.chunk(pieces)[index].to(accelerator.device) for key, value in batch.items()}
        last = index == mine[-1]
        with contextlib.nullcontext() if last else parallel.accumulating(job.trained.values()):
            loss, told = job.loss(piece, step)
            (loss / plan.accumulation).backward()
        losses.append(loss.detach())
        for key, value in told.items():
            numbers.setdefault(key, []).append(value.detach())
    means = {key: torch.stack(values).mean() for key, values in numbers.items()}
    norms = {name: clip(network.parameters(), plan.optimiser.clip) for name, network in networks.items()}
    return Computed(tuple(losses), means, norms)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """The norm of all gradients, which are scaled so that it is at most the limit: g <- g min(1, limit / norm)."""
    found = [p.grad for p in parameters if p.grad is not None]
    norm = parallel.whole(torch.nn.utils.get_total_norm(found, foreach=True))
    if limit is not None and found:
        torch._foreach_mul_([parallel.own(g) for g in found], (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def agree(
    plan: Recipe, job: Method, accelerator: Accelerator, batch: Batch, step: int, computed: Computed, stop: bool
) -> tuple[float, dict[str, float], bool]:
    """The mean loss and numbers of all processes, and whether one was asked to stop; the only wait of a step.

    InputError in every process where a loss or gradient is not finite, before anything of it reaches the weights.
    """
    norms = {f"gradient/{name}": norm for name, norm in computed.norms.items()}
    told = [*computed.losses, *computed.numbers.values(), *norms.values(), torch.tensor(float(stop))]
    rows = parallel.gathered(accelerator, torch.stack([value.to(accelerator.device, torch.float32) for value in told]))
    count = len(computed.losses)
    for index in range(count * len(rows)):
        turn, process = divmod(index, len(rows))
        value = rows[process][turn]
        if not math.isfinite(value):
            piece = {key: whole.chunk(count * len(rows))[index] for key, whole in batch.items()}
            raise InputError(_broken(job, piece, step, f"the loss is {value}"))
    for name, value in zip(computed.norms, rows[0][count + len(computed.numbers) :], strict=False):
        if not math.isfinite(value):
            raise InputError(_broken(job, batch, step, f"the gradient of the {name} is {value}"))
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    numbers = dict(zip([*computed.numbers, *norms], means[count:-1], strict=True))
    return sum(means[:count]) / count, numbers, means[-1] > 0


def _broken(job: Method, batch: Batch, step: int, what: str) -> str:
    names = job.names(batch)
    more = f" and {len(names) - 16} more" if len(names) > 16 else ""
    return (
        f"{what} at step {step}; the batch was {', '.join(names[:16])}{more}.\n"
        "Nothing of this step was kept: look at those files, lower optimiser.rate, or use precision float32."
    )

"""What changes in a run: the networks' weights, their moving average and the optimisers' moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.layers.recompute import recompute
from mezzotint.training import ema, parallel, state
from mezzotint.training.methods import Following, Method, Sparing
from mezzotint.training.recipe import Optimiser, Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True, slots=True)
class Weights:
    """All that a checkpoint holds, and where it is used."""

    networks: dict[str, nn.Module]  # as the method made them, without what the loss calls around them
    network: nn.Module  # the one that is validated and saved,
    average: nn.Module  # as its average; itself where the recipe wants none
    outline: nn.Module | None  # of sharded networks: the same without numbers
    tensors: dict[str, dict[str, Tensor]]  # of each network, what trains
    optimisers: dict[str, torch.optim.AdamW]


def prepare(plan: Recipe, job: Method, accelerator: Accelerator, start: Path | None) -> Weights:
    """Wrap what the method trains for the processes at work, make average and optimisers, and fill all from `start`."""
    networks = dict(job.trained)
    if plan.recompute:
        recompute(nn.ModuleList(networks.values()))
    network = networks[job.averaged]
    average = ema.follow(network) if plan.ema.decay else network
    outline = None
    if parallel.sharded(plan, accelerator):
        if len(networks) > 1:
            raise InputError(f'fsdp2 shards one network, and here train {", ".join(networks)}: set parallel = "ddp".')
        outline = parallel.outline(network)
        for whole in dict.fromkeys((network, average)):
            parallel.shard(whole, accelerator.device)
    tensors = {name: state.trained(part) for name, part in networks.items()}
    optimisers = {name: optimiser(plan.optimiser, job, name, part) for name, part in networks.items()}
    weights = Weights(networks, network, average, outline, tensors, optimisers)
    if start is not None:
        for name, part in _stored(weights, job.averaged).items():
            state.restore(start, name, part)
        for name, one in optimisers.items():
            state.restore_moments(start, f"{name}.optimiser", one, tensors[name])
    if isinstance(job, Following) and average is not network:
        job.averaging(average)
    idle = outline is None and parallel.idle(plan, accelerator, job)
    for name, part in networks.items():
        job.trained[name] = parallel.wrap(plan, accelerator, part, idle)
    return weights


def optimiser(plan: Optimiser, job: Method, name: str, network: nn.Module) -> torch.optim.AdamW:
    """Fused AdamW over what trains; decay spares biases, norms and other vectors, and what the method names."""
    decay = job.decay if isinstance(job, Sparing) else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            share = nearest(job.rates, f"{name}.{key}")
            shrinking = plan.decay * nearest(decay, f"{name}.{key}") if parameter.ndim > 1 else 0.0
            groups.setdefault((share, shrinking), []).append(parameter)
    if not groups:
        raise InputError(f"nothing of the {name} trains: every parameter is frozen.")
    listed = [
        {"params": parameters, "share": share, "weight_decay": shrinking}
        for (share, shrinking), parameters in groups.items()
    ]
    return torch.optim.AdamW(listed, lr=plan.rate, betas=plan.betas, eps=plan.eps, fused=True)


def nearest(factors: Mapping[str, float], name: str) -> float:
    """The factor of the longest dotted prefix of a name; 1 without one."""
    fitting = [prefix for prefix in factors if name == prefix or name.startswith(f"{prefix}.")]
    return factors[max(fitting, key=len)] if fitting else 1.0


def advance(weights: Weights, plan: Recipe, step: int, rate: float) -> None:
    """One step of every optimiser along the gradients, which are gone then, and of the average."""
    for one in weights.optimisers.values():
        for group in one.param_groups:
            group["lr"] = rate * group["share"]
        one.step()
        one.zero_grad()
    if weights.average is not weights.network:
        ema.update(weights.average, weights.network, step, plan.ema.decay, plan.ema.warmup)


def content(weights: Weights, job: Method) -> dict[str, dict[str, Tensor]]:
    """The files of a checkpoint with their tensors, whole; every process must ask."""
    files = _stored(weights, job.averaged)
    for name, one in weights.optimisers.items():
        files[f"{name}.optimiser"] = state.moments(one, weights.tensors[name])
    if weights.outline is None:
        return files
    return {name: {key: parallel.whole(t.detach()).cpu() for key, t in part.items()} for name, part in files.items()}


@contextlib.contextmanager
def finished(weights: Weights, accelerator: Accelerator) -> Iterator[nn.Module]:
    """The network as it is judged and saved, whole on the main process; every process must ask."""
    with ema.at_rest(weights.average):
        if weights.outline is None:
            yield weights.average
        else:
            with parallel.assembled(accelerator, weights.average, weights.outline) as network:
                yield network


def _stored(weights: Weights, averaged: str) -> dict[str, dict[str, Tensor]]:
    if weights.average is weights.network:
        return dict(weights.tensors)
    return {**weights.tensors, "ema": state.same(weights.average, weights.tensors[averaged])}

"""Several processes at one run: networks copied (ddp) or sharded (fsdp2), and what all of them must agree on."""

from __future__ import annotations

import atexit
import contextlib
import copy
import datetime
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mezzotint.errors import InputError
from mezzotint.training.methods import Method
from mezzotint.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
# The main process may prepare a large data set while the others wait; where one fails, the launcher ends them all.
PATIENCE = datetime.timedelta(hours=24)


def join(plan: Recipe) -> Accelerator:
    """The processes of this run, as torchrun or accelerate launched them; one alone where nothing did.

    InputError where a batch cannot be divided among them, or the launcher was told another strategy than the recipe.
    """
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise InputError("training needs the package accelerate. Run: pip install 'mezzotint[train]'") from error
    told = os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true"  # we shard, once, here
    if told and plan.parallel != "fsdp2":
        raise InputError('accelerate was told to use FSDP and the recipe says parallel = "ddp": say "fsdp2" there.')
    AcceleratorState._reset_state()  # it is one for the process, and the run before may have had another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if plan.precision == "bfloat16" else "no",
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if plan.batch % (plan.accumulation * accelerator.num_processes):
        raise InputError(
            f"batch {plan.batch} must be a multiple of accumulation x processes,"
            f" {plan.accumulation} x {accelerator.num_processes}"
        )
    if accelerator.num_processes > 1:
        _parting()
    return accelerator


@functools.cache
def _parting() -> None:
    """Leave the group while the interpreter still stands: threads of a group that outlives it abort the process."""
    from accelerate.state import PartialState

    atexit.register(PartialState().destroy_process_group)


def sharded(plan: Recipe, accelerator: Accelerator) -> bool:
    """Whether networks are in pieces, so that every process must take part wherever one of them is used."""
    return plan.parallel == "fsdp2" and accelerator.num_processes > 1


def wrap(plan: Recipe, accelerator: Accelerator, network: nn.Module, idle: bool) -> nn.Module:
    """What a loss calls in place of a network: it computes in the run's precision and its gradients are averaged.

    `idle` says that some of what trains may get no gradient, which copies must then look for in every step.
    """
    prepared = accelerator.prepare_model(network, device_placement=False, evaluation_mode=True)
    if accelerator.num_processes == 1 or sharded(plan, accelerator):
        return prepared
    warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
    device = accelerator.device
    return nn.parallel.DistributedDataParallel(
        prepared,
        device_ids=None if device.type == "cpu" else [device.index],
        broadcast_buffers=False,
        find_unused_parameters=idle,
        gradient_as_bucket_view=True,
    )


def idle(plan: Recipe, accelerator: Accelerator, job: Method) -> bool:
    """Whether a step leaves some of what trains without a gradient, as unused layers of a text encoder do."""
    if accelerator.num_processes == 1:
        return False
    step = plan.steps - 1  # by then everything plays its part
    size = plan.batch // (plan.accumulation * accelerator.num_processes)
    piece = {key: value[:size].to(accelerator.device) for key, value in job.draw(step).items()}
    loss, _ = job.loss(piece, step)
    trained = [p for network in job.trained.values() for p in network.parameters() if p.requires_grad]
    missing = any(gradient is None for gradient in torch.autograd.grad(loss, trained, allow_unused=True))
    return any(row[0] for row in gathered(accelerator, torch.tensor([float(missing)], device=accelerator.device)))


def shard(network: nn.Module, device: torch.device) -> None:
    """Divide every parameter over the processes, in place (fully_shard of PyTorch, "FSDP2").

    As one group, gathered while the network computes: what is saved is moments, average, and weights at rest. Groups
    of single blocks would save more, but networks read parts of their blocks before they call them (`modulations`).
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


@contextlib.contextmanager
def accumulating(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep gradients to each process until a backward pass outside of this."""
    from torch.distributed.fsdp import FSDPModule

    networks = list(networks)
    with contextlib.ExitStack() as waiting:
        for network in networks:
            if isinstance(network, FSDPModule):
                network.set_requires_gradient_sync(False)
                waiting.callback(network.set_requires_gradient_sync, True)
            elif isinstance(network, nn.parallel.DistributedDataParallel):
                waiting.enter_context(network.no_sync())
        yield


def gathered(accelerator: Accelerator, numbers: Tensor) -> list[list[float]]:
    """What every process says, (N,) numbers each, in the order of the processes: the one wait of a step."""
    if accelerator.num_processes == 1:
        return [numbers.tolist()]
    found = [torch.empty_like(numbers) for _ in range(accelerator.num_processes)]
    torch.distributed.all_gather(found, numbers)
    return torch.stack(found).tolist()


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T | None:
    """Work on the main process while the others wait; where it fails, all of them fail with its message."""
    failed: Exception | None = None
    found: T | None = None
    if accelerator.is_main_process:
        try:
            found = work()
        except Exception as error:
            failed = error
    if accelerator.num_processes > 1:
        said: list[Any] = [failed and f"{type(failed).__name__}: {failed}"]
        torch.distributed.broadcast_object_list(said, src=0)
        if said[0] and not failed:
            raise InputError(f"the main process stopped: {said[0].removeprefix('InputError: ')}")
    if failed:
        raise failed
    return found


def main_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Work on the main process, then on the others, which find what it left on disk."""
    found = on_main(accelerator, work)
    return work() if found is None else found


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every process must ask."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor, to be changed in place."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divided(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor placed and sharded as `like`, without talk between the processes."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def outline(network: nn.Module) -> nn.Module:
    """A copy whose parameters hold no numbers, to be filled by `assembled`."""
    memo: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(network, memo).eval()


@contextlib.contextmanager
def assembled(accelerator: Accelerator, network: nn.Module, outline: nn.Module) -> Iterator[nn.Module]:
    """`outline` with the numbers of a sharded network, on the main process; every process must ask."""
    empty: list[tuple[nn.Parameter, nn.Parameter]] = []
    for place, parameter in zip(outline.parameters(), network.parameters(), strict=True):
        value = whole(parameter.detach())
        if accelerator.is_main_process:
            filled = nn.Parameter(value, requires_grad=False)
            torch.utils.swap_tensors(place, filled)  # `place` holds the numbers now, wherever it is used
            empty.append((place, filled))
    try:
        yield outline
    finally:
        for place, filled in empty:
            torch.utils.swap_tensors(place, filled)


@contextlib.contextmanager
def explained(accelerator: Accelerator) -> Iterator[None]:
    """Say it in plain words where another process has gone while this one waited for it."""
    try:
        yield
    except RuntimeError as error:
        talk = isinstance(error, torch.distributed.DistError) or "gloo" in str(error)
        if accelerator.num_processes == 1 or not talk:
            raise
        raise InputError(
            "another process of this run has ended: see what it said, then go on with --resume."
        ) from error

"""The doctor's look at weights: closed forms of its statistics, and every fault it is for, on one small network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parts import class_model
from torch import Tensor, nn

from mezzotint.checkpoints import write_tensors
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Finding
from mezzotint.doctor.grids import grid_of
from mezzotint.doctor.layers import block_of, kind_of, layers, order
from mezzotint.doctor.probes import weights
from mezzotint.families import Model
from mezzotint.files import write_json


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(network: nn.Module) -> nn.Module:
    """Numbers as training leaves them: bell-shaped, with a few directions that stand out."""
    for i, parameter in enumerate(network.parameters()):
        if parameter.ndim > 1:
            rows, columns = len(parameter), parameter[0].numel()
            low = drawn(rows, 3, seed=i) @ drawn(3, columns, seed=1000 + i)
            parameter.data = ((low + drawn(rows, columns, seed=2000 + i)) / (2 * columns**0.5)).view(parameter.shape)
    return network


@pytest.fixture(scope="module")
def healthy() -> Model:
    found = class_model()
    trained(found.backbone)
    return found


def matrices(network: nn.Module, block: str) -> list[nn.Parameter]:
    return [p for name, p in network.named_parameters() if name.startswith(f"{block}.") and p.ndim > 1]


def found(model: Model, spoil: Callable[[nn.Module], object], trace: Path | None = None) -> dict[str, Finding]:
    backbone = copy.deepcopy(model.backbone)
    with torch.no_grad():
        spoil(backbone)
    changed = Model(model.contract, backbone, model.codec, model.text)
    checked = weights.examine(Case(Path("model"), changed, trace=trace))
    assert checked.measures
    return {finding.cause: finding for finding in checked.findings}


BLOCK = "up_blocks.1.resnets.0"


def to_nan(network: nn.Module) -> None:
    matrices(network, BLOCK)[0].view(-1)[3] = torch.nan


def to_zero(network: nn.Module) -> None:
    matrices(network, BLOCK)[0].zero_()


def output_to_zero(network: nn.Module) -> None:
    network.get_parameter("conv_out.weight").zero_()


def to_noise(network: nn.Module) -> None:
    for p in matrices(network, BLOCK):
        p.copy_(drawn(*p.shape, seed=5) * p.std())


def shuffled(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in matrices(network, BLOCK):
        p.copy_(p.flatten()[torch.randperm(p.numel(), generator=generator)].view(p.shape))


def to_start(network: nn.Module) -> None:
    for p in matrices(network, BLOCK):
        p.copy_((2 * torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) - 1) / p[0].numel() ** 0.5)


def all_to_start(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in network.parameters():
        if p.ndim > 1:
            p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) / p[0].numel() ** 0.5)


def tenfold(network: nn.Module) -> None:
    matrices(network, BLOCK)[0].mul_(20)


def rounded(network: nn.Module) -> None:
    for p in network.parameters():
        if p.ndim > 1:
            step = p.flatten(1).abs().amax(1).view(-1, *[1] * (p.ndim - 1)) / 7
            p.copy_((p / step).round() * step)


def cut(network: nn.Module) -> None:
    for p in network.parameters():
        if p.ndim > 1:
            p.masked_fill_(p.abs() < 0.5 * p.std(), 0.0)


def copied(network: nn.Module) -> None:
    for p, q in zip(matrices(network, "mid_block.resnets.0"), matrices(network, "mid_block.resnets.1"), strict=True):
        q.copy_(p)


@pytest.mark.parametrize(
    ("spoil", "cause", "grade"),
    [
        (to_nan, "weights.finite", "broken"), (to_zero, "weights.zero", "harmful"),
        (output_to_zero, "weights.zero", "broken"), (to_noise, "weights.damaged", "harmful"),
        (shuffled, "weights.damaged", "harmful"), (to_start, "weights.untrained", "harmful"),
        (all_to_start, "weights.untrained", "broken"), (tenfold, "weights.damaged", "harmful"),
        (rounded, "weights.precision", "harmful"), (cut, "weights.precision", "harmful"),
        (copied, "weights.tied", "harmful"),
    ],
)  # fmt: skip
def test_a_seeded_fault_is_named(healthy: Model, spoil: Callable[[nn.Module], object], cause: str, grade: str) -> None:
    findings = found(healthy, spoil)
    assert [finding.cause for finding in findings.values() if finding.grade != "note"] == [cause]
    assert findings[cause].grade == grade
    assert findings[cause].strength >= 1
    if spoil not in (output_to_zero, all_to_start, rounded, cut, copied):
        assert BLOCK in findings[cause].says


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sound_weights_are_passed_over_in_every_format(healthy: Model, dtype: torch.dtype) -> None:
    assert not found(healthy, lambda network: network.to(dtype).float())


def test_order_is_what_chance_gives_for_every_distribution() -> None:
    """sum over i != j of (w_i w_j)^2 / (m (m - 1) n s^4) is 1 +- 2 / m for independent entries; directions raise it."""
    for i in range(10):
        noise = drawn(64, 256, seed=i)
        assert order(noise.double()) < 5
        assert order((noise**3).double()) < 5
        assert order((noise > 0).double() + 1e-3 * noise.double()) < 5
    rows, columns, strength = drawn(64, 1), drawn(1, 256, seed=1), 0.3
    structured = drawn(64, 256, seed=2) + strength * rows @ columns
    assert order(structured.double()) > 40
    flat = structured.flatten()[torch.randperm(structured.numel(), generator=torch.Generator().manual_seed(0))]
    assert order(flat.view(64, 256).double()) < 5


@pytest.mark.parametrize(
    ("change", "coarse"),
    [
        (lambda w: w, None), (lambda w: w.half().float(), None), (lambda w: w.bfloat16().float(), None),
        (lambda w: torch.round(w / w.abs().max() * 127) * w.abs().max() / 127, False),
        (lambda w: torch.round(w / w.abs().max() * 7) * w.abs().max() / 7, True),
        (lambda w: (torch.round(w / w.abs().amax(1, True) * 7) * w.abs().amax(1, True) / 7).half().float(), True),
        (lambda w: w.to(torch.float8_e4m3fn).float(), True),
        (lambda w: (w * 448 / w.abs().max()).to(torch.float8_e4m3fn).float() * w.abs().max() / 448, True),
        (lambda w: w.to(torch.float8_e5m2).float(), True),
    ],
)  # fmt: skip
def test_grids_of_quantisation_are_told_from_number_formats(
    change: Callable[[Tensor], Tensor], coarse: bool | None
) -> None:
    grid = grid_of(change(0.05 * drawn(64, 512)))
    assert (None if grid is None else grid.coarse) is coarse


def test_names_tell_kind_and_block() -> None:
    assert kind_of("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0.weight") == "attn1.to_out.0.weight"
    assert kind_of("up_blocks.1.resnets.0.conv1.weight") == kind_of("mid_block.resnets.1.conv1.weight")
    assert block_of("up_blocks.1.resnets.0.conv1.weight") == "up_blocks.1.resnets.0"


def test_the_average_that_was_not_applied(healthy: Model, tmp_path: Path) -> None:
    """A model with the last step's weights, beside a run that has them and their average; and one with the average."""
    live = {name: p.detach().clone() for name, p in healthy.backbone.named_parameters()}
    average = {name: p + 0.05 * p.std(correction=0) * drawn(*p.shape, seed=9) for name, p in live.items()}
    place = tmp_path / "checkpoints" / "step-00000010"
    for name, tensors in (("backbone", live), ("ema", average), ("backbone.optimiser", live)):
        write_tensors(place / f"{name}.safetensors", tensors)
    files = {name: "" for name in ("backbone.safetensors", "ema.safetensors", "backbone.optimiser.safetensors")}
    write_json(place / "state.json", {"step": 10, "files": files})
    assert found(healthy, lambda network: None, tmp_path)["weights.average"].grade == "harmful"

    def apply(network: nn.Module) -> None:
        network.load_state_dict(average)

    assert not found(healthy, apply, tmp_path)


def test_every_tensor_is_looked_at_once(healthy: Model) -> None:
    names = [layer.name for layer in layers(healthy) if layer.part == "backbone"]
    assert names == [name for name, _ in healthy.backbone.named_parameters()]

"""The doctor's look at adapters: a network that a known update solves, and every way in which a file goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import FLOW, model, pixel_codec
from torch import Tensor, nn

from mezzotint.adapters import LowRank
from mezzotint.checkpoints import write_tensors
from mezzotint.conditioning import Conditioning
from mezzotint.data.folder import NO_LABEL
from mezzotint.doctor import loras, strengths
from mezzotint.doctor.case import Case
from mezzotint.doctor.finding import Checked, NotChecked
from mezzotint.doctor.pictures import Pictures
from mezzotint.doctor.probes import adapters
from mezzotint.families import Model

SIDE, RANK, COUNT = 8, 8, 16
PIXELS = 3 * SIDE * SIDE


class Solved(nn.Module):
    """Images lie on a line through 0 with a small rest: the best linear denoiser of flow, in two matrices.

    Of the flow target noise - clean, this network answers x / sigma minus what `first` and `second` make of x.
    """

    def __init__(self, direction: Tensor) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(PIXELS, PIXELS, bias=False) for _ in range(2))
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(PIXELS))
            self.second.weight.copy_(0.5 * torch.outer(direction, direction) + 1e-3 * drawn(PIXELS, PIXELS))

    def forward(self, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        sigma = (t / 1000).view(-1, 1).clamp(min=1e-3)
        flat = x.flatten(1)
        clean = self.second(self.first(flat)) * (1 - sigma) / ((1 - sigma) ** 2 + sigma**2 / PIXELS)
        return ((flat - (1 - sigma) * clean) / sigma - clean).view_as(x)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


DIRECTION = torch.nn.functional.normalize(drawn(PIXELS, seed=1), dim=0)


@pytest.fixture(scope="module")
def case() -> Case:
    """A model that knows half of the right answer; the adapter that `right` writes adds the other half."""
    pixels = drawn(COUNT, 1, seed=2) * DIRECTION * PIXELS**0.5 * 0.3
    pictures = Pictures(
        Path("data"), tuple(map(str, range(COUNT))), pixels.view(COUNT, 3, SIDE, SIDE), ("",) * COUNT,
        torch.full((COUNT,), NO_LABEL), COUNT,
    )  # fmt: skip
    bare = model(Solved(DIRECTION).eval().requires_grad_(False), pixel_codec(), process=FLOW, size=(SIDE, SIDE))
    return Case(Path("model"), bare, pictures)


def right(alpha: float = 8.0) -> dict[str, Tensor]:
    """0.5 d d' as up down, and hardly anything beside it; in kohya's layout."""
    down = torch.cat([DIRECTION[None], 1e-2 * drawn(RANK - 1, PIXELS, seed=3) / PIXELS**0.5])
    up = torch.cat([0.5 * DIRECTION[:, None], 1e-2 * drawn(PIXELS, RANK - 1, seed=4) / PIXELS**0.5], dim=1)
    other = 1e-2 * drawn(PIXELS, RANK, seed=6) / PIXELS**0.5
    return {
        "lora_unet_second.lora_down.weight": down, "lora_unet_second.lora_up.weight": up,
        "lora_unet_second.alpha": torch.tensor(alpha),
        "lora_unet_first.lora_down.weight": drawn(RANK, PIXELS, seed=5) / PIXELS**0.5,
        "lora_unet_first.lora_up.weight": other, "lora_unet_first.alpha": torch.tensor(alpha),
    }  # fmt: skip


def examined(
    case: Case, place: Path, *files: Mapping[str, Tensor], weight: float = 1.0, notes: Mapping[str, str] | None = None
) -> Checked:
    paths = [write_tensors(place / f"{i}.safetensors", tensors, metadata=notes) for i, tensors in enumerate(files)]
    return adapters.examine(replace(case, lora=tuple((path, weight) for path in paths)))


def causes(checked: Checked) -> dict[str, str]:
    return {finding.cause: finding.grade for finding in checked.findings}


def test_a_sound_adapter_is_passed_over(case: Case, tmp_path: Path) -> None:
    checked = examined(case, tmp_path, right())
    assert not checked.findings
    gain, multiple = checked.measures[2], checked.measures[3]
    assert gain.low is not None and gain.low > 0.1
    assert 0.7 < multiple.value < 1.4


def test_without_an_adapter_it_says_what_to_give(case: Case) -> None:
    with pytest.raises(NotChecked, match="--lora"):
        adapters.examine(case)


@pytest.mark.parametrize("factor", [8.0, 0.125])
def test_strength_that_is_wrong_by_the_rank(case: Case, tmp_path: Path, factor: float) -> None:
    """alpha was multiplied or divided by the rank: the images ask for the weight that undoes it."""
    checked = examined(case, tmp_path, right(alpha=8.0 * factor))
    assert causes(checked) == {"adapter.scale": "harmful"}
    finding = checked.findings[0]
    wanted = float(finding.command.split("@")[1].split()[0])
    assert 0.7 < wanted * factor < 1.4
    assert "the rank" in finding.says


def test_strength_that_the_trainer_noted_otherwise(case: Case, tmp_path: Path) -> None:
    notes = {"ss_network_alpha": "8.0", "ss_network_dim": "8"}
    checked = examined(replace(case, data=None), tmp_path, right(alpha=64.0), notes=notes)
    assert causes(checked) == {"adapter.scale": "harmful"}
    assert "@0.12 " in checked.findings[0].command
    assert not examined(replace(case, data=None), tmp_path, right(), notes=notes).findings


def test_an_adapter_of_another_base_makes_it_worse_at_every_weight(case: Case, tmp_path: Path) -> None:
    tensors = right()
    tensors["lora_unet_second.lora_up.weight"] = -tensors["lora_unet_second.lora_up.weight"]
    checked = examined(case, tmp_path, tensors)
    assert causes(checked) == {"adapter.base": "harmful"}


def test_an_adapter_that_changes_weights_and_helps_nothing_is_of_another_base(case: Case, tmp_path: Path) -> None:
    tensors = right()
    apart = drawn(PIXELS, seed=9) - DIRECTION * (drawn(PIXELS, seed=9) @ DIRECTION)
    tensors["lora_unet_second.lora_up.weight"] = 0.02 * torch.nn.functional.normalize(apart, dim=0)[:, None].expand(
        PIXELS, RANK
    )
    tensors["lora_unet_second.lora_down.weight"] = drawn(RANK, PIXELS, seed=10) / PIXELS**0.5
    checked = examined(case, tmp_path, tensors)
    assert causes(checked) == {"adapter.base": "harmful"}
    assert "gains next to nothing on your images" in checked.findings[0].says


def unnamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("unet_", "unet_layer_"): tensor for key, tensor in tensors.items()}


def partly(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("unet_first", "unet_fist"): tensor for key, tensor in tensors.items()}


def lokr(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"lora_unet_first.lokr_w1": drawn(2, 2), "lora_unet_first.lokr_w2": drawn(4, 4)}


def shaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[:, :100] if "down" in key else tensor for key, tensor in tensors.items()}


def zero(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(tensor) if "up" in key else tensor for key, tensor in tensors.items()}


def infinite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor / 0 if "first.lora_up" in key else tensor for key, tensor in tensors.items()}


def collapsed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[:1].repeat(RANK, 1) if "down" in key else tensor for key, tensor in tensors.items()}


def without_text(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(4.0)}


@pytest.mark.parametrize(
    ("spoil", "cause", "grade", "words"),
    [
        (unnamed, "adapter.keys", "broken", ("2 of 2", "nearest: first")),
        (partly, "adapter.keys", "harmful", ("1 of 2", "lora_unet_fist", "nearest: first")),
        (lokr, "adapter.keys", "broken", ("LoKr",)), (shaped, "adapter.base", "broken", ("2 of 2", "another shape")),
        (zero, "adapter.empty", "broken", ("`up` is zero",)), (infinite, "adapter.finite", "broken", ("1 of 6",)),
        (collapsed, "adapter.rank", "note", ("one direction",)),
    ],
)  # fmt: skip
def test_pain_19_and_20_a_file_that_changes_nothing_says_why(
    case: Case, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], cause: str, grade: str,
    words: tuple[str, ...],
) -> None:  # fmt: skip
    checked = examined(replace(case, data=None), tmp_path, spoil(right()))
    assert causes(checked) == {cause: grade}
    assert all(word in checked.findings[0].says for word in words), checked.findings[0].says


def test_the_text_encoder_that_was_left_out(case: Case, tmp_path: Path) -> None:
    plain = replace(case, data=None)
    assert causes(examined(plain, tmp_path, without_text(right())))["adapter.text"] == "harmful"
    said = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "text_encoder.lora_alpha": 8})}
    assert causes(examined(plain, tmp_path, right(), notes=said))["adapter.text"] == "harmful"
    assert "adapter.text" in causes(examined(plain, tmp_path, right(), notes={"ss_text_encoder_lr": "5e-05"}))
    assert not examined(plain, tmp_path, right(), notes={"ss_text_encoder_lr": "None"}).findings


def test_pain_03_notes_of_another_prediction(case: Case, tmp_path: Path) -> None:
    checked = examined(replace(case, data=None), tmp_path, right(), notes={"modelspec.prediction_type": "v"})
    assert causes(checked) == {"adapter.base": "broken"}
    assert "velocity" in checked.findings[0].says and "flow" in checked.findings[0].says


def test_adapters_that_each_do_the_whole_work_are_too_much_together(case: Case, tmp_path: Path) -> None:
    """Two of them overshoot by as much as one adds: half of each, or one of them, is right."""
    checked = examined(case, tmp_path, right(), right())
    assert causes(checked) == {"adapter.blend": "harmful"}
    weights = [float(piece.split()[0]) for piece in checked.findings[0].command.split("@")[1:]]
    assert 0.7 < sum(weights) < 1.3
    cosine = next(measure for measure in checked.measures if "cosine" in measure.name)
    assert cosine.value == pytest.approx(1.0)
    half = adapters.examine(replace(case, lora=tuple((tmp_path / f"{i}.safetensors", 0.5) for i in range(2))))
    assert not half.findings


def test_updates_are_measured_as_their_product_says(case: Case, tmp_path: Path) -> None:
    """||scale up down|| / ||W||, its singular values and the cosine of two updates, against the whole matrices."""
    path = write_tensors(tmp_path / "one.safetensors", right(alpha=4.0))
    opened = loras.opened(case.bare, path, 0.7)
    assert opened.adapter is not None
    for update in loras.updates(case.bare, opened.adapter, 0.7):
        product = update.low.up @ update.low.down
        base = case.bare.backbone.get_parameter(f"{update.module}.weight")
        assert update.ratio == pytest.approx(float(0.7 * 0.5 * product.norm() / base.norm()), rel=1e-4)
        assert torch.allclose(update.values.float(), torch.linalg.svdvals(product)[:RANK], rtol=1e-3, atol=1e-5)
    one, other = (LowRank("m", drawn(3, 20, seed=i), drawn(30, 3, seed=i + 5)) for i in range(2))
    products = [(low.up @ low.down).flatten() for low in (one, other)]
    expected = float(torch.nn.functional.cosine_similarity(*products, dim=0))
    assert loras.cosine(one, other) == pytest.approx(expected, abs=1e-5)


def test_usual_mistakes_are_called_by_name() -> None:
    assert strengths.mistake(8.2, 8, 8.0).startswith("the rank")
    assert strengths.mistake(1 / 16, 16, 16.0).startswith("1 over the rank")
    assert strengths.mistake(4.1, 16, 16.0).startswith("the square root")
    assert strengths.mistake(1 / 30, 32, 1.0)
    assert not strengths.mistake(100.0, 4, 4.0)


def test_every_network_of_a_model_is_open_to_adapters(case: Case) -> None:
    assert set(loras.networks(case.bare)) == {"backbone"}
    assert isinstance(case.bare, Model)

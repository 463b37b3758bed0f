"""The numbers of a training step against the reference library and closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from training_parts import SIZE, full_recipe, image_folder

from mezzotint.conditioning import Conditioning
from mezzotint.training import draws, ema, masking, recipe
from mezzotint.training.adversary import PatchDiscriminator, balance, hinge
from mezzotint.training.loop import learning_rate
from mezzotint.training.methods import Place
from mezzotint.training.methods.full import Full
from mezzotint.training.methods.vae import Passage, kl
from mezzotint.training.recipe import Inpaint, Optimiser


class Affine(nn.Module):
    """A network simple enough to compute by hand: raw = 0.3 x + 0.001 t."""

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return 0.3 * x + 0.001 * t.view(-1, 1, 1, 1).float()


def method(tmp_path: Path, **changes: Any) -> Full:
    if not (tmp_path / "train").exists():
        image_folder(tmp_path / "train", 6)
    plan = full_recipe(tmp_path, **changes)
    for name in ("inpaint", "classes"):
        if changes.get(name, 0) is None:
            del plan[name]
    job = Full(recipe.check(plan, "test"), Place(tmp_path, torch.device("cpu"), lambda *_: None))
    job.trained["backbone"] = Affine()
    return job


TABLE = {"kind": "discrete", "betas": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize(
    ("prediction", "zero"), [("epsilon", False), ("velocity", False), ("clean", False), ("velocity", True)]
)
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_pain_07_the_loss_is_the_reference_loop_s(tmp_path: Path, prediction: str, zero: bool, weighting: str) -> None:
    """DDPMScheduler.add_noise, get_velocity and compute_snr on the same images, noise, times; min-SNR as published."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    schedule = {**TABLE, "zero_terminal_snr": zero}
    process = {"prediction": prediction, "schedule": schedule}
    job = method(tmp_path, process=process, inpaint=None, classes=None, loss={"weighting": weighting}, batch=6)
    batch = job.draw(3)
    ours, _ = job.loss(batch, 3)

    names = {"epsilon": "epsilon", "velocity": "v_prediction", "clean": "sample"}
    reference = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type=names[prediction],
        rescale_betas_zero_snr=zero,
    )  # fmt: skip
    clean, noise, t = batch["clean"], batch["noise"], batch["t"]
    noisy = reference.add_noise(clean, noise, t)
    target = {"epsilon": noise, "clean": clean, "velocity": reference.get_velocity(clean, noise, t)}[prediction]
    raw = 0.3 * noisy + 0.001 * t.view(-1, 1, 1, 1).float()
    errors = F.mse_loss(raw, target, reduction="none").mean((1, 2, 3))
    if weighting == "min_snr":
        snr = compute_snr(reference, t)
        capped = torch.stack([snr, torch.full_like(snr, 5.0)], dim=1).min(dim=1)[0]
        errors = errors * {"epsilon": capped / snr, "velocity": capped / (snr + 1), "clean": capped}[prediction]
    assert ours.item() == pytest.approx(errors.mean().item(), rel=2e-6)


def test_the_flow_loss_by_hand(tmp_path: Path) -> None:
    job = method(tmp_path, inpaint=None, classes=None, loss={"density": "logit_normal"})
    batch = job.draw(0)
    sigma = (batch["t"] / 1000).view(-1, 1, 1, 1)
    raw = 0.3 * ((1 - sigma) * batch["clean"] + sigma * batch["noise"]) + 0.001 * batch["t"].view(-1, 1, 1, 1)
    expected = ((raw - (batch["noise"] - batch["clean"])) ** 2).mean()
    assert job.loss(batch, 0)[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(batch["clean"], job.core.latents[0][batch["index"], 0]) or torch.allclose(
        batch["clean"].sort(-1)[0], job.core.latents[0][batch["index"], 0].sort(-1)[0]
    )  # mirrored or not, these are the images


def test_the_inside_of_the_mask_counts_as_asked(tmp_path: Path) -> None:
    job = method(tmp_path, inpaint={"inside_weight": 3.0, "bank": 4})
    batch = job.draw(0)
    error, _ = job.core.error(job.trained["backbone"], batch)
    inside = batch["concat"][:, :1]
    weight = 1 + 2 * inside
    expected = (error * weight).mean() / weight.mean()
    assert job.loss(batch, 0)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_validation_is_the_loss_by_band_on_fixed_draws(tmp_path: Path) -> None:
    image_folder(tmp_path / "train", 6)
    data = full_recipe(tmp_path)["data"] | {"validation": str(tmp_path / "train")}
    job = method(tmp_path, data=data, inpaint=None, classes=None, validation={"bands": 4, "images": 6})
    found = job.validate(Affine())
    assert found == job.validate(Affine())
    for band, pieces in enumerate(job.core.held_out):
        batch = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
        assert ((batch["t"] >= 250 * band) & (batch["t"] <= 250 * (band + 1))).all()
        error, _ = job.core.error(Affine(), batch)
        name = f"validation/{25 * band}-{25 * (band + 1)}%"
        assert found[name] == pytest.approx(error.mean().item(), rel=1e-6)
    bands = [value for key, value in found.items() if "/" in key]
    assert len(bands) == 4 and found["validation"] == pytest.approx(sum(bands) / 4)
    other = method(tmp_path, data=data, inpaint=None, classes=None, validation={"bands": 4, "images": 6}, seed=9)
    assert other.validate(Affine()) == found  # comparable between runs of other seeds


def test_draws_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    one, two = method(tmp_path), method(tmp_path)
    for step in (5, 0, 5):
        first, second = one.draw(step), two.draw(step)
        assert first.keys() == second.keys() == {"bucket", "index", "flip", "clean", "noise", "concat", "t", "label"}
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(one.draw(1)["noise"], one.draw(2)["noise"])


def test_order_visits_every_image_once_an_epoch() -> None:
    drawn = torch.cat([draws.shuffled(3, step, 4, 10) for step in range(10)])
    for epoch in drawn.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(drawn[:10], drawn[10:20])
    labels = torch.tensor([0] * 20 + [1] * 3 + [-1] * 1)
    counts = torch.zeros(3)
    for step in range(50):
        chosen = labels[draws.balanced(0, step, 7, labels)]
        counts += torch.tensor([(chosen == kind).sum() for kind in (-1, 0, 1)])
    assert counts.sum() == 350 and counts.min() >= 100  # 116.7 each


def test_dropout_and_missing_labels_become_no_class() -> None:
    labels = torch.tensor([0, 1, -1, 1]).repeat(5000)
    out = draws.dropped(labels, 0.25, 2, torch.Generator().manual_seed(0))
    assert (out[labels == -1] == 2).all()
    share = (out[labels != -1] == 2).float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 15000)
    assert torch.equal(out[out != 2], labels[out != 2])


def test_masks_from_files_follow_the_image_s_mirroring_and_decide_the_label(tmp_path: Path) -> None:
    core = method(tmp_path).core
    images, bank = core.images[0], core.bank(core.images[0], 0)
    index, flips = torch.tensor([1, 1, 0]), [(), (-1,), ()]
    plan = Inpaint(source="both", file_share=1.0)
    masks, keeps = masking.draw(plan, images, bank, index, flips, 0, 0)
    own = images.masks[0].float()
    assert torch.equal(masks[0], own) and torch.equal(masks[1], own.flip(-1))
    assert any(torch.equal(masks[2, 0], b.flip(turn)[0].float()) for b in bank for turn in masking.TURNS)
    assert keeps.tolist() == [True, True, True]
    elsewhere = torch.zeros_like(bank)
    elsewhere[..., -3:, -3:] = True  # a free mask that misses the defect: the image's label says nothing about it
    _, keeps = masking.draw(Inpaint(), images, elsewhere, torch.tensor([1, 0]), [(), ()], 0, 0)
    assert keeps.tolist() == [False, True]
    grown, _ = masking.draw(Inpaint(source="file", dilation=(2, 2)), images, bank, torch.tensor([1]), [()], 0, 0)
    assert grown.sum() == (6 + 4) * (4 + 4)  # the square of 6 x 4 pixels, 2 more on every side
    whole, keeps = masking.draw(Inpaint(full_share=1.0), images, bank, index, flips, 0, 0)
    assert whole.min() == 1 and keeps.all() and whole.shape == (3, 1, SIZE, SIZE)


def test_learning_rates_are_the_closed_form() -> None:
    plan = Optimiser(rate=2e-3, warmup=10, final=0.1)
    rates = [learning_rate(plan, step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(2e-4) and rates[9] == pytest.approx(2e-3) and rates[10] == pytest.approx(2e-3)
    assert rates[60] == pytest.approx(2e-3 * (0.1 + 0.9 / 2)) and rates[110] == pytest.approx(2e-4)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3), 100, eta_min=2e-4
    )
    for step in range(10, 110):
        assert rates[step] == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        reference.optimizer.step()
        reference.step()
    assert learning_rate(Optimiser(rate=1e-3, schedule="constant"), 77, 110) == 1e-3


def test_the_average_is_the_closed_form() -> None:
    network = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = ema.follow(network)
    expected = network[0].weight.detach().clone()  # type: ignore[union-attr]
    for step in range(5):
        with torch.no_grad():
            network[0].weight.add_(1.0)  # type: ignore[operator, union-attr]
            network[1].running_mean.add_(2.0)  # type: ignore[operator, union-attr]
        ema.update(average, network, step, 0.9, warmup=True)
        d = min(0.9, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * network[0].weight.detach()  # type: ignore[union-attr]
    assert torch.allclose(average[0].weight, expected, rtol=1e-6)  # type: ignore[index]
    assert torch.equal(average[1].running_mean, network[1].running_mean)  # type: ignore[index]
    assert not any(p.requires_grad for p in average.parameters())


def test_kl_and_hinge_and_balance_are_the_closed_forms() -> None:
    torch.manual_seed(0)
    mean, log_variance = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    normal = torch.distributions.Normal
    ours = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0))
    assert kl(mean, log_variance).item() == pytest.approx(ours.flatten(1).sum(1).mean().item(), rel=1e-6)
    assert hinge(torch.tensor([0.5, 2.0]), torch.tensor([-0.5, -3.0])).item() == pytest.approx((0.25 + 0.25) / 2)
    last = torch.tensor([1.0, 2.0], requires_grad=True)
    found = balance((last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 2.0])).sum(), last)
    assert found.item() == pytest.approx(5 / 2.0001, rel=1e-6)


def test_the_posterior_is_drawn_with_its_own_deviation() -> None:
    class Fixed(nn.Module):
        def encode(self, pixels: Tensor) -> Tensor:
            return torch.cat((torch.full_like(pixels, 0.5), torch.full_like(pixels, math.log(4.0))), 1)

        def decode(self, z: Tensor) -> Tensor:
            return 10 * z

    pixels = torch.zeros(1, 1, 2, 2)
    noise = torch.tensor([[[[1.0, -1.0], [0.0, 2.0]]]])
    drawn, divergence = Passage(Fixed(), 0.25)(pixels, noise)
    assert torch.allclose(drawn, 10 * (0.5 + 2 * noise))
    assert divergence is not None and divergence.item() == pytest.approx(4 * (0.25 + 4 - 1 - math.log(4)) / 2)


def test_the_discriminator_judges_every_image_alone() -> None:
    torch.manual_seed(0)
    judge, pixels = PatchDiscriminator(1, 8, 2), torch.randn(3, 1, 32, 32)
    together = judge(pixels)
    alone = torch.cat([judge(one[None]) for one in pixels])
    assert together.shape == (3, 1, 6, 6)
    assert torch.allclose(together, alone, atol=1e-6)


def test_channel_weights_count_errors_as_pixels_do_at_power_two() -> None:
    """For an orthonormal codec the weighted error of whitened latents is the pixel error, up to one constant."""
    from mezzotint.codec import Codec, LatentSpace
    from mezzotint.codec.patch_pca import PatchPCAConfig, principal_components
    from mezzotint.training.diffusion import channel_weights

    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(8, 1, 16, 16, generator=rng).cumsum(-1)
    bare = principal_components(PatchPCAConfig(1, 16, patch=4), pixels)
    deviation = bare.encode(pixels).std((0, 2, 3))
    codec = Codec(bare, LatentSpace(tuple((1 / deviation).tolist())))
    weights = channel_weights(codec.space, 16, 2.0)
    ratios = []
    for _ in range(3):
        wrong = torch.randn(1, 16, 4, 4, generator=rng)
        seen = codec.decode(wrong) - codec.decode(torch.zeros_like(wrong))
        ratios.append((weights * wrong.square()).mean() / seen.square().mean())
    assert torch.allclose(torch.stack(ratios), ratios[0].expand(3), rtol=1e-4)
    assert torch.equal(channel_weights(codec.space, 16, 0.0), torch.ones(1, 16, 1, 1))
    assert channel_weights(LatentSpace(0.18), 4, 1.0).flatten().tolist() == pytest.approx([1.0] * 4)


def test_the_loss_outside_a_mask_counts_as_little_as_the_recipe_says(tmp_path: Path) -> None:
    """Per image: sum of weighted errors over sum of weights, weight 1 in the mask's cells and `outside` elsewhere."""
    job = method(tmp_path, inpaint=None, classes=None, loss={"outside": 0.25}, batch=6)
    batch = job.draw(0)
    error, _ = job.core.error(job.trained["backbone"], batch)
    images = job.core.images[0]
    expected = []
    for row, (index, flip) in enumerate(zip(batch["index"].tolist(), batch["flip"].tolist(), strict=True)):
        weight = torch.ones(1, SIZE, SIZE)
        if images.mask_of[index] >= 0:
            own = images.masks[images.mask_of[index]].flip(job.core.mirrorings[flip])
            weight = torch.where(own, 1.0, 0.25)
        expected.append((error[row] * weight).sum() / (weight.sum() * error.shape[1]))
    assert (images.mask_of >= 0).any() and (images.mask_of < 0).any()
    assert job.loss(batch, 0)[0].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_noise_offset_is_one_constant_a_channel(tmp_path: Path) -> None:
    plain, offset = (method(tmp_path, loss={"offset": size}).draw(0)["noise"] for size in (0.0, 0.5))
    added = offset - plain
    assert torch.allclose(added, added.mean((2, 3), keepdim=True).expand_as(added), atol=1e-6)
    assert added.abs().min() > 0


def test_buckets_of_one_size_a_batch_show_every_image(tmp_path: Path) -> None:
    """Wide and tall pictures: a batch has one size, a round shows every image, validation sees both sizes."""
    folder = image_folder(tmp_path / "train", 6)
    for i, shape in enumerate([(32, 8), (32, 8), (8, 32), (8, 32), (16, 16), (16, 16)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, shape[::-1], dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps({**r, "mask": None}) + "\n" for r in rows))
    data = full_recipe(tmp_path)["data"] | {
        "bucket_step": 8,
        "bucket_ratio": 4.0,
        "validation": str(folder),
        "flips": [],
    }
    job = method(tmp_path, data=data, inpaint=None, classes=None, batch=2, validation={"images": 6, "bands": 2})
    shapes, seen = set(), set()
    for step in range(3):
        batch = job.draw(step)
        shapes.add(tuple(batch["clean"].shape[2:]))
        seen |= set(job.names(batch))
        assert job.loss(batch, step)[0].isfinite()
    assert shapes == {(8, 32), (32, 8), (16, 16)} and seen == {f"{i}.png" for i in range(6)}
    assert {tuple(piece["clean"].shape[2:]) for piece in job.core.held_out[0]} == shapes
    assert sum(len(piece["index"]) for piece in job.core.held_out[0]) == 6
    assert math.isfinite(job.validate(Affine())["validation"])

"""The inference path against loops written by hand with the reference library's networks and schedulers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import relative
from parts import (
    CLASSES,
    EPSILON,
    FLOW,
    bert_folder,
    class_model,
    kl_codec,
    model,
    pixel_codec,
    plain_unet,
    text_unet,
    with_contract,
)  # fmt: skip
from PIL import Image
from torch import Tensor, nn

from mezzotint import images
from mezzotint.codec import inpaint_concat, mask_maps
from mezzotint.contract import ClassFacts, GuidanceFacts
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.generate import generate, generate_batch
from mezzotint.layers.config import write_config
from mezzotint.request import Request
from mezzotint.sampling import seeded_noise
from mezzotint.text import minilm

TOLERANCE = 1e-5  # relative, on the final latents of a whole run; at most 6e-7 measured


def reference(ours: nn.Module, kind: str) -> Any:
    """The reference library's network with the same weights."""
    import diffusers

    config: Any = ours.config
    theirs = getattr(diffusers, kind).from_config(write_config(config, kind))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs.eval()


def ddim(steps: int) -> Any:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, timestep_spacing="leading"
    )
    scheduler.set_timesteps(steps)
    return scheduler


def noise_of(seeds: list[int], *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def picture(width: int = 64, height: int = 64, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth and rough at once, no two pixels rows alike."""
    generator = np.random.default_rng(seed)
    channels = (3,) if mode == "RGB" else ()
    return Image.fromarray(generator.integers(0, 256, (height, width, *channels), dtype=np.uint8), mode)


def stroke(width: int = 64, height: int = 64) -> Image.Image:
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[height // 3 : height // 2, width // 5 : width - 9] = 255
    return Image.fromarray(mask)


@torch.no_grad()
def test_classes_with_guidance_follow_the_reference_loop() -> None:
    subject = class_model()
    unet, scheduler = reference(subject.backbone, "UNet2DModel"), ddim(7)
    x = noise = noise_of([3, 4], 3, 16, 16)
    labels = torch.tensor([1, 1, 3, 3])
    for t in scheduler.timesteps:
        conditional, unconditional = unet(torch.cat((x, x)), t, class_labels=labels).sample.chunk(2)
        x = scheduler.step(unconditional + 3.0 * (conditional - unconditional), t, x).prev_sample
    request = Request(label="crack", count=2, seed=3, sampler="ddim", steps=7, guidance=3.0)
    assert relative(generate(subject, request).latents, x) < TOLERANCE
    assert relative(generate(subject, replace(request, start_noise=noise, seed=99)).latents, x) < TOLERANCE


@torch.no_grad()
def test_text_with_a_negative_prompt_follows_the_reference_loop(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=10)
    codec = kl_codec()
    subject = model(text_unet(4, 4, encoder.width), codec, encoder)
    unet, scheduler = reference(subject.backbone, "UNet2DConditionModel"), ddim(10)
    states = encoder.encode(["a crack on the cell", "dark area"])
    x = noise_of([5], 4, 16, 16)
    for t in scheduler.timesteps:
        raw = unet(
            torch.cat((x, x)), t, encoder_hidden_states=states.tokens, encoder_attention_mask=states.mask
        ).sample  # fmt: skip
        wanted, unwanted = raw.chunk(2)
        x = scheduler.step(unwanted + 2.5 * (wanted - unwanted), t, x).prev_sample
    request = Request(prompt="a crack on the cell", negative="dark area", seed=5, steps=10, guidance=2.5)
    result = generate(subject, request)
    assert relative(result.latents, x) < TOLERANCE
    decoded = reference(codec.autoencoder, "AutoencoderKL").decode(x / 0.7 + 0.05).sample
    theirs = ((decoded.clamp(-1, 1) + 1) * 127.5)[0].permute(1, 2, 0).numpy()
    assert np.abs(np.array(result.images[0], dtype=np.float32) - theirs).max() < 0.51  # rounding to bytes


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_enters_the_path_where_the_reference_does(strength: float) -> None:
    codec = kl_codec()
    subject = model(plain_unet(4, 4), codec)
    unet, scheduler = reference(subject.backbone, "UNet2DModel"), ddim(10)
    vae = reference(codec.autoencoder, "AutoencoderKL")
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    clean = (vae.encode(pixels).latent_dist.mean - 0.05) * 0.7
    timesteps = scheduler.timesteps[10 - int(10 * strength) :]
    x = scheduler.add_noise(clean, noise_of([1], 4, 16, 16), timesteps[:1])
    for t in timesteps:
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
    result = generate(subject, Request(image=picture(), strength=strength, steps=10, seed=1))
    assert relative(result.latents, x) < TOLERANCE


@torch.no_grad()
def test_masked_sampling_keeps_known_latents_as_the_reference_does() -> None:
    codec = kl_codec()
    subject = model(plain_unet(4, 4), codec)
    unet, scheduler = reference(subject.backbone, "UNet2DModel"), ddim(8)
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    mask = F.max_pool2d(torch.from_numpy(np.array(stroke()) / 255.0)[None, None].float(), 4)
    clean = codec.encode(pixels)
    x = noise = noise_of([2], 4, 16, 16)
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        known = clean if i == 7 else scheduler.add_noise(clean, noise, scheduler.timesteps[i + 1 : i + 2])
        x = mask * x + (1 - mask) * known
    result = generate(subject, Request(image=picture(), mask=stroke(), steps=8, seed=2))
    assert relative(result.latents, x) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 4])
def test_an_inpainting_network_reads_mask_and_masked_latents_in_order(k: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    codec = kl_codec()
    subject = model(plain_unet(4 + k * k + 4, 4), codec, inpaint=k, process=FLOW)
    unet, scheduler = reference(subject.backbone, "UNet2DModel"), FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(6)
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None] / 127.5 - 1
    white = torch.from_numpy(np.array(stroke()) / 255.0).float()
    masked = codec.encode(pixels * (white < 0.5))
    maps = torch.zeros(1, k * k, 16, 16)  # cell (i, j) of the k x k cells under a latent is channel k * i + j
    side = 4 // k
    for y, x in np.ndindex(16 * k, 16 * k):
        maps[0, k * (y % k) + x % k, y // k, x // k] = white[side * y : side * (y + 1), side * x : side * (x + 1)].max()
    x = noise_of([2], 4, 16, 16)
    for t in scheduler.timesteps:
        x = scheduler.step(unet(torch.cat((x, maps, masked), 1), t).sample, t, x).prev_sample
    request = Request(image=picture(), mask=stroke(), steps=6, seed=2, sampler="flow_euler")
    assert relative(generate(subject, request).latents, x) < TOLERANCE


def test_without_an_image_an_inpainting_network_repaints_everything() -> None:
    codec = kl_codec()
    subject = model(plain_unet(4 + 1 + 4, 4), codec, inpaint=1, process=FLOW)
    grey = Image.new("RGB", (64, 64), (127, 127, 127))
    everywhere = Image.new("L", (64, 64), 255)
    alone = generate(subject, Request(steps=3, sampler="flow_euler"))
    canvas = generate(subject, Request(steps=3, sampler="flow_euler", image=grey, mask=everywhere))
    torch.testing.assert_close(alone.latents, canvas.latents)


@pytest.mark.parametrize("inpaint", [None, 1])
@pytest.mark.parametrize(("mode", "size"), [("RGB", (64, 64)), ("RGBA", (64, 64)), ("L", (64, 64)), ("RGB", (100, 80))])
def test_outside_the_mask_the_image_is_kept_to_the_bit(inpaint: int | None, mode: str, size: tuple[int, int]) -> None:
    extra = 0 if inpaint is None else 5
    subject = model(plain_unet(4 + extra, 4), kl_codec(), inpaint=inpaint)
    given = picture(*size).convert(mode)
    result = generate(subject, Request(image=given, mask=stroke(*size), steps=2, count=2))
    expected = given.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS) if size != (64, 64) else given
    before = np.array(expected.convert("RGB"))
    outside = np.array(stroke(*size).resize((64, 64), Image.Resampling.BOX)) < 128
    for image in result.images:
        after = np.array(image)
        assert np.array_equal(after[outside], before[outside])
        assert (after[~outside] != before[~outside]).mean() > 0.9


def test_masked_image_hides_what_is_repainted() -> None:
    codec, mask = kl_codec(), images.mask_to_tensor(stroke(), 64, 64)
    one, other = (images.to_tensor(picture(seed=s), 64, 64) for s in (0, 1))
    other = torch.where(mask > 0, other, one)
    assert not torch.equal(one, other)
    assert torch.equal(inpaint_concat(codec, one, mask, 2), inpaint_concat(codec, other, mask, 2))
    with pytest.raises(InputError, match="k = 3 must divide"):
        mask_maps(mask, 4, 3)


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m"])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(sampler: str) -> None:
    subject = class_model()
    together = generate(subject, Request(label=1, count=3, seed=10, sampler=sampler, guidance=2.0)).latents
    for i in range(3):
        alone = generate(subject, Request(label=1, seed=10 + i, sampler=sampler, guidance=2.0)).latents
        assert relative(together[i : i + 1], alone) < 1e-5
    assert relative(together[:1], together[1:2]) > 0.1


def test_requests_drawn_as_one_batch_are_those_drawn_alone(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=10)
    subject = model(text_unet(4, 4, encoder.width), kl_codec(), encoder)
    shared: dict[str, Any] = {"steps": 4, "guidance": 2.0, "sampler": "euler_ancestral"}
    requests = [
        Request(prompt="a crack", negative="dark", image=picture(seed=1), mask=stroke(), count=2, seed=7, **shared),
        Request(prompt="scratch on steel", image=picture(seed=2), mask=stroke().rotate(90), seed=1, **shared),
        Request(image=picture(seed=3), mask=stroke(), seed=1, start_noise=noise_of([8], 4, 16, 16), **shared),
    ]
    results = generate_batch(subject, requests)
    assert [len(result.images) for result in results] == [2, 1, 1]
    for request, result in zip(requests, results, strict=True):
        alone = generate(subject, request)
        assert relative(result.latents, alone.latents) < 1e-5
        difference = np.array(result.images[-1], dtype=int) - np.array(alone.images[-1], dtype=int)
        assert np.abs(difference).max() <= 1
    with pytest.raises(InputError, match="must agree, and differ in guidance"):
        generate_batch(subject, [requests[0], replace(requests[1], guidance=3.0)])
    with pytest.raises(InputError, match=r"must agree, and differ in .*masked"):
        generate_batch(subject, [requests[0], replace(requests[1], mask=None, strength=1.0)])


class Counted(nn.Module):
    """A network that remembers how many rows each call had."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.config, self.rows = network, network.config, []

    def forward(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        self.rows.append(len(x))
        return self.network(x, t, conditioning)


def test_guidance_outside_its_interval_costs_nothing_and_changes_nothing() -> None:
    subject = class_model()
    counted = replace(subject, backbone=Counted(subject.backbone))
    request = Request(label=1, steps=5, guidance=3.0, sampler="ddim", count=2)
    generate(counted, replace(request, guidance_interval=(0.25, 0.75)))
    assert counted.backbone.rows == [2, 4, 4, 4, 2]
    none = generate(subject, replace(request, guidance=1.0)).latents
    nearly = generate(subject, replace(request, guidance_interval=(0.9, 0.95))).latents
    torch.testing.assert_close(none, nearly, rtol=0, atol=0)


def test_a_named_negative_class_is_the_baseline() -> None:
    subject = class_model()
    request = Request(label="crack", negative="healthy", guidance=2.0, steps=4)
    named = generate(subject, request).latents
    unconditional = ClassFacts(names=CLASSES, null=0)  # the same rows, "healthy" declared as no class
    again = generate(with_contract(subject, classes=unconditional), replace(request, negative="")).latents
    torch.testing.assert_close(named, again, rtol=0, atol=0)
    assert relative(named, generate(subject, replace(request, negative="")).latents) > 1e-2
    as_prompt = generate(subject, replace(request, label=None, prompt="crack")).latents
    torch.testing.assert_close(named, as_prompt, rtol=0, atol=0)


def test_text_is_encoded_once_a_run(tmp_path: Path) -> None:
    encoder = minilm.load_folder(bert_folder(tmp_path / "bert"), length=10)
    subject = model(text_unet(3, 3, encoder.width), pixel_codec(), encoder)
    calls: list[int] = []
    encoder.network.register_forward_hook(lambda *_: calls.append(1))
    generate(subject, Request(prompt="a crack", negative="dark", steps=4, guidance=2.0, count=3))
    assert len(calls) == 1  # the prompt and the negative prompt together


def test_what_the_request_leaves_open_is_answered_by_the_contract() -> None:
    subject = class_model(size=(24, 40))
    seen: list[int] = []
    result = generate(subject, Request(), watch=lambda index, *_: seen.append(index))
    assert seen == [0, 1, 2, 3, 4] and result.images[0].size == (24, 40)
    told = generate(subject, Request(width=24, height=40, sampler="ddim", steps=5, guidance=1.0, label=3))
    torch.testing.assert_close(result.latents, told.latents, rtol=0, atol=0)


def test_eta_reaches_the_sampler() -> None:
    from diffusers import DDIMScheduler

    subject = class_model()
    unet, scheduler = reference(subject.backbone, "UNet2DModel"), ddim(4)
    rng = seeded_noise([6])
    x = rng(torch.empty(1, 3, 16, 16))
    assert isinstance(scheduler, DDIMScheduler)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            fresh = rng(x) if i < 3 else torch.zeros_like(x)  # the last step has nothing to add
            raw = unet(x, t, class_labels=torch.tensor([2])).sample
            x = scheduler.step(raw, t, x, eta=0.7, variance_noise=fresh).prev_sample
    assert relative(generate(subject, Request(label=2, seed=6, steps=4, eta=0.7)).latents, x) < TOLERANCE


def test_bfloat16_stays_near_float32() -> None:
    subject = class_model()
    request = Request(label=1, steps=4, guidance=2.0)
    exact = generate(subject, request).latents
    half = generate(replace(subject, backbone=class_model().backbone.to(torch.bfloat16)), request).latents
    assert half.dtype == torch.float32 and 1e-6 < relative(half, exact) < 0.1


def test_a_distilled_network_is_told_its_scale() -> None:
    subject = class_model(guidance=GuidanceFacts(distilled=True, embedded=True, scale=4.0))
    told: list[Tensor] = []

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.config = subject.backbone, subject.backbone.config

        def forward(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
            told.append(conditioning.guidance)
            return self.network(x, t, conditioning)

    generate(replace(subject, backbone=Told()), Request(label=1, steps=2, count=2))
    assert [row.tolist() for row in told] == [[4.0, 4.0]] * 2


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"count": 0}, "count must be"),
        ({"count": True}, "count must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**63}, "seed .* is too large"),
        ({"width": 32}, "width and height go together"),
        ({"guidance": -1.0}, "guidance must be at least 0"),
        ({"guidance": float("nan")}, "guidance must be"),
        ({"guidance_rescale": 1.5}, "guidance_rescale must be from 0 to 1"),
        ({"guidance_interval": (0.8, 0.2)}, "two rising fractions"),
        ({"strength": 0.5}, "there is no image"),
        ({"mask": stroke()}, "there is no image"),
        ({"image": picture(), "strength": 0.0}, "strength must be above 0"),
        ({"image": picture(), "strength": 1.1}, "strength must be above 0 and at most 1"),
        ({"sampler": "dpm++2m"}, "unknown sampler 'dpm\\+\\+2m': did you mean 'dpmpp_2m'"),
        ({"sampler": "flow_euler"}, "flow_euler"),
        ({"eta": 0.5, "sampler": "unipc"}, "sampler 'unipc' has no eta; these have: .*ddim"),
        ({"steps": 5000}, "5000"),
        ({"label": 4}, "label 4 is out of range: 0 to 2"),
        ({"label": -1}, "label -1 is out of range"),
        ({"label": "crak"}, "no class 'crak': did you mean 'crack'"),
        ({"negative": "crak", "guidance": 2.0}, "no class 'crak'"),
        ({"negative": "healthy", "guidance": 1.0}, "negative prompt acts through guidance, and that is off at scale 1"),
        ({"label": 1, "prompt": "crack"}, "as label or as prompt, not both"),
        ({"image": picture(), "mask": stroke(64, 32)}, "the mask is 64x32 and the image 64x64: give both one shape"),
        ({"start_noise": torch.zeros(1, 3, 8, 8)}, r"start noise is \(1, 3, 8, 8\), .* needs \(1, 3, 16, 16\)"),
    ],
)
def test_what_cannot_be_served_is_said(wish: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        generate(class_model(), Request(**wish))


def test_what_the_model_was_not_trained_for_is_said() -> None:
    plain = model(plain_unet(4, 4), kl_codec())
    for wish, says in (
        (Request(prompt="a crack"), "trained without text"),
        (Request(label=1), "has no classes"),
        (Request(width=65, height=64), "size 65x64 is not a multiple of 4, which this model needs: use 64x64"),
    ):
        with pytest.raises(InputError, match=says):
            generate(plain, wish)
    undropped = with_contract(class_model(), guidance=GuidanceFacts())
    with pytest.raises(InputError, match="guidance 2 needs a model trained with its condition dropped"):
        generate(undropped, Request(label=1, guidance=2.0))
    always = with_contract(class_model(), classes=ClassFacts(names=(*CLASSES, "finger")))
    with pytest.raises(InputError, match="needs a label: 0 to 3, or one of healthy, crack"):
        generate(always, Request())


def test_numbers_that_are_not_finite_are_said_and_no_black_image_leaves() -> None:
    """Pain 4: black images from weights or formats that overflow."""
    subject = class_model()
    with torch.no_grad():
        subject.backbone.conv_out.bias[0] = float("nan")
    with pytest.raises(InputError, match="the backbone gave numbers that are not finite"):
        generate(subject, Request(label=1))
    codec = kl_codec()
    overflowing = model(plain_unet(4, 4), codec)
    with torch.no_grad():
        codec.autoencoder.decoder.conv_out.bias[0] = float("inf")
    with pytest.raises(InputError, match="the codec gave numbers that are not finite"):
        generate(overflowing, Request())


def test_odd_sizes_come_out_as_asked() -> None:
    result = generate(model(plain_unet(4, 4), kl_codec()), Request(width=44, height=60, steps=2))
    assert result.images[0].size == (44, 60) and result.latents.shape == (1, 4, 15, 11)


def test_the_pipeline_records_what_makes_the_image_again() -> None:
    from mezzotint.pipeline import pipeline, pixels_digest

    subject: Model = class_model()
    request = Request(label="crack", count=2, seed=5, image=picture(16, 16))
    artifacts = pipeline(subject, "off").run(request)
    facts = artifacts[1].record
    assert facts["seed"] == 6 and facts["request"]["image"] == pixels_digest(picture(16, 16))
    asked = facts["request"]
    again = Request(
        label=asked["label"], seed=facts["seed"], image=picture(16, 16), strength=asked["strength"],
        sampler=asked["sampler"], steps=asked["steps"], guidance=asked["guidance"], width=asked["width"],
        height=asked["height"],
    )  # fmt: skip
    assert pixels_digest(generate(subject, again).images[0]) == pixels_digest(artifacts[1].image)
    with pytest.raises(InputError, match="no such policy: strict"):
        pipeline(subject, "strict")
    assert subject.process == EPSILON

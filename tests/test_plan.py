"""Plans against exact counts, closed forms, hand-counted memory, and what really runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parts
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import mezzotint as mz
from mezzotint.backbones.dit import DiT, DiTConfig
from mezzotint.conditioning import Conditioning
from mezzotint.errors import InputError
from mezzotint.families import save
from mezzotint.plan import formats, kernels, words
from mezzotint.plan.fit import fitted
from mezzotint.plan.generating import Job, generating, settled
from mezzotint.plan.machines import Machine, Point, accelerator
from mezzotint.plan.methods import METHODS
from mezzotint.plan.objective import Training
from mezzotint.plan.operators import Call
from mezzotint.plan.subject import Subject, find, native
from mezzotint.plan.trace import Traced, imaginary, imagined, outlined, trace
from mezzotint.plan.training import moving, training
from mezzotint.training import adversary

# Parameters of the backbone and numbers stored besides, from the meta device in other people's code.
BACKBONES = {
    "sd1.5": (859_520_964, 0),
    "sd2.1": (865_910_724, 0),
    "sdxl": (2_567_463_684, 0),
    "sdxl-refiner": (2_259_526_660, 0),
    "lcm-sd1.5": (859_602_884, 0),
    "lcm-sdxl": (2_567_545_604, 0),
    "sd3-medium": (2_028_328_000, 56_623_104),
    "sd3.5-medium": (2_243_171_520, 226_492_416),
    "sd3.5-large": (8_056_627_520, 89_653_248),
    "flux2-dev": (32_223_281_152, 0),
    "flux2-klein-4b": (3_875_544_576, 0),
    "flux2-klein-9b": (9_078_581_248, 0),
    "dit-s/2": (39_805_088, 0),
    "dit-xl/2": (749_826_464, 0),
    "ldm-4": (274_056_163, 0),
    "ldm-8-text": (872_300_484, 0),
    "ddpm-cifar10": (35_746_307, 0),
    "iddpm-cifar10": (52_546_438, 0),
    "iddpm-imagenet64": (121_063_942, 0),
    "iddpm-imagenet64-classes": (273_049_350, 0),
    "iddpm-lsun256": (113_676_678, 0),
    "adm-64": (295_904_454, 0),
    "adm-128": (421_529_606, 0),
    "adm-256": (553_838_086, 0),
    "adm-512": (558_997_638, 0),
}
ENCODERS = {
    "sd1.5": {"text_encoder": 123_060_480},
    "sd2.1": {"text_encoder": 340_387_840},
    "sdxl": {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd3.5-large": {
        "text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656,
    },
}  # fmt: skip
CODECS = {"sd1.5": 83_653_863, "sd3.5-large": 83_819_683, "flux2-dev": 84_046_115, "ldm-4": 55_322_782}
SPEEDS = {k: [Point((1,), 1e12)] for k in ("convolution", "convolution_backward", "attention", "attention_backward",
                                            "linear")} | {k: [Point((1,), 1e11)] for k in ("copying",)}  # fmt: skip
PLAIN = Machine("a machine", "accelerator", 1e9, {"float32": SPEEDS, "bfloat16": SPEEDS}, 0.0)
CPU = Machine("a processor", "cpu", None, {}, 0.0)


@pytest.mark.parametrize("name", BACKBONES)
def test_published_models_have_their_exact_counts(name: str) -> None:
    subject = find(name)
    parameters, besides = BACKBONES[name]
    assert subject.parameters["backbone"] == parameters
    assert sum(b.numel() for b in subject.outline("backbone").buffers()) == besides
    found = {k: v for k, v in subject.parameters.items() if k.startswith("text")}
    assert name not in ENCODERS or found == ENCODERS[name]
    assert subject.parameters["codec"] == CODECS.get(name, subject.parameters["codec"])


def test_weights_in_memory_are_those_of_the_published_table() -> None:
    """Section 13 of the founding claims: 16 bits, gigabytes; of language models only what is read is resident."""
    pairs = {"sd1.5": (1.72, 2.13), "sdxl": (5.13, 6.94), "sd3.5-medium": (4.94, 16.27)}
    for name, (backbone, everything) in pairs.items():
        subject = find(name)
        sizes = {part: formats.weights(subject.outline(part), torch.bfloat16) / 1e9 for part in subject.parameters}
        assert round(sizes["backbone"], 2) == pytest.approx(backbone, abs=0.011)
        assert round(sum(sizes.values()), 2) == pytest.approx(everything, abs=0.011)


def test_quantised_weights_are_counted_by_hand() -> None:
    with outlined():
        network = nn.Sequential(nn.Linear(128, 64), nn.Conv2d(3, 8, 3), nn.LayerNorm(64))
    rest = 64 + 8 * 27 + 8 + 128
    assert formats.weights(network, torch.bfloat16) == 2 * (128 * 64 + rest)
    assert formats.weights(network, torch.bfloat16, "int8") == 128 * 64 + 64 * 4 + 2 * rest
    assert formats.weights(network, torch.bfloat16, "nf4") == 128 * 64 // 2 + 128 * 64 // 64 * 2 + 2 * rest
    with pytest.raises(InputError, match="int8, fp8, int4, nf4"):
        formats.weights(network, torch.bfloat16, "int3")


def traced(network: nn.Module, *inputs: Any, learns: bool = False, workspace: Any = None) -> Traced:
    """A network on imaginary tensors of the shapes of real ones."""

    def act() -> object:
        given = [i.map(like) if isinstance(i, Conditioning) else like(i) for i in inputs]
        if not learns:
            with torch.no_grad():
                return network(*given)
        network(*given).square().mean().backward()
        return None

    def like(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype)

    given = [*network.parameters(), *network.buffers()]
    return trace(act, given, lambda: [p.grad for p in network.parameters() if p.grad is not None], workspace)


def test_a_diffusion_transformer_takes_what_its_closed_form_says() -> None:
    layers, width, heads, patch, side, batch, channels, out = 3, 32, 4, 2, 16, 5, 4, 8
    config = DiTConfig(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels,
        out_channels=out, sample_size=side, patch_size=patch, num_embeds_ada_norm=10,
    )  # fmt: skip
    n = (side // patch) ** 2
    embed = 2 * batch * (256 * width + width * width)  # the clock's perceptron
    block = 2 * batch * n * (4 + 8) * width**2 + 4 * batch * n * n * width + embed + 2 * batch * width * 6 * width
    ends = 2 * batch * n * width * (channels + out) * patch**2 + 2 * batch * width * 2 * width + embed
    expected = layers * block + ends
    with outlined():
        outline = DiT(config)
    x, t = torch.zeros(batch, channels, side, side), torch.zeros(batch)
    with imagined():
        found = traced(imaginary(outline, torch.float32), x, t, Conditioning(label=torch.zeros(batch).long()))
    assert found.flops == expected
    assert found.by_kind["attention"] == layers * 4 * batch * n * n * width
    assert found.by_kind["convolution"] == 2 * batch * n * width * channels * patch**2


def test_a_unet_takes_what_torch_counts_on_a_real_run_and_twice_that_to_learn() -> None:
    network = parts.text_unet(4, 4, 16)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 5.0]), Conditioning(tokens=torch.randn(2, 7, 16))
    with torch.no_grad(), counter() as run:
        network(*inputs)
    with outlined():
        outline = type(network)(network.config)
    with imagined():
        once = traced(imaginary(outline, torch.float32), *inputs)
        learnt = traced(imaginary(outline, torch.float32, trains=True), *inputs, learns=True)
    assert once.flops == run.get_total_flops()
    network.requires_grad_(True)
    with counter() as run:
        network(*inputs).square().mean().backward()
    assert 2.8 * once.flops < learnt.flops < 3.2 * once.flops
    assert learnt.flops - learnt.by_kind["attention"] == run.get_total_flops() - attention_of(run)


def counter() -> FlopCounterMode:
    """torch's counter, taught the attention kernel of processors."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def formula(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(display=False, custom_mapping={kernel: formula})


def attention_of(run: FlopCounterMode) -> int:
    return sum(n for op, n in run.get_flop_counts()["Global"].items() if "scaled_dot" in op.__name__)


def test_memory_is_what_can_be_counted_by_hand() -> None:
    """100 rows through 10 -> 1000 -> 1000 -> 10: floats of 4 bytes."""
    with outlined():
        outline = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 10))
    x, wide, narrow = torch.zeros(100, 10), 4 * 100 * 1000, 4 * 100 * 10
    with imagined():
        quiet = traced(imaginary(outline, torch.float32), x)
        learns = traced(imaginary(outline, torch.float32, trains=True), x, learns=True)
    assert quiet.peak == narrow + 2 * wide  # input, and both sides of the activation
    assert quiet.kept == narrow  # the result
    assert quiet.at_peak == {"activations": quiet.peak}
    gradients = 4 * (10 * 1000 + 1000 + 1000 * 10 + 10)
    assert learns.kept == gradients
    # The way back through the activation: what it gave (kept for it), its gradient and its input's; behind them the
    # last layer's gradients and the input x, and two single numbers, the loss and its gradient.
    assert learns.peak == narrow + 3 * wide + 4 * (1000 * 10 + 10) + 2 * 4
    assert learns.at_peak["gradients"] == 4 * (1000 * 10 + 10)


def test_a_convolution_on_a_processor_takes_room_for_its_blocks() -> None:
    with outlined():
        outline = nn.Conv2d(8, 16, 3, padding=1)
    with imagined():
        plain, blocked = (
            traced(imaginary(outline, torch.float32), torch.zeros(1, 8, 32, 32), workspace=w)
            for w in (None, kernels.on_cpu)
        )
    out, weight = 4 * 16 * 32 * 32, 4 * 16 * 8 * 9
    assert blocked.peak - plain.peak == out + weight
    assert blocked.at_peak["workspace"] == out + weight


def test_recomputing_keeps_less_and_works_more() -> None:
    with outlined():
        outline = DiT(DiTConfig(num_layers=6, num_attention_heads=2, attention_head_dim=16, in_channels=4,
                                out_channels=4, sample_size=16, num_embeds_ada_norm=4))  # fmt: skip
    inputs = torch.zeros(4, 4, 16, 16), torch.zeros(4), Conditioning(label=torch.zeros(4).long())
    subject = _subject(outline)
    with imagined():
        once = traced(imaginary(outline, torch.float32), *inputs)
    plain, again = (training(subject, Training(batch=4, recompute=r), PLAIN).phases[-1].traced for r in (False, True))
    assert again.at_peak["activations"] < 0.5 * plain.at_peak["activations"]
    assert plain.flops < again.flops < plain.flops + once.flops


def _subject(outline: nn.Module) -> Subject:
    contract = parts.class_model().contract
    latent = contract.latent.model_copy(update={"channels": 4, "factor": 1})
    own = contract.model_copy(update={"latent": latent, "size": (16, 16)})
    part: Any = type("Kind", (), {"network": lambda self, config: type(outline)(config)})()
    return Subject("a model", "a model", own, (part, outline.config), _pixels(), ())


def _pixels() -> Any:
    from mezzotint.codec.pixels import PixelsConfig
    from mezzotint.families.parts import AUTOENCODERS

    return AUTOENCODERS["Pixels"], PixelsConfig(in_channels=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small text-free latent model of our own, saved."""
    from mezzotint.contract import ClassFacts

    path = tmp_path_factory.mktemp("plan") / "model"
    classes = ClassFacts(names=parts.CLASSES, null=len(parts.CLASSES))
    save(parts.model(parts.plain_unet(4, 4, len(parts.CLASSES) + 1), parts.kl_codec(), classes=classes), path)
    return path


def test_generating_takes_what_torch_counts_while_it_really_draws(folder: Path) -> None:
    model = mz.load(folder)
    for sampler, looks in (("ddim", 4), ("heun", 7)):
        job = Job(steps=4, sampler=sampler, batch=2, images=2, guidance=3.0)
        plan = generating(native(folder), job, CPU)
        with counter() as run:
            mz.generate(model, mz.Request(label="crack", steps=4, sampler=sampler, count=2, guidance=3.0))
        assert settled(native(folder), job)[1] == looks
        assert plan.flops == run.get_total_flops()


def test_parts_leave_when_they_are_offloaded_and_stay_otherwise(folder: Path) -> None:
    subject = find("dit-s/2")
    at_home = generating(subject, Job(steps=2), PLAIN)
    away = generating(subject, Job(steps=2, offload=True), PLAIN)
    backbone, codec = (4.0 * subject.parameters[part] for part in ("backbone", "codec"))
    assert dict(at_home.phases[0].resident) == {"backbone": backbone, "codec": codec}
    assert dict(away.phases[0].resident) == {"backbone": backbone}
    assert dict(away.phases[1].resident) == {"codec": codec}
    assert at_home.peak - away.peak == backbone  # the peak is in decoding, the backbone has left
    assert away.host == backbone + codec


def test_time_is_the_sum_of_a_roofline_and_money_follows() -> None:
    machine = Machine("m", "cpu", None, {"float32": SPEEDS}, 1e-6)
    product = Call("mm", "linear", "float32", (1, 8, 8, 8), 2e9, 1e6)
    copy = Call("clone", "copying", "float32", (10,), 0.0, 1e8)
    assert machine.seconds({product: 3, copy: 2}) == pytest.approx(3 * (2e-3 + 1e-6) + 2 * (1e-3 + 1e-6))
    assert CPU.seconds({product: 1}) is None
    near = [Point((1, 64, 64, 64), 1e9), Point((1, 4096, 4096, 4096), 1e11)]
    bent = Machine("m", "cpu", None, {"float32": {**SPEEDS, "linear": near}}, 0.0)
    small, large = (Call("mm", "linear", "float32", (1, n, n, n), 1e9, 0.0) for n in (64, 4096))
    assert bent.call(small) == pytest.approx(1.0, rel=0.02) and bent.call(large) == pytest.approx(0.01, rel=0.02)
    plan = generating(find("ddpm-cifar10"), Job(steps=10, images=4, batch=2), PLAIN)
    assert plan.seconds is not None
    assert plan.cost(3.6) == pytest.approx(plan.seconds * 0.001)
    twice = generating(find("ddpm-cifar10"), Job(steps=20, images=4, batch=2), PLAIN)
    assert twice.phases[0].flops == 2 * plan.phases[0].flops


def test_every_method_trains_what_its_recipe_trains() -> None:
    subject, found = find("sd1.5"), dict[str, int]()
    with imagined():
        for name in ("full", "lora", "textual-inversion", "controlnet"):
            prepared = METHODS[name](subject, Training(method=name, vectors=3), (64, 64), None)
            found[name] = sum(p.numel() for network in prepared.trained for p in moving(network))
    assert found == {
        "full": 859_520_964, "lora": 3_188_736, "textual-inversion": 3 * 768, "controlnet": 361_279_120,
    }  # fmt: skip


def test_a_step_holds_weights_moments_average_and_gradients(folder: Path) -> None:
    subject = native(folder)
    numbers = subject.parameters["backbone"]
    plan = training(subject, Training(), PLAIN)
    assert plan.trained == numbers
    assert dict(plan.phases[-1].resident) == {
        "backbone": 4 * numbers, "AdamW's moments": 8 * numbers, "moving average": 4 * numbers,
    }  # fmt: skip
    assert plan.phases[-1].traced.kept == 4 * numbers  # the gradients
    adapter = training(subject, Training(method="lora", rank=4, ema=False), PLAIN)
    assert adapter.phases[-1].parts["adapter"] == 4 * adapter.trained
    assert "moving average" not in adapter.phases[-1].parts


def test_dreambooth_with_prior_looks_twice_and_lcm_five_times(folder: Path) -> None:
    subject = native(folder)
    once = training(subject, Training(batch=2), PLAIN).phases[-1].traced.flops
    prior = training(subject, Training(method="dreambooth", batch=2, prior=True), PLAIN).phases[-1].traced.flops
    assert prior == pytest.approx(2 * once, rel=1e-6)
    forward = generating(subject, Job(batch=2, guidance=1.0), PLAIN).phases[0].traced.flops
    lcm = training(subject, Training(method="lcm", batch=2), PLAIN).phases[-1].traced.flops
    assert lcm == pytest.approx(once + 3 * forward, rel=1e-6)  # a guided teacher and a target beside the student


def test_pieces_of_a_batch_need_less_and_do_as_much(folder: Path) -> None:
    subject = native(folder)
    whole, pieces = (training(subject, Training(batch=4, accumulation=a), PLAIN).phases[-1] for a in (1, 4))
    assert pieces.traced.flops == pytest.approx(whole.traced.flops, rel=1e-6)
    assert pieces.memory < whole.memory


def test_codecs_train_against_their_critics(folder: Path) -> None:
    subject = native(folder)
    plan = training(subject, Training(method="vae", batch=2), CPU, adversary)
    codec = sum(p.numel() for p in subject.outline("codec").parameters())
    judge = sum(p.numel() for p in adversary.PatchDiscriminator(3, 64, 3).parameters())
    assert plan.trained == codec + judge
    assert [phase.name for phase in plan.phases] == ["step"]
    linear = training(subject, Training(method="patch-pca", batch=2), CPU)
    assert linear.trained == 2 * 4 * 3 * 16 + 3
    with pytest.raises(InputError, match="critics"):
        training(subject, Training(method="vae"), CPU)


def test_what_fits_fits_and_what_does_not_says_what_would_have_to_give() -> None:
    subject = find("dit-s/2")
    job, card = Job(batch=4, images=4, steps=2), accelerator("l4")
    plan = generating(subject, job, card)
    assert fitted(subject, job, card, plan.peak).says == "fits"
    tight = fitted(subject, job, card, plan.peak - 1)
    assert not tight.fits and tight.together is not None and tight.together.fits
    assert [way.gives[0] for way in tight.alone][:3] == ["a batch of 1", "--dtype bfloat16", "--offload"]
    alone = generating(subject, Job(batch=1, images=4, steps=2), card).peak
    assert tight.alone[0].plan.peak == alone and tight.together.plan.peak == alone
    never = fitted(subject, job, card, 1e6)
    assert never.together is None and "whatever gives" in never.says
    summed = fitted(subject, job, card, 0.75 * alone + 0.25 * card.base)
    assert summed.together is None or len(summed.together.gives) >= 1


def test_sizes_of_memory_are_read_and_written() -> None:
    assert (
        words.bytes_of("12GiB") == 12 * 2**30 and words.bytes_of("24 gb") == 24e9 and words.bytes_of("1.5MB") == 1.5e6
    )
    for wrong in ("12", "GiB", "-3GB", "0GB", "12 parsecs"):
        with pytest.raises(InputError, match="12GiB"):
            words.bytes_of(wrong)
    assert words.size(1.719e9) == "1.72 GB" and words.flops(8.03e11) == "803 GFLOP" and words.seconds(0.02) == "20 ms"

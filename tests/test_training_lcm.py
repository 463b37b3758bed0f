"""Distilled models: one step's loss against the reference's parts, whole runs, what they leave, and what is refused."""

from __future__ import annotations

import copy
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import relative
from parts import CLASSES, FLOW, bert_folder, class_model, kl_codec, model, text_unet
from safetensors.torch import load_file
from torch import Tensor
from training_parts import image_folder

import mezzotint as mz
from mezzotint import families
from mezzotint.conditioning import Conditioning
from mezzotint.contract import GuidanceFacts
from mezzotint.errors import InputError
from mezzotint.process import Level, Prediction, Process, schedules
from mezzotint.sampling import LCM
from mezzotint.text import minilm
from mezzotint.training import loop, metrics, recipe, state
from mezzotint.training.consistency import rungs
from mezzotint.training.methods import Place
from mezzotint.training.methods.lcm import Consistency

SIZE, RANGE = 16, (3.0, 9.0)
EPSILON = Process(schedules.scaled_linear(), Prediction.EPSILON)
PROCESSES = {
    "epsilon": EPSILON,
    "velocity": Process(schedules.zero_terminal_snr(schedules.scaled_linear()), Prediction.VELOCITY),
    "clean": Process(schedules.linear(), Prediction.CLEAN),
    "flow": Process(schedules.rectified_flow(3.0), Prediction.FLOW),
}


def text_base(root: Path, process: Process = EPSILON) -> Path:
    """A model of captions on latents, whose U-Net is not told guidance."""
    encoder = minilm.load_folder(bert_folder(root / "bert"), length=6)
    families.save(model(text_unet(4, 4, 16), kl_codec(1), encoder, process=process, size=(SIZE, SIZE)), root / "base")
    return root / "base"


def class_base(root: Path, process: Process = FLOW, **facts: Any) -> Path:
    """A model of classes on pixels."""
    families.save(class_model(process=process, size=(SIZE, SIZE), **facts), root / "base")
    return root / "base"


def plan(root: Path, out: str = "run", guidance: Any = 3.0, channels: int = 3, **changes: Any) -> dict[str, Any]:
    if not (root / "train").exists():
        image_folder(root / "train", 6)
    base: dict[str, Any] = {
        "method": "lcm", "out": str(root / out), "steps": 6, "batch": 4, "threads": 1, "log_every": 1,
        "base": {"path": str(root / "base")},
        "data": {"folder": str(root / "train"), "size": [SIZE, SIZE], "channels": channels, "flips": ["horizontal"]},
        "lcm": {"guidance": guidance},
        "ema": {"decay": 0.8},
        "checkpoints": {"every": 2},
        "validation": {"every": 6, "images": 2, "bands": 2},
    }  # fmt: skip
    return {**base, **changes}


def begun(content: dict[str, Any]) -> Consistency:
    checked = recipe.check(content, "test")
    return Consistency(checked, Place(Path(checked.out), torch.device("cpu"), lambda *_: None))


def stirred(network: Any, seed: int) -> Any:
    """The same network with every weight a little off, by its own amount."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return network


# One step.


def reference(network: Any, told: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """The reference's U-Net with the same weights: (x, t, tokens, w) -> raw, w the scale less 1."""
    from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

    config = network.config
    width = config.time_cond_proj_dim
    theirs = UNet2DConditionModel(
        sample_size=config.sample_size, in_channels=4, out_channels=4, block_out_channels=config.block_out_channels,
        down_block_types=config.down_block_types, up_block_types=config.up_block_types, layers_per_block=1,
        norm_num_groups=8, attention_head_dim=2, cross_attention_dim=16, time_cond_proj_dim=width,
    )  # fmt: skip
    theirs.load_state_dict(network.state_dict())
    theirs.eval()

    def call(x: Tensor, t: Tensor, tokens: Tensor, w: Tensor | None = None) -> Tensor:
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        cond = None if w is None else embed(None, w, embedding_dim=width)
        return theirs(x, t, encoder_hidden_states=tokens, timestep_cond=cond).sample

    assert (width is not None) == told
    return call


def parts_of(kind: str, raw: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Clean image and noise from the raw output, by hand."""
    if kind == "epsilon":
        return (x - sigma * raw) / alpha, raw
    if kind == "clean":
        return raw, (x - alpha * raw) / sigma
    if kind == "velocity":
        return alpha * x - sigma * raw, alpha * raw + sigma * x
    return x - sigma * raw, x + (1 - sigma) * raw


@pytest.mark.parametrize("kind", PROCESSES)
def test_the_loss_of_a_step_equals_the_reference(tmp_path: Path, kind: str) -> None:
    """Teacher, student and target with weights of their own; levels, boundary and guidance from the reference."""
    diffusers = pytest.importorskip("diffusers")
    text_base(tmp_path, PROCESSES[kind])
    job = begun(plan(tmp_path, guidance=RANGE, channels=1, text={"dropout": 0.3}))
    student = stirred(job.trained["backbone"].eval(), 1)
    job.averaging(stirred(copy.deepcopy(student), 2))
    batch = job.draw(3)
    ours, _ = job.loss(batch, 3)

    scale, rung = batch["guidance"], batch["rung"]
    assert ((scale >= RANGE[0]) & (scale <= RANGE[1])).all() and scale.unique().numel() == 4
    boundary = diffusers.LCMScheduler()
    if kind == "flow":
        levels = torch.tensor([level.sigma for level in job.ladders[16]], dtype=torch.float64)
        sigmas, lower = levels[rung], levels[rung - 1]
        t, s = 1000 * sigmas, 1000 * lower
        pairs = [(1 - sigmas, sigmas), (1 - lower, lower)]
    else:
        schedule: Any = PROCESSES[kind].schedule
        table = diffusers.DDIMScheduler(
            beta_schedule=schedule.betas, beta_start=schedule.beta_start, beta_end=schedule.beta_end,
            rescale_betas_zero_snr=schedule.zero_terminal_snr,
        ).alphas_cumprod.double()  # fmt: skip
        t = 20 * rung - 1
        s = (t - 20).clamp(min=0)
        pairs = [(table[at].sqrt(), (1 - table[at]).sqrt()) for at in (t, s)]
    (a, b), (c, d) = [tuple(value.float().view(-1, 1, 1, 1) for value in pair) for pair in pairs]

    def function(call: Any, x: Tensor, at: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        skip, out = (
            torch.tensor([boundary.get_scalings_for_boundary_condition_discrete(float(v))[i] for v in at])
            for i in (0, 1)
        )
        clean, _ = parts_of(kind, call(x, at.float(), tokens, scale - 1), x, alpha, sigma)
        return skip.float().view(-1, 1, 1, 1) * x + out.float().view(-1, 1, 1, 1) * clean

    with torch.no_grad():
        rows = job.core.captions.rows.tokens
        tokens, empty = rows[batch["caption"]], rows[:1].expand(4, -1, -1)
        x = a * batch["clean"] + b * batch["noise"]
        teacher = reference(job.teacher, told=False)
        w = (scale - 1).view(-1, 1, 1, 1)
        with_text, without = (parts_of(kind, teacher(x, t.float(), said), x, a, b) for said in (tokens, empty))
        clean, noise = (mine + w * (mine - theirs) for mine, theirs in zip(with_text, without, strict=True))
        below = c * clean + d * noise
        theirs = function(reference(job.target, told=True), below, s, c, d)
        guess = function(reference(student, told=True), x, t, a, b)
        expected = ((guess - theirs) ** 2 + 0.001**2).sqrt().sub(0.001).mean()
    assert ours.item() == pytest.approx(expected.item(), rel=2e-5)
    ours.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for net in (job.teacher, job.target) for p in net.parameters())


def test_a_student_that_is_told_the_scale_starts_as_its_teacher(tmp_path: Path) -> None:
    text_base(tmp_path)
    job = begun(plan(tmp_path, guidance=RANGE, channels=1))
    student = job.trained["backbone"].eval()
    batch = job.draw(0)
    x, level, told = batch["noise"], job.process.levels(torch.tensor([999, 600, 20, 0])), job.steering(batch)
    assert torch.equal(
        job.learned(student, x, level, told), job.teacher(x, level.t, replace(told.alone, guidance=None))
    )
    assert student.config.time_cond_proj_dim == 256 and job.teacher.config.time_cond_proj_dim is None
    loss, _ = job.loss(job.draw(1), 1)
    loss.backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().max() > 0  # what is told will matter
    pointers = {p.data_ptr() for p in job.teacher.parameters()}
    assert not pointers & {p.data_ptr() for p in student.parameters()}  # what trains is not the teacher


def test_a_step_costs_one_pass_of_the_student_two_of_the_teacher_and_one_of_the_target(tmp_path: Path) -> None:
    class_base(tmp_path)
    for guidance, rows in ((3.0, 8), (1.0, 4)):  # guided: both branches in one call; without guidance one
        job = begun(plan(tmp_path, guidance=guidance))
        average = copy.deepcopy(job.trained["backbone"]).requires_grad_(False)
        job.averaging(average)
        seen: list[tuple[str, int, bool]] = []
        for name, network in (("student", job.trained["backbone"]), ("teacher", job.teacher), ("target", average)):
            network.register_forward_hook(
                lambda _, inputs, out, name=name, seen=seen: seen.append((name, len(out), out.requires_grad))
            )
        job.loss(job.draw(0), 0)
        assert sorted(seen) == [("student", 4, True), ("target", 4, False), ("teacher", rows, False)]


def test_the_baseline_of_the_teacher_is_no_class(tmp_path: Path) -> None:
    class_base(tmp_path)
    job = begun(plan(tmp_path, guidance=4.0, classes={"dropout": 0.0}))
    batch = job.draw(0)
    level = job.process.levels(torch.full((4,), 700.0))
    conditional = job.learned(job.teacher, batch["noise"], level, job.steering(batch))
    null = {**batch, "label": torch.full((4,), len(CLASSES))}
    baseline = job.learned(job.teacher, batch["noise"], level, job.steering(null))
    assert (conditional - baseline).abs().max() > 1e-3
    expected = baseline + 4.0 * (conditional - baseline)
    assert torch.allclose(job.teaching(batch["noise"], level, job.steering(batch)), expected, atol=1e-5)


# Whole runs.


def killed(content: dict[str, Any], step: int) -> None:
    """Train in a process of its own that is killed at this step; one that hangs is ended, and the test fails."""
    process, until = os.fork(), time.monotonic() + 60
    if process == 0:
        try:
            die = loop.Watch(step=lambda done, *_: os.kill(os.getpid(), signal.SIGKILL) if done == step else None)
            loop.train(recipe.check(content, "test"), True, die)
        finally:
            os._exit(1)
    ended, status = 0, 0
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        pytest.fail("it hangs")
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def weights(folder: Path) -> dict[str, Tensor]:
    last = state.newest(folder / loop.CHECKPOINTS)
    assert last is not None
    files = [*sorted(last.glob("*.safetensors")), *sorted((folder / "model").rglob("*.safetensors"))]
    return {f"{path.relative_to(last if last in path.parents else folder)}/{k}": v
            for path in files for k, v in load_file(path).items()}  # fmt: skip


def test_pain_21_a_killed_distillation_goes_to_the_same_bits_and_its_model_samples(tmp_path: Path) -> None:
    base = text_base(tmp_path)
    shared = {"guidance": RANGE, "channels": 1}
    whole = loop.train(recipe.check(plan(tmp_path, "whole", **shared), "test"))
    assert whole.finished
    for step in (3, 5):
        killed(plan(tmp_path, "broken", **shared), step)
    assert loop.train(recipe.check(plan(tmp_path, "broken", **shared), "test"), resume=True).finished
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert ours.keys() == theirs.keys() and len(ours) > 200
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    # the average that was saved moved, and the sampler, the steps and the guidance are in the contract
    result = mz.load(tmp_path / "whole" / "model")
    facts = result.contract
    assert facts.guidance == GuidanceFacts(dropout=0.1, distilled=True, embedded=True, scale=6.0)
    assert (facts.sampling.sampler, facts.sampling.steps, facts.sampling.from_image) == ("lcm", 4, "all")
    assert facts.process == EPSILON and facts.lineage.base == mz.load(base).contract.weights
    assert result.backbone.time_embedding.cond_proj.weight.abs().max() > 0
    default = mz.generate(result, mz.Request(prompt="crack", seed=3)).latents
    drawn = {steps: mz.generate(result, mz.Request(prompt="crack", seed=3, sampler="lcm", steps=steps)).latents
             for steps in (1, 2, 4, 8)}  # fmt: skip
    assert torch.equal(default, drawn[4]) and all(latents.isfinite().all() for latents in drawn.values())
    other = mz.generate(result, mz.Request(prompt="crack", seed=3, guidance=3.0)).latents
    assert not torch.equal(other, default)  # it reads the scale
    with pytest.raises(InputError, match="this model is distilled and has none"):
        mz.generate(result, mz.Request(prompt="crack", negative="dark", guidance=6.0))


def test_a_distilled_stable_diffusion_is_what_a_published_consistency_model_is(tmp_path: Path) -> None:
    """Its parts say to the family's reader what a published one's say, and the reference's U-Net computes the same."""
    diffusers = pytest.importorskip("diffusers")
    import reference_sd

    from mezzotint.families import sd1
    from mezzotint.families.family import Asked
    from mezzotint.families.materials import read_folder

    image_folder(tmp_path / "train", 4, 32)
    content = plan(
        tmp_path, guidance=(3.0, 14.0), steps=2, batch=2, base={"path": str(reference_sd.write_plain(tmp_path))}
    )
    content["data"] |= {"size": [32, 32]}
    folder = loop.train(recipe.check(content, "test")).folder / "model"
    result = mz.load(folder)
    read = sd1.facts(read_folder(folder), Asked())
    assert result.family == "sd1" and read["guidance"] == result.contract.guidance  # 8.5 is the published scale, too
    for name in ("sampler", "steps", "from_image"):
        assert getattr(read["sampling"], name) == getattr(result.contract.sampling, name)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    assert theirs.config.time_cond_proj_dim == 256
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    rng = torch.Generator().manual_seed(0)
    x, tokens = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 77, 64, generator=rng)
    t, scale = torch.tensor([999.0, 259.0]), torch.tensor([4.0, 11.0])
    with torch.no_grad():
        expected = theirs(x, t, tokens, timestep_cond=embed(None, scale - 1, embedding_dim=256)).sample
        found = result.backbone(x, t, Conditioning(tokens=tokens, guidance=scale))
    assert relative(found, expected) < 1e-5


def test_pain_21_a_killed_lora_distillation_goes_to_the_same_bits_and_its_file_samples(tmp_path: Path) -> None:
    base = text_base(tmp_path)
    shared: dict[str, Any] = {"channels": 1, "lora": {"rank": 2, "dropout": 0.2, "targets": ["attention", "time"]}}
    shared |= {"optimiser": {"rate": 1e-2}}
    whole = loop.train(recipe.check(plan(tmp_path, "whole", **shared), "test"))
    assert whole.finished
    killed(plan(tmp_path, "broken", **shared), 5)
    assert loop.train(recipe.check(plan(tmp_path, "broken", **shared), "test"), resume=True).finished
    ours, theirs = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []

    subject, file = mz.load(base), whole.folder / "model"
    for steps in (1, 2, 4, 8):
        few = mz.Request(prompt="crack", seed=3, sampler="lcm", steps=steps, guidance=1.0)
        plain, adapted = (mz.generate(subject, replace(few, lora=lora)).latents for lora in ([], [(file, 1.0)]))
        assert adapted.isfinite().all() and not torch.allclose(adapted, plain, atol=1e-3)
    # a request that says nothing gets what the adapter was made for, and guidance on top of it is refused
    asked = mz.Request(prompt="crack", seed=3, lora=[(file, 1.0)])
    said = replace(asked, sampler="lcm", steps=4, guidance=1.0)
    assert torch.equal(mz.generate(subject, asked).latents, mz.generate(subject, said).latents)
    record = mz.pipeline(subject, "off").run(asked)[0].record["request"]
    assert (record["sampler"], record["steps"], record["guidance"]) == ("lcm", 4, 1.0)
    with pytest.raises(InputError, match="distilled and cannot be guided: use guidance 1, not 5"):
        mz.generate(subject, replace(asked, guidance=5.0))
    assert subject.contract.sampling.sampler != "lcm"


def test_a_lora_is_taught_by_the_weights_that_it_stands_beside(tmp_path: Path) -> None:
    """One copy of the weights: the teacher is the network without the changes, the target the network itself."""
    text_base(tmp_path)
    job = begun(plan(tmp_path, channels=1, lora={"rank": 2}))
    student = job.trained["backbone"]
    own = {p.data_ptr() for p in job.teacher.parameters()}
    frozen = {p.data_ptr() for p in student.parameters() if not p.requires_grad}
    assert frozen == own and len(own) > 50
    job.averaging(copy.deepcopy(student))
    assert job.target is None
    batch = job.draw(0)
    level = job.process.levels(torch.tensor([999, 600, 20, 0]))
    before = job.learned(job.teacher, batch["noise"], level, job.steering(batch))
    assert torch.equal(
        job.learned(student, batch["noise"], level, job.steering(batch)), before
    )  # no change to begin with
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data += 0.3
    assert not torch.allclose(job.learned(student, batch["noise"], level, job.steering(batch)), before, atol=1e-3)
    assert torch.equal(job.learned(job.teacher, batch["noise"], level, job.steering(batch)), before)
    loss, _ = job.loss(batch, 0)
    assert loss.item() == pytest.approx(job.distance(student, copy.deepcopy(student), batch)[0].mean().item())


def test_guidance_that_is_fixed_leaves_a_model_that_takes_none(tmp_path: Path) -> None:
    class_base(tmp_path, FLOW)
    content = plan(tmp_path, guidance=2.5, steps=2, previews={"every": 2, "count": 1, "steps": 2})
    content["data"]["validation"] = content["data"]["folder"]
    outcome = loop.train(recipe.check(content, "test"))
    records = metrics.read(outcome.folder)
    assert {"validation", "validation/0-50%", "validation/map-1", "validation/map-4"} <= records[-1].keys()
    assert (outcome.folder / "samples").is_dir()
    result = mz.load(outcome.folder / "model")
    assert result.contract.guidance == GuidanceFacts(dropout=0.1, distilled=True, embedded=False, scale=1.0)
    assert (result.contract.sampling.sampler, result.contract.sampling.from_image) == ("lcm", "all")
    for steps in (1, 2, 4, 8):
        assert mz.generate(result, mz.Request(label=1, steps=steps)).latents.isfinite().all()
    with pytest.raises(InputError, match="distilled and cannot be guided: use guidance 1, not 5"):
        mz.generate(result, mz.Request(label=1, guidance=5.0))


def test_validation_measures_samples_against_the_whole_path_of_the_teacher(tmp_path: Path) -> None:
    """A student that is the teacher misses by what one estimate misses; the teacher's path is our DDIM's, guided."""
    class_base(tmp_path, EPSILON)
    content = plan(tmp_path, guidance=3.0)
    content["data"]["validation"] = content["data"]["folder"]
    job = begun(content)
    numbers = job.validate(job.teacher)
    batch = job._fixed({key: value[:4] for key, value in job.core.held_out[0][0].items()})
    base = mz.load(tmp_path / "base")
    ours = mz.generate(
        replace(base, contract=base.contract.model_copy(update={"sampling": base.contract.sampling.model_copy(
            update={"sampler": "ddim", "steps": 50, "offset": 19, "last": "lowest"})})),
        mz.Request(label=int(batch["label"][0]), guidance=3.0, start_noise=batch["noise"][:1]),
    ).latents  # fmt: skip
    assert job.paths is not None and len(job.paths) == 5
    assert torch.allclose(job.paths[0][:1], ours, rtol=1e-3, atol=1e-4 * ours.abs().max().item())
    few = mz.Request(sampler="lcm", steps=1, guidance=1.0)
    wishes = [
        replace(few, label=int(label), start_noise=row[None])
        for label, row in zip(batch["label"], batch["noise"], strict=True)
    ]
    one = torch.cat([mz.generate(base, wish).latents for wish in wishes])
    assert numbers["validation/map-1"] == pytest.approx((one - job.paths[0]).square().mean().sqrt().item(), rel=1e-4)
    assert numbers["validation/map-1"] > 0.01
    assert job.validate(job.teacher) == numbers
    told, squared = job.steering(batch), []
    for step in LCM().path(EPSILON, 4).steps:  # the same by hand at the levels of four steps
        x = job.paths[round((step.now.t + 1) / 20)]
        clean = (x - step.now.sigma * job.learned(job.teacher, x, level_of(step.now, 2), told)) / step.now.alpha
        squared.append((clean - job.paths[0]).square().mean())  # c_skip is below 1e-8 here
    assert numbers["validation/map-4"] == pytest.approx(torch.stack(squared).mean().sqrt().item(), rel=1e-4)


def level_of(level: Level[float], count: int) -> Level[Tensor]:
    return rungs([level], torch.zeros(count, dtype=torch.long))


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    class_base(tmp_path)
    for changes, message in (
        ({"guidance": RANGE}, "base cannot be told a guidance scale: make lcm.guidance one, such as 3"),
        ({"guidance": (9.0, 3.0)}, "must be two rising scales"),
        ({"loss": {"weighting": "min_snr"}}, "loss.weighting has no part in consistency distillation"),
        ({"loss": {"density": "logit_normal"}}, "loss.density has no part"),
        ({"loss": {"guidance": 2.0}}, "loss.guidance has no part"),
        ({"sampling": {"sampler": "ddim"}}, r"leave \[sampling\] out"),
        ({"lora": {"rank": 2}, "guidance": RANGE}, "a LoRA cannot be told a guidance scale"),
        ({"lora": {"rank": 2, "text_targets": ["attention"]}}, "leave lora.text_targets out"),
        ({"lora": {"rank": 2, "targets": ["cross-attention"]}}, "the target 'cross-attention' is nothing that"),
    ):
        with pytest.raises(InputError, match=message):
            begun(plan(tmp_path, **changes))
    families.save(class_model(process=EPSILON, size=(SIZE, SIZE), guidance=GuidanceFacts()), tmp_path / "plain")
    with pytest.raises(InputError, match="was never trained with its condition dropped and cannot"):
        begun(plan(tmp_path, base={"path": str(tmp_path / "plain")}))
    assert begun(plan(tmp_path, guidance=None, base={"path": str(tmp_path / "plain")})).scale == 1.0
    with pytest.raises(InputError, match="solver_steps 30 leaves out timestep 19"):
        begun(plan(tmp_path, base={"path": str(tmp_path / "plain")}, lcm={"solver_steps": 30, "guidance": 1.0}))

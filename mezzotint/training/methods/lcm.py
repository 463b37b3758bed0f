"""Distil a model into one that samples in 1 to 8 steps with the `lcm` sampler (Luo et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mezzotint import families
from mezzotint.adapters.apply import sharing
from mezzotint.conditioning import Conditioning, stack
from mezzotint.families import Model
from mezzotint.process import Level, prediction
from mezzotint.sampling import LCM, SAMPLERS
from mezzotint.training import draws, finish, lowrank, parts
from mezzotint.training.consistency import consistent, huber, ladder, rungs, scales, solved
from mezzotint.training.diffusion import Diffusion
from mezzotint.training.distilled_guidance import check, guidance_range, telling
from mezzotint.training.methods import Batch, Place
from mezzotint.training.tables import Recipe

if TYPE_CHECKING:
    from PIL.Image import Image

SAMPLER = cast(LCM, SAMPLERS["lcm"])
STEPS = 4  # of a request that does not say


@dataclass(frozen=True, slots=True)
class Told:
    """What steers the networks of one batch."""

    alone: Conditioning  # networks that guidance is in: the student, its target, a distilled teacher
    both: Conditioning | None  # a teacher that is guided: the condition and, behind it, the baseline
    scale: Tensor  # (B, 1, 1, 1) of guidance


class Consistency:
    """loss = mean huber(f(x, t), f'(x', t')), x' one guided step of the teacher from t to t', the level below.

    f is the student's consistency function, f' that of its moving average (for a LoRA, and without an average, its
    own), which has no gradient; the teacher is the base. A student that reads a guidance scale is told the teacher's.
    """

    averaged = "backbone"

    def __init__(self, recipe: Recipe, place: Place) -> None:
        assert recipe.lcm is not None  # recipe.check saw to it
        check(recipe)
        self.recipe, self.plan = recipe, recipe.lcm
        model = parts.model(recipe, place.device)
        self.low, self.high = guidance_range(recipe, model)
        facts = model.contract.guidance
        self.told = facts.embedded or self.low != self.high  # whether the student reads the scale
        # whether the teacher looks twice
        self.guided = not (facts.distilled or facts.embedded) and (self.low, self.high) != (1.0, 1.0)
        student = self._student(model)  # refuses targets before any work is done
        self.core = Diffusion(recipe, place, model)
        self.digests, self.licensed = self.core.digests, self.core.licensed
        self.process = model.process
        self.patch = int(getattr(model.backbone.config, "patch_size", 1))
        cell = model.codec.factor * self.patch
        sizes = {(width // cell) * (height // cell) for width, height in self.core.sizes}
        self.ladders = {tokens: ladder(self.process, self.plan.solver_steps, SAMPLER, tokens) for tokens in sizes}
        self.teacher = parts.settled(model.backbone, place.device)
        self.trained: dict[str, nn.Module] = {"backbone": student.to(place.device)}
        self.rates: dict[str, float] = {}
        self.target: nn.Module | None = None
        self.paths: dict[int, Tensor] | None = None  # the teacher's from the noise of the first held-out images

    def averaging(self, network: nn.Module) -> None:
        """The average of a network that trains whole is its target."""
        self.target = None if self.recipe.lora else network

    def draw(self, step: int) -> Batch:
        """A batch with a rung of the ladder, and a guidance scale, for each image."""
        batch = self.core.draw(step)
        rng, count = draws.generator(self.recipe.seed, step, "consistency"), len(batch["index"])
        batch["rung"] = torch.randint(1, len(self._ladder(batch)), (count,), generator=rng)
        batch["guidance"] = scales(self.low, self.high, count, rng)
        return batch

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The distance of neighbours, weighed by channel, mask and image."""
        student = self.trained["backbone"]
        distance, level = self.distance(student, self.target or student, batch)
        return self.core.weigh(distance, level, batch), {}

    def names(self, batch: Batch) -> list[str]:
        """The image files of a batch."""
        return self.core.names(batch)

    @torch.no_grad()
    def validate(self, network: nn.Module) -> dict[str, float]:
        """The distance of neighbours per band of the clock, and of the map from where the teacher's ODE leads.

        The former on fixed images, noise and levels, with the network as its own target: one that draws the same image
        whatever it is given agrees with itself. The latter sees that: on the teacher's paths from the noise of a few
        images, at the first level (map-1) and at those that STEPS steps visit, as root mean square over latents. It is
        0 for a perfect student, where samples of several steps differ by their fresh noise.
        """
        if not self.core.held_out:
            return {}
        found: list[float] = []
        for band in self.core.held_out:
            rows = [self.distance(network, network, self._fixed(batch))[0].flatten(1).mean(1) for batch in band]
            found.append(float(torch.cat(rows).double().mean()))
        bands = len(found)
        numbers = {f"validation/{100 * b // bands}-{100 * (b + 1) // bands}%": value for b, value in enumerate(found)}
        few = self._fixed({key: value[:4] for key, value in self.core.held_out[0][0].items()})
        if self.paths is None:
            self.paths = self.solve(few)
        squared = self.missed(network, few, self.paths)
        numbers["validation/map-1"] = squared[0] ** 0.5
        numbers[f"validation/map-{STEPS}"] = (sum(squared) / STEPS) ** 0.5
        return {"validation": sum(found) / bands, **numbers}

    def preview(self, network: nn.Module, step: int) -> list[Image]:
        """Pictures through the one inference path."""
        return self.core.previews(self._model(network))

    def save(self, network: nn.Module, folder: Path) -> None:
        """A model folder whose contract says `lcm`, few steps, and that guidance is in the weights; or a LoRA.

        The LoRA is for its base and others of its kind, and says the same in its header.
        """
        if self.recipe.lora:
            drawn = self._model(network).contract
            lowrank.write_adapter(self.core, network, self.recipe.lora, folder, drawn=drawn)
        else:
            families.save(self._model(network), folder)

    def distance(self, student: nn.Module, target: nn.Module, batch: Batch) -> tuple[Tensor, Level[Tensor]]:
        """(B, C, h, w) distance of neighbours on one trajectory, and the level of the noisier one."""
        steps, told = self._ladder(batch), self.steering(batch)
        now, next = rungs(steps, batch["rung"]), rungs(steps, batch["rung"] - 1)
        x = self.process.noised(batch["clean"], batch["noise"], now)  # (B, C, h, w)
        with torch.no_grad():
            lower = solved(self.process, self.teaching(x, now, told), x, now, next)
            theirs = consistent(self.process, self.learned(target, lower, next, told), lower, next, SAMPLER)
        ours = consistent(self.process, self.learned(student, x, now, told), x, now, SAMPLER)
        return huber(ours, theirs, self.plan.huber), now

    def steering(self, batch: Batch) -> Told:
        """The condition of every image, and for guidance no prompt and no class."""
        condition = self.core.conditioning(batch)
        alone = replace(condition, guidance=batch["guidance"] if self.told else None)
        both = stack([condition, self.core.conditioning(self._nothing(batch))]) if self.guided else None
        return Told(alone, both, batch["guidance"].view(-1, 1, 1, 1))

    def teaching(self, x: Tensor, level: Level[Tensor], told: Told) -> Tensor:
        """The teacher's guided prediction (B, C, h, w), both branches in one call."""
        if told.both is None:
            return self.learned(self.teacher, x, level, told)
        raw = self._raw(self.teacher, torch.cat((x, x)), level.t.repeat(2), told.both)
        conditional, baseline = raw.chunk(2)
        return baseline + told.scale * (conditional - baseline)

    def learned(self, network: nn.Module, x: Tensor, level: Level[Tensor], told: Told) -> Tensor:
        """The prediction (B, C, h, w) of a network that guidance is in."""
        return self._raw(network, x, level.t, told.alone)

    def solve(self, batch: Batch) -> dict[int, Tensor]:
        """The teacher's path down the whole ladder from the batch's noise: x (B, C, h, w) by rung.

        At the rungs that STEPS steps visit, noisiest first, and at 0, the end.
        """
        x, steps, told = batch["noise"], self._ladder(batch), self.steering(batch)
        visited = {step.now.sigma for step in SAMPLER.path(self.process, STEPS, tokens=self._tokens(batch)).steps}
        found: dict[int, Tensor] = {}
        for rung in reversed(range(1, len(steps))):
            if any(abs(steps[rung].sigma - sigma) < 1e-6 for sigma in visited):
                found[rung] = x
            at = torch.full_like(batch["index"], rung)
            now, next = rungs(steps, at), rungs(steps, at - 1)
            x = solved(self.process, self.teaching(x, now, told), x, now, next)
        return {**found, 0: x}

    def missed(self, network: nn.Module, batch: Batch, paths: dict[int, Tensor]) -> list[float]:
        """The mean squared distance of the network's map from the end of the paths, at each level of theirs."""
        steps, told, squared = self._ladder(batch), self.steering(batch), list[float]()
        for rung, x in paths.items():
            if rung:
                at = rungs(steps, torch.full_like(batch["index"], rung))
                end = consistent(self.process, self.learned(network, x, at, told), x, at, SAMPLER)
                squared.append(float((end - paths[0]).square().mean()))
        return squared

    def _student(self, model: Model) -> nn.Module:
        """What trains: low-rank changes beside the teacher's own weights, or weights of its own."""
        if self.recipe.lora:
            return lowrank.adapt_for_training(model, self.recipe.lora, self.recipe.seed)
        anew = self.told and not model.contract.guidance.embedded
        student = telling(model.backbone) if anew else sharing(model.backbone)
        return parts.trainable(student, torch.device("cpu"))

    def _raw(self, network: nn.Module, x: Tensor, t: Tensor, told: Conditioning) -> Tensor:
        dtype = next(network.parameters()).dtype
        told = told.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            raw = network(x.to(dtype), t, told)
        return prediction.split(raw.float(), x.shape[1])[0]

    def _nothing(self, batch: Batch) -> Batch:
        """The batch without prompts and classes, which guidance leads away from."""
        nothing = {"caption": torch.zeros_like(batch["caption"])} if "caption" in batch else {}
        null = self.core.classes.null if self.core.classes else None
        classless = {} if null is None else {"label": torch.full_like(batch["label"], null)}
        return {**batch, **nothing, **classless}

    def _fixed(self, batch: Batch) -> Batch:
        """A held-out batch with the rung above its times, and the guidance scale in the middle of those distilled."""
        times = torch.tensor([level.t for level in self._ladder(batch)])
        rung = torch.searchsorted(times, batch["t"].float()).clamp(1, len(times) - 1)
        scale = torch.full((len(rung),), self.scale)
        return {k: v.to(self.core.place.device) for k, v in {**batch, "rung": rung, "guidance": scale}.items()}

    @property
    def scale(self) -> float:
        """The guidance scale in the middle of those that are distilled."""
        return (self.low + self.high) / 2

    def _tokens(self, batch: Batch) -> int:
        return batch["clean"][0, 0].numel() // self.patch**2

    def _ladder(self, batch: Batch) -> tuple[Level[float], ...]:
        return self.ladders[self._tokens(batch)]

    def _model(self, network: nn.Module) -> Model:
        contract = finish.contract(self.core)
        guidance = {"distilled": True, "embedded": self.told, "scale": self.scale if self.told else 1.0}
        sampling = {"sampler": "lcm", "steps": STEPS, "from_image": "all"}
        facts = {
            "guidance": contract.guidance.model_copy(update=guidance),
            "sampling": contract.sampling.model_copy(update=sampling),
        }
        return replace(self.core.model, backbone=network, contract=contract.model_copy(update=facts))

"""A point of the sweep: what is asked of a model (the target) and how it is got there (the way)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mezzotint.contract import Contract
from mezzotint.errors import InputError
from mezzotint.families import Model
from mezzotint.families.adapt import ruled
from mezzotint.families.settings import settle
from mezzotint.process import RectifiedFlow
from mezzotint.request import Request
from mezzotint.sampling import SAMPLERS, Heun, fresh

WHOLE = (0.0, 1.0)  # guidance on the whole path
STEPS = (4, 6, 8, 12, 16, 20, 30, 50)
FEW = (1, 2, 3, 4, 8)  # steps of a model that was distilled to take few
# What is tried where nothing is asked for: solvers of the ODE, and the usual one of the SDE.
OF_TABLES = ("ddim", "euler", "heun", "dpmpp_2m", "dpmpp_2m_karras", "unipc", "unipc_karras", "dpmpp_2m_sde_karras")
OF_FLOWS = ("flow_euler", "heun", "dpmpp_2m", "unipc", "dpmpp_2m_sde")


@dataclass(frozen=True, slots=True, order=True)
class Target:
    """What the pictures are to be: another guidance leads to other pictures, so errors compare within one target."""

    guidance: float
    rescale: float = 0.0

    @property
    def name(self) -> str:
        """For people: `guidance 3.5`, `guidance 7.5 rescaled 0.7`."""
        return f"guidance {self.guidance:g}" + (f" rescaled {self.rescale:g}" if self.rescale else "")

    def request(self, wish: Request) -> Request:
        """The wish under this guidance; a negative prompt acts through guidance, so at scale 1 it is left out."""
        negative = wish.negative if self.guidance != 1.0 else ""
        return replace(wish, guidance=self.guidance, guidance_rescale=self.rescale, negative=negative)


@dataclass(frozen=True, slots=True)
class Setting:
    """A target and a way to it: sampler, steps, the part of the path that is guided, the network's number format."""

    sampler: str
    steps: int
    target: Target
    interval: tuple[float, float] = WHOLE
    dtype: str = "float32"

    @property
    def way(self) -> str:
        """Sampler and approximations for people, without the steps."""
        low, high = self.interval
        parts = [self.sampler] + [f"guided {low:g} to {high:g}"] * (self.interval != WHOLE)
        return ", ".join(parts + [self.dtype] * (self.dtype != "float32"))

    @property
    def name(self) -> str:
        """The whole setting for people."""
        return f"{self.way}, {self.steps} step{'s' if self.steps > 1 else ''}, {self.target.name}"

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise is drawn on the way, so that the same start does not lead to the same picture."""
        return fresh(SAMPLERS[self.sampler])

    def request(self, wish: Request) -> Request:
        """The wish drawn this way."""
        asked = self.target.request(wish)
        return replace(asked, sampler=self.sampler, steps=self.steps, guidance_interval=self.interval)

    def command(self, model: Path, wish: Request, more: Sequence[str] = ()) -> str:
        """How to draw this way: the command with the options `more`, or the Python call where it takes one.

        The command line has no option for guidance on a part of the path.
        """
        if self.interval != WHOLE:
            return self._call(model, wish)
        words = ["mezzotint", "generate"] + [wish.prompt] * bool(wish.prompt) + ["--model", str(model)]
        words += ["--label", str(wish.label)] * (wish.label is not None)
        words += ["--negative", wish.negative] * bool(wish.negative and self.target.guidance != 1.0)
        words += ["--sampler", self.sampler, "--steps", str(self.steps), "--guidance", f"{self.target.guidance:g}"]
        words += ["--guidance-rescale", f"{self.target.rescale:g}"] * bool(self.target.rescale)
        words += ["--dtype", self.dtype] * (self.dtype != "float32")
        return shlex.join([*words, *more, "--out", "out/images"])

    def _call(self, model: Path, wish: Request) -> str:
        asked, plain = self.request(wish), Request()
        names = ("prompt", "negative", "label", "width", "height", "strength", "lora", "sampler", "steps", "guidance",
                 "guidance_rescale", "guidance_interval")  # fmt: skip
        told = {name: getattr(asked, name) for name in names if getattr(asked, name) != getattr(plain, name)}
        words = [f"{name}={_python(value)}" for name, value in told.items() if value != []]
        words += [f"{name}={name}" for name in ("image", "mask") if getattr(asked, name) is not None]
        dtype = f", dtype=torch.{self.dtype}" if self.dtype != "float32" else ""
        return f"mz.generate(mz.load({str(model)!r}{dtype}), mz.Request({', '.join(words)}))"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report and the store."""
        return {"name": self.name, **asdict(self), "interval": list(self.interval), "stochastic": self.stochastic}


def _python(value: object) -> str:
    """A value of a request as code, paths as the texts that they may be."""
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_python, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return repr(str(value)) if isinstance(value, Path) else repr(value)


def few_step(contract: Contract) -> bool:
    """Whether the network was distilled to jump to images in few steps: it follows no ODE that samplers converge to."""
    facts = contract.guidance
    return contract.sampling.sampler == "lcm" or (facts.distilled and not facts.embedded)


def usual_samplers(contract: Contract) -> tuple[str, ...]:
    """The samplers that are tried where none are named."""
    if few_step(contract):
        return (contract.sampling.sampler,)
    flow = isinstance(contract.process.schedule, RectifiedFlow)
    known = OF_FLOWS if flow else OF_TABLES
    return known if contract.sampling.sampler in known else (contract.sampling.sampler, *known)


def grid(
    model: Model,
    wish: Request,
    samplers: Sequence[str] = (),
    steps: Sequence[int] = (),
    guidance: Sequence[float] = (),
    rescale: Sequence[float] = (),
    intervals: Sequence[tuple[float, float]] = (),
    dtypes: Sequence[str] = (),
) -> list[Setting]:
    """Every combination once, in the order given; what is empty is answered from the contract.

    Where guidance is off, interval and rescale change nothing and are left out. InputError names the first combination
    that the model cannot serve.
    """
    contract = model.contract
    found: dict[Setting, None] = {}
    for scale, amount, interval, dtype, sampler, count in product(
        guidance or (contract.guidance.scale,), rescale or (0.0,), intervals or (WHOLE,), dtypes or ("float32",),
        samplers or usual_samplers(contract), steps or (FEW if few_step(contract) else STEPS),
    ):  # fmt: skip
        off = scale == 1.0 or contract.guidance.distilled
        target = Target(float(scale), 0.0 if off else float(amount))
        setting = Setting(sampler, count, target, WHOLE if off else interval, dtype)
        if setting in found:
            continue
        try:
            settle(model, setting.request(wish))
        except InputError as error:
            raise InputError(f"{setting.name}: {error}") from error
        found[setting] = None
    return list(found)


def evaluations(model: Model, request: Request) -> int:
    """How often the network sees an image on the way: Heun looks at both ends of a step, guidance looks twice."""
    model = ruled(model, request.lora)
    settings, distilled = settle(model, request), model.contract.guidance.distilled
    count = 0
    for step in settings.path.steps:
        ahead = [step.next] if isinstance(settings.sampler, Heun) and step.next.sigma > 0.0 else []
        for level in [step.now, *ahead]:
            count += 2 if not distilled and settings.guidance.active(settings.progress(level)) else 1
    return count

"""Every cause that the doctor names, and what each brings about: which of several findings is the first one to mend."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mezzotint.doctor.finding import GRADES, Finding


@dataclass(frozen=True, slots=True)
class Cause:
    """What people call it, and the causes (or all of a topic, "sampler.*") that its presence alone can bring about.

    What is seen itself, in the files or in pictures, or mends the network when it is tried, is certain, and explains
    what is graver than itself, too.
    """

    title: str
    brings: tuple[str, ...] = ()
    certain: bool = False


DENOISING = ("latent.*", "text.*", "guidance.*", "fit.*", "sampler.*", "weights.damaged")

# what any loss in the weights can look like, where no other reading of the network makes it good
LESS = ("fit.*", "guidance.*", "text.labels", "text.encoder", "text.captions", "latent.codec", "weights.damaged")

MISHEARD = ("guidance.*", "fit.*", "weights.damaged")

# not latent.codec, for which a network must denoise what it draws itself
MOVED = ("objective", "schedule.*", "latent.scale", "latent.shift", "latent.order", "text.*", "guidance.*", "sampler.*",
         "fit.under", "fit.collapsed", "fit.over")  # fmt: skip

CAUSES: dict[str, Cause] = {
    # what the files claim of the process
    "objective": Cause("the network answers with another objective than its files say", ("schedule.*", *DENOISING)),
    "schedule.levels": Cause("trained on other noise levels than its files say", ("schedule.start", *DENOISING)),
    "schedule.clock": Cause("the network's clock has another scale", DENOISING, certain=True),
    "schedule.terminal": Cause(
        "terminal noise is claimed otherwise than it was trained", ("schedule.start", "sampler.*", "fit.*")
    ),
    "schedule.shift": Cause(
        "the levels of a path do not fit this model or its size", ("sampler.steps", "fit.collapsed")
    ),
    "schedule.start": Cause("the path does not start where the training ended", ("fit.collapsed", "sampler.steps")),
    # what a latent is
    "latent.scale": Cause(
        "latents are scaled otherwise than in training", ("fit.*", "sampler.*", "text.*", "guidance.*"), certain=True
    ),
    "latent.shift": Cause(
        "latents are shifted otherwise than in training", ("fit.*", "sampler.*", "text.*", "guidance.*"), certain=True
    ),
    "latent.order": Cause("latent channels are in another order than in training", DENOISING, certain=True),
    "latent.codec": Cause("the backbone was trained on another codec's latents", DENOISING),
    "latent.overflow": Cause("the codec overflows in half precision", ("weights.damaged",)),
    "latent.reconstruction": Cause("the codec does not give images back", ("fit.*",)),
    "latent.detail": Cause("the codec loses fine detail"),
    "latent.cache": Cause("the latent cache is not what the codec makes of the images", ("fit.*",)),
    # what a prompt is
    "text.encoder": Cause("prompts are encoded otherwise than in training", ("text.*", *MISHEARD)),
    "text.layer": Cause("prompts are read at another layer than in training", ("text.encoder", *MISHEARD)),
    "text.padding": Cause("short prompts are filled otherwise than in training", ("text.encoder", *MISHEARD)),
    "text.truncated": Cause("prompts are longer than the encoder reads", ("data.captions", *MISHEARD)),
    "text.ignored": Cause("the network does not listen to its conditioning", MISHEARD),
    "text.captions": Cause("captions do not say what is in their images", MISHEARD),
    "text.labels": Cause("class labels mean other classes than in training", ("text.*", *MISHEARD)),
    "text.cache": Cause("cached text states are not what the encoder makes of the captions"),
    # guidance
    "guidance.strong": Cause("guidance is so strong that pictures saturate", ("fit.*",)),
    "guidance.missing": Cause("a model that was trained for guidance is drawn without it"),
    "guidance.distilled": Cause(
        "guidance on a model into which guidance was distilled",
        ("guidance.strong", "fit.under", "fit.over", "fit.collapsed", "fit.memorised"),
    ),
    "guidance.untrained": Cause("guidance compares with a branch that was never trained", ("guidance.strong", "fit.*")),
    # adapters
    "adapter.keys": Cause("keys of the adapter match nothing in the model", ("adapter.*", "speed.*", "fit.*")),
    "adapter.base": Cause("the adapter was trained on another base", ("adapter.scale", "fit.*")),
    "adapter.scale": Cause(
        "the adapter acts at the wrong strength", ("fit.*", "objective", "weights.*", *DENOISING), certain=True
    ),
    "adapter.empty": Cause("the adapter changes nothing", ("adapter.rank", "fit.*")),
    "adapter.rank": Cause("most of the adapter's rank is unused"),
    "adapter.text": Cause("the adapter's text-encoder part is missing", ("fit.*",)),
    "adapter.blend": Cause("adapters work against each other", ("fit.*", *DENOISING), certain=True),
    "adapter.finite": Cause("the adapter holds numbers that are not finite", ("*",)),
    # weights
    "weights.finite": Cause("weights hold numbers that are not finite", ("*",)),
    "weights.untrained": Cause(
        "a part of the network was never trained", (*DENOISING, "weights.tied", "objective", "schedule.*")
    ),
    "weights.zero": Cause(
        "layers are still at their initial zero", ("fit.*", "text.ignored", "guidance.*", "weights.damaged")
    ),
    "weights.damaged": Cause("weights are not as training left them", MOVED),
    "weights.precision": Cause("weights lost precision", LESS, certain=True),
    "weights.average": Cause("the moving average of the weights was not applied", ("fit.*",)),
    "weights.changed": Cause("weights are not those that the contract speaks of"),
    "weights.tied": Cause("layers that should differ are copies of each other", LESS, certain=True),
    # data and fit
    "data.broken": Cause("images of the data set cannot be used"),
    "data.copies": Cause("the data set holds copies"),
    "data.leak": Cause("validation images are copies of training images", ("fit.memorised",)),
    "data.captions": Cause("captions are missing, equal or cut"),
    "data.balance": Cause("classes of the data set are far from balanced"),
    "fit.memorised": Cause(
        "the model draws its training images again",
        ("fit.collapsed", "fit.over", "fit.forgotten", "guidance.*"),
        certain=True,
    ),
    "fit.collapsed": Cause(
        "pictures are all alike", ("weights.damaged", "fit.memorised", "fit.under", "text.*", "guidance.*")
    ),
    "fit.forgotten": Cause("the model lost what its base knew", ("schedule.levels", *DENOISING)),
    "fit.under": Cause("training was too short", ("sampler.*", "text.ignored", "guidance.*", "fit.collapsed")),
    "fit.over": Cause("training went on after the validation loss rose", ("fit.memorised",)),
    "run.frozen": Cause("the run changed nothing", ("fit.under", "weights.zero", "adapter.empty")),
    "run.diverged": Cause("the loss left its course", ("fit.*",)),
    "run.rate": Cause("the learning rate is too high or too low", ("run.diverged", "fit.under")),
    # sampler
    "sampler.steps": Cause("too few steps for this path"),
    "sampler.unfit": Cause("a sampler that does not fit this model", ("sampler.steps", "fit.*", "guidance.*")),
    # speed
    "speed.dtype": Cause("a number format that this machine computes slowly", ("speed.*",)),
    "speed.adapters": Cause("adapters compute beside the weights"),
    "speed.threads": Cause("fewer threads than the machine has cores", ("speed.kernel",)),
    "speed.offload": Cause("parts move to the device at every use"),
    "speed.kernel": Cause("a slow attention or convolution kernel"),
    "speed.python": Cause("Python and hooks take the time"),
    "speed.guidance": Cause("guidance doubles the work"),
    "speed.steps": Cause("more steps than the pictures need"),
    "speed.codec": Cause("the codec takes most of the time"),
    "speed.text": Cause("the text encoder takes most of the time"),
    "speed.loading": Cause("loading data takes most of a training step"),
    "speed.recompiled": Cause("the network is compiled again and again"),
    "speed.memory": Cause("the machine runs out of memory"),
    "speed.plan": Cause("slower than was planned for this machine"),
    "speed.regressed": Cause("slower than the run it is compared with"),
    # files
    "files.parts": Cause(
        "parts that do not belong together", ("objective", "schedule.*", "latent.*", "weights.*", *DENOISING)
    ),
}


def ranked(findings: Iterable[Finding]) -> tuple[tuple[Finding, ...], dict[str, str]]:
    """Findings with the first one to mend in front, and for those that follow from another one, from which.

    A finding follows from another that is at least as grave, or certain, and can bring it about. Among the rest the
    graver come first, then the stronger; behind them what follows, and notes last.
    """
    every = sorted(findings, key=lambda found: (GRADES.index(found.grade), -found.strength))
    gravest = {found.cause: found for found in reversed(every)}  # of those that name one cause
    follows: dict[str, str] = {}
    # from the weakest on, what is certain last: of two that explain each other the stronger stays, or the certain one
    for found in sorted((each for each in reversed(every) if gravest[each.cause] is each), key=_certain):
        for other in gravest.values():
            graver = _certain(other) or GRADES.index(other.grade) <= GRADES.index(found.grade)
            if other is not found and graver and brings(other.cause, found.cause) and other.cause not in follows:
                follows.setdefault(found.cause, other.cause)
    alarms = [found for found in every if found.grade != "note"]
    first = [found for found in alarms if found.cause not in follows]
    behind = [found for found in alarms if found.cause in follows]
    return (*first, *behind, *(found for found in every if found.grade == "note")), follows


def _certain(found: Finding) -> bool:
    return CAUSES[found.cause].certain and found.grade != "note"


def brings(cause: str, other: str) -> bool:
    """Whether a cause can bring about the other."""
    if cause == other:
        return False
    return any(
        pattern in ("*", other) or (pattern.endswith(".*") and other.startswith(pattern[:-1]))
        for pattern in CAUSES[cause].brings
    )

"""What a finished run says of itself: the contract of a trained model, its lineage, digests of recipe and code."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from mezzotint import files
from mezzotint.contract import Contract, Licence, Lineage, SamplingFacts
from mezzotint.governance import licences
from mezzotint.training.tables import Recipe

if TYPE_CHECKING:
    from mezzotint.training.diffusion import Diffusion


def contract(core: Diffusion) -> Contract:
    """The contract of a whole backbone after training: the base's, with what training changed.

    `families.save` fills in the digest of the weights.
    """
    recipe, base = core.recipe, core.model.contract
    dropped = [core.class_plan.dropout] * (core.classes is not None and core.classes.null is not None)
    dropped += [core.text_plan.dropout] * (core.captions is not None)
    guidance, sampling = base.guidance, base.sampling
    if not guidance.dropout and not guidance.distilled:
        guidance = guidance.model_copy(update={"dropout": max(dropped, default=0.0)})
    if recipe.sampling:
        guidance = guidance.model_copy(update={"scale": recipe.sampling.guidance})
        sampling = SamplingFacts.model_validate(
            sampling.model_dump() | {"sampler": recipe.sampling.sampler, "steps": recipe.sampling.steps}
        )
    return base.model_copy(
        update={
            "weights": "", "size": recipe.data.size, "guidance": guidance, "sampling": sampling,
            "licence": core.licensed.own, "lineage": lineage(core),
        }
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Licensed:
    """The licence of what is made, and that of the weights that it was made from; None: of none."""

    own: Licence
    base: str | None


def licensed(recipe: Recipe, base: Licence | None) -> Licensed:
    """What the recipe says, never freer than its base (else InputError); of all data behind it, the strictest."""
    weights, data = (base.weights, base.data) if base else (None, None)
    if data or recipe.data_licence:
        data = licences.combined([data, recipe.data_licence])
    own = licences.derived(recipe.licence, weights, f"what {recipe.at} starts from")
    return Licensed(Licence(weights=own, data=data), weights)


def lineage(core: Diffusion) -> Lineage:
    """From what is trained back to its base, data, recipe and code."""
    recipe, base = core.recipe, core.model.contract
    return Lineage(
        base=base.weights or None,
        dataset=core.digests["data"],
        recipe=digest(recipe),
        code=version(),
        seed=recipe.seed,
        steps=recipe.steps,
        overrides=base.lineage.overrides,
    )


def digest(recipe: Recipe) -> str:
    """SHA-256 of the resolved recipe."""
    return files.sha256_json(recipe.model_dump(mode="json"))


def version() -> str:
    """The installed version of Mezzotint."""
    try:
        return metadata.version("mezzotint")
    except metadata.PackageNotFoundError:
        return "uninstalled"

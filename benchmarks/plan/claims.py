"""What is commonly said of memory and compute, against the planner: `python benchmarks/plan/claims.py` prints a table.

Nothing is measured: every figure is an exact count of the published configuration, or a sum of such counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mezzotint.plan import words
from mezzotint.plan.fit import fitted
from mezzotint.plan.generating import Job, generating
from mezzotint.plan.machines import accelerator
from mezzotint.plan.objective import Training
from mezzotint.plan.subject import find
from mezzotint.plan.training import training

CARD = accelerator("h100")  # on which memory is counted; of a card only its libraries' own part matters


@dataclass(frozen=True)
class Memory:
    """A model and what it is said to take."""

    model: str
    said: float  # bytes
    job: Job


MEMORY = (
    Memory("sdxl", 10e9, Job(dtype="float16")), Memory("sd3.5-medium", 12e9, Job(dtype="bfloat16")),
    Memory("sd3.5-large", 18e9, Job(dtype="bfloat16")), Memory("flux2-dev", 40e9, Job(dtype="bfloat16")),
    Memory("flux2-dev", 24e9, Job(dtype="bfloat16", quant="fp8")),
    Memory("flux2-klein-9b", 12e9, Job(dtype="bfloat16")), Memory("flux2-klein-4b", 8e9, Job(dtype="bfloat16")),
)  # fmt: skip
COUNTS = (("sd3.5-medium", "2 B"), ("sd3.5-large", "8.1 B"), ("flux2-dev", "32 B"), ("flux2-klein-4b", "4 B"),
          ("flux2-klein-9b", "9 B"))  # fmt: skip
ADAPTERS = (("sd1.5", 4), ("sd1.5", 16), ("sdxl", 16), ("sdxl", 32), ("flux2-klein-4b", 16), ("flux2-dev", 16))


def memory() -> Iterator[list[str]]:
    for claim in MEMORY:
        fit = fitted(find(claim.model), claim.job, CARD, claim.said)
        sizes = [*fit.plan.at.parts.items(), ("libraries", CARD.base)]
        summed = " + ".join(f"{name.removeprefix('text.')} {size / 1e9:.2f}" for name, size in sizes if size)
        kind = f"{claim.job.dtype}{', ' + claim.job.quant if claim.job.quant else ''}"
        yield [f"{claim.model} takes {claim.said / 1e9:.0f} GB ({kind})",
               f"{summed} = **{fit.plan.peak / 1e9:.1f} GB**, in {fit.plan.at.name}", fit.says]  # fmt: skip


def counts() -> Iterator[list[str]]:
    for model, said in COUNTS:
        subject = find(model)
        numbers, besides = subject.parameters["backbone"], subject.besides["backbone"]
        more = f", and {besides:,} stored positions" if besides else ""
        yield [f"{model} has {said} parameters", f"{numbers:,}{more}", f"{numbers / 1e9:.2f} B"]


def compute() -> Iterator[list[str]]:
    """The same U-Net on pixels of 512x512 (as latents of a picture of 4096) and on latents of such a picture."""
    subject = find("sd1.5")
    large, small = (generating(subject, Job(size=(side, side), steps=1, guidance=1.0), CARD) for side in (4096, 512))
    pixels, latents = (next(phase.flops for phase in plan.phases if phase.name == "denoise") for plan in (large, small))
    decode = next(phase.flops for phase in small.phases if phase.name == "decode")
    counted = f"sd1.5 at 512x512, one look: {pixels / 1e9:,.0f} GFLOP on pixels, {latents / 1e9:,.0f} on latents;"
    so = f"{pixels / latents:.0f} times, since attention is quadratic; decoding costs {decode / latents:.1f} looks"
    yield ["latents cut compute by 16 to 64", f"{counted} {decode / 1e9:,.0f} to decode, once", so]


def adapters() -> Iterator[list[str]]:
    said = "LoRA trains up to 10,000 times less; its files have 2 to 150 MB"
    for model, rank in ADAPTERS:
        plan = training(find(model), Training(method="lora", rank=rank, dtype="bfloat16", size=(256, 256)), CARD)
        whole = plan.parameters["backbone"]
        so = f"{whole / plan.trained:,.0f} times; {words.size(2.0 * plan.trained)} in 16 bits"
        yield [said, f"{model}, rank {rank}, all attention: {whole:,} / {plan.trained:,}", so]
        said = "the same"


def main() -> None:
    print("| said | counted | so |\n|---|---|---|")
    for part in (memory, counts, compute, adapters):
        for row in part():
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

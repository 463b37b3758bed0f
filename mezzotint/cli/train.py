"""`mezzotint train`: train or fine-tune from a recipe."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from mezzotint.training.loop import Watch
    from mezzotint.training.tables import Recipe

INTERRUPTED = 130


@dataclass(frozen=True)
class Options:
    """Train or fine-tune from a recipe, into the recipe's run folder.

    method = "lora", "dreambooth", "textual-inversion", "controlnet", "lcm" (few steps), "full", "vae" or "patch-pca",
    on any model that `generate` takes. The data is audited first. A run that was stopped, by Ctrl-C or by force, goes
    on with --resume and ends with the same weights as one that was not. The result is in model/ inside the run folder,
    beside the audit, metrics, plots, previews and the resolved recipe.

    For example, train an adapter, go on after a stop, try another rank elsewhere, and train on two devices:

        mezzotint train lora.toml
        mezzotint train lora.toml --resume
        mezzotint train lora.toml --set lora.rank=4 --set out=runs/rank-4
        torchrun --nproc-per-node 2 -m mezzotint train lora.toml
    """

    recipe: tyro.conf.Positional[Path]
    """The recipe, a TOML file."""
    resume: bool = False
    """Go on from the newest checkpoint in the run folder; begin where there is none."""
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Change one value of the recipe, as table.key=value; may be given several times."""
    audit: bool = False
    """Look at the data alone: say what is wrong with it and what to do, and train nothing."""
    json: bool = False
    """Print every record of the metrics as one line of JSON, and the outcome last."""


def run(options: Options) -> int:
    """Train; the exit code is 0 for a finished run and 130 for one that was stopped and saved."""
    from mezzotint.training import loop, recipe

    plan = recipe.read(options.recipe, options.set)
    if options.audit:
        return _audit(plan)
    with _Bar(plan.steps, quiet=options.json) as bar:
        outcome = loop.train(plan, options.resume, bar.watch())
    if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
        return 0 if outcome.finished else INTERRUPTED
    if options.json:
        print(json.dumps({**asdict(outcome), "folder": str(outcome.folder)}), flush=True)
    elif outcome.finished:
        print(f"{outcome.folder / loop.MODEL}")
    if not outcome.finished:
        print(f"stopped after step {outcome.step} of {plan.steps}, saved; go on with --resume", file=sys.stderr)
        return INTERRUPTED
    return 0


def _audit(plan: Recipe) -> int:
    """The audit without a model: captions are not counted in tokens, labels not held to its classes."""
    import torch

    from mezzotint.training import audit
    from mezzotint.training.methods import Place

    audit.before(plan, Place(Path(plan.out), torch.device("cpu"), lambda what, done, total: None, print))
    return 0


class _Bar:
    """A progress bar with loss, images per second and the time left; JSON lines instead where it is quiet."""

    def __init__(self, steps: int, *, quiet: bool) -> None:
        import rich.progress as rich
        from rich.console import Console

        console = Console(file=sys.stderr)
        columns = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[note]}"),
            rich.TimeElapsedColumn(),
            rich.TextColumn("left"),
            rich.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.quiet, self.steps = quiet, steps
        self.shown = console.is_terminal and not quiet
        self.bars = rich.Progress(*columns, console=console, disable=not self.shown, refresh_per_second=2)
        self.tasks: dict[str, Any] = {}
        self.speed = ""

    def __enter__(self) -> _Bar:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def watch(self) -> Watch:
        """What the loop calls."""
        from mezzotint.training.loop import Watch

        return Watch(prepare=self._advance, say=self._say, step=self._step, record=self._record)

    def _say(self, text: str) -> None:
        if not self.quiet:
            self.bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _advance(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self.tasks:  # a resumed run starts its clock where it goes on, not at step 0
            self.tasks[what] = self.bars.add_task(what, total=total, completed=done - 1, note="")
        self.bars.update(self.tasks[what], completed=done, note=note)

    def _step(self, step: int, total: int, loss: float) -> None:
        self._advance("training", step, total, f"loss {loss:.4f}{self.speed}")

    def _record(self, record: dict[str, Any]) -> None:
        if self.quiet:
            print(json.dumps(record), flush=True)
            return
        if "images_per_second" in record:
            self.speed = f"   {record['images_per_second']:.1f} images/s"
        if not self.shown:
            parts = [f"step {record['step']}/{self.steps}"]
            parts += [
                f"{key} {record[key]:.5g}" for key in ("loss", "validation", "images_per_second") if key in record
            ]
            print("  ".join(parts), file=sys.stderr, flush=True)

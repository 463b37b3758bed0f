"""What a run reports of itself: metrics.jsonl, TensorBoard events, plots."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from mezzotint import files
from mezzotint.errors import InputError

Record = dict[str, Any]
FILE = "metrics.jsonl"


class Metrics:
    """Appends records to metrics.jsonl and TensorBoard; on resume what lies after the checkpoint is cut off first."""

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise InputError("training needs the package tensorboard. Run: pip install 'mezzotint[train]'") from error

        self.path = folder / FILE
        kept = [record for record in read(folder) if record["step"] <= step]
        files.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, record: Record) -> None:
        """Append one record, which has a "step"; numbers also go to TensorBoard."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self.events.add_scalar(key, value, record["step"])

    def flush(self) -> None:
        """Have everything on disk."""
        with open(self.path, "a", encoding="utf-8") as stream:
            os.fsync(stream.fileno())
        self.events.flush()

    def close(self) -> None:
        """Let go of the files; a disk that is full now was met and reported before."""
        with contextlib.suppress(OSError):
            self.events.close()


def read(folder: Path) -> list[Record]:
    """All records; a last line that a kill cut short is left out."""
    path = folder / FILE
    found: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def plot(folder: Path) -> list[Path]:
    """Draw loss.png, validation.png (by band of the clock) and rate.png into folder/plots from metrics.jsonl."""
    records = read(folder)
    groups = {
        "loss": [key for key in _keys(records) if key == "loss" or key.startswith("loss/")],
        "validation": [key for key in _keys(records) if key.startswith("validation")],
        "rate": ["rate"],
    }
    return [
        _draw(folder / "plots" / f"{name}.png", name, keys, records)
        for name, keys in groups.items()
        if any(key in record for key in keys for record in records)
    ]


def _keys(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _draw(path: Path, title: str, keys: list[str], records: list[Record]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4))
    axes = figure.add_axes((0.1, 0.13, 0.87, 0.78))  # a layout that fits itself takes three times as long
    for key in keys:
        points = [(record["step"], record[key]) for record in records if key in record]
        axes.plot(*zip(*points, strict=True), label=key, linewidth=1)
    if any(record[key] > 0 for record in records for key in keys if key in record):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    canvas = FigureCanvasAgg(figure)
    return files.write_with(path, lambda temporary: canvas.print_png(str(temporary)))

"""The sweep's pictures: error against time with the front, and the settings side by side from the same noise."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence

from PIL import Image as pil
from PIL import ImageDraw
from PIL.Image import Image

from mezzotint.evaluate.sweep.measure import SHOWN, Sweep
from mezzotint.evaluate.sweep.results import Results, Row, of_distance
from mezzotint.evaluate.sweep.setting import Target

INCHES, DOTS = (8.0, 4.6), 120
INK, GRID, FRONT = "#1d2329", "#c6cdd3", "#1d2329"
# Colours that people tell apart whatever their eyes (Okabe & Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#6b7280")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
TILE, GAP, HEAD, LINE = 128, 6, 36, 14  # pixels of a picture, between pictures, above them, of a line of text
PAPER, TEXT = (250, 250, 248), (40, 40, 40)
MOST = 60  # rows of the contact sheet


def plot(results: Results, target: Target, tolerance: float) -> bytes | None:
    """A PNG of error over seconds an image for one target, both logarithmic, a curve for each way; of distance where
    nothing has an error; None where there is nothing to draw."""
    rows = [row for row in results.rows if row.setting.target == target and row.seconds and not row.failure]
    by_error = any(row.pixel for row in rows)
    value: Callable[[Row], float | None] = _pixel if by_error else _distance
    shown = [row for row in rows if (found := value(row)) is not None and found > 0]
    if not shown:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=INCHES, layout="constrained", dpi=DOTS)
    axes = figure.add_subplot()
    for i, way in enumerate(dict.fromkeys(row.setting.way for row in shown)):
        points = sorted((row.seconds or 0.0, value(row) or 0.0) for row in shown if row.setting.way == way)
        axes.plot(*zip(*points, strict=True), marker=MARKS[i // len(COLOURS) % len(MARKS)], markersize=4, linewidth=1.4,
                  color=COLOURS[i % len(COLOURS)], label=way)  # fmt: skip
    front = [(row.seconds or 0.0, value(row) or 0.0) for row in results.front if row in shown]
    if front:
        axes.plot(*zip(*front, strict=True), "o", markersize=11, fillstyle="none", color=FRONT,
                  label="nothing beats these")  # fmt: skip
    if by_error:
        axes.axhline(tolerance, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate("tolerance", (1, tolerance), (-3, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", horizontalalignment="right", fontsize=8, color=INK)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="seconds an image")
    axes.set_ylabel("error against the converged image, grey levels" if by_error else "Frechet distance")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(color=GRID, linewidth=0.6, which="both", alpha=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(target.name, fontsize=10, color=INK, x=0.01, horizontalalignment="left")
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def contact_sheet(sweep: Sweep, results: Results) -> Image:
    """A row for each setting, its pictures from the same noise in the same columns; converged ones head each target."""
    rows: list[tuple[str, Sequence[Image]]] = []
    for target in sweep.targets:
        if (reference := results.references.get(target)) is not None:
            rows.append(
                (
                    f"converged: {target.name}, {reference.steps} steps",
                    reference.pictures[: min(SHOWN, sweep.subject.batch)],
                )
            )
        for row in results.rows:
            if row.setting.target == target and not row.failure:
                cost = f", {row.seconds:.3g} s" if row.seconds is not None else ""
                error = f", error {row.pixel.value:.1f}" if row.pixel else ""
                found = sweep.store.pictures(sweep.identity(row.setting, 0), SHOWN)
                rows.append((f"{row.setting.way}, {row.setting.steps}{cost}{error}", found))
    return sheet(rows[:MOST])


def sheet(rows: Sequence[tuple[str, Sequence[Image]]]) -> Image:
    """Rows of tiles, each under its text; two rows stand side by side where there are many."""
    columns = max((len(pictures) for _, pictures in rows), default=1)
    across = 2 if len(rows) > 12 else 1
    width = columns * (TILE + GAP) + GAP
    down = -(-len(rows) // across)
    page = pil.new("RGB", (across * width + (across - 1) * 2 * GAP, down * (TILE + HEAD) + GAP), PAPER)
    pen = ImageDraw.Draw(page)
    for i, (text, pictures) in enumerate(rows):
        left, top = (i // down) * (width + 2 * GAP), (i % down) * (TILE + HEAD)
        wrapped = textwrap.wrap(text, max(20, width // 7))[:2]
        high = top + HEAD - LINE * len(wrapped) - 3  # right above its pictures
        pen.multiline_text((left + GAP, high), "\n".join(wrapped), fill=TEXT, font_size=12, spacing=2)
        for c, picture in enumerate(pictures):
            page.paste(tile(picture), (left + GAP + c * (TILE + GAP), top + HEAD))
    return page


def tile(picture: Image) -> Image:
    """A picture in the size of a tile."""
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.convert("RGB").resize(size, pil.Resampling.BICUBIC)


def _pixel(row: Row) -> float | None:
    return row.pixel.value if row.pixel else None


def _distance(row: Row) -> float | None:
    found = of_distance(row)
    return found["distance"] if found else None

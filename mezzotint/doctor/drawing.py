"""The doctor's plots and exhibits as PNG data addresses."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mezzotint.doctor.finding import Plot

if TYPE_CHECKING:
    from PIL.Image import Image

INCHES, DOTS = (5.2, 3.1), 130
WIDEST = 1400  # pixels of an exhibit on the page
SMALL = 128  # exhibits below this are shown larger, pixel by pixel
TICKS = 28  # names under bars, at most
LONGEST, ROW = 36, 0.155  # letters of a name, inches of a line of them
TURNED = 42  # letters of all names together from which bars lie
INK, GRID = "#1d2329", "#c6cdd3"
# Colours that people tell apart whatever their eyes (Okabe & Ito 2008). A dark page turns light and dark round (CSS).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#6b7280")
DASHES = ("-", "--", "-.", ":")  # where there are more curves than colours, or no colour at all


def picture(image: Image) -> tuple[str, int]:
    """A PNG data address and the width to show it at."""
    shown = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB")
    if shown.width > WIDEST:
        shown = shown.resize((WIDEST, max(1, round(shown.height * WIDEST / shown.width))))
    stream = io.BytesIO()
    shown.save(stream, "PNG")
    width = shown.width * max(1, SMALL // max(1, shown.width))
    return _address(stream), width


def drawn(plot: Plot) -> str:
    """The plot in dark ink on no ground of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=INCHES, layout="constrained", dpi=DOTS)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    _bars(axes, plot) if plot.kind == "bars" else _lines(axes, plot)
    title = _plainly("\n".join(textwrap.wrap(plot.title, 66)))
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, horizontalalignment="left")
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, colors=INK, length=0)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(GRID)
    if len(plot.curves) > 1:
        axes.legend(fontsize=8, labelcolor=INK, framealpha=0)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return _address(stream)


def _address(stream: io.BytesIO) -> str:
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _lines(axes: Any, plot: Plot) -> None:
    for i, (name, points) in enumerate(plot.curves.items()):
        kept = _drawable(points, plot.log_x, plot.log_y)
        axes.plot(
            [x for x, _ in kept], [y for _, y in kept], DASHES[i // len(COLOURS) % len(DASHES)], label=_plainly(name),
            color=COLOURS[i % len(COLOURS)], linewidth=1.7, marker="o" if len(kept) <= 16 else None, markersize=3.5,
        )  # fmt: skip
    if plot.log_x:
        _logarithmic(axes, "x")
    if plot.log_y:
        _logarithmic(axes, "y")
    axes.set_xlabel(_plainly(plot.x), fontsize=9)
    axes.set_ylabel(_plainly(plot.y), fontsize=9)


def _bars(axes: Any, plot: Plot) -> None:
    """Bars side by side at the places of all curves; lying where their names are long."""
    places = sorted({x for points in plot.curves.values() for x, _ in points if math.isfinite(x)})
    index = {x: i for i, x in enumerate(places)}
    names = [_plainly(_short(str(name))) for name in plot.labels] or [f"{x:g}" for x in places]
    lying = sum(map(len, names)) > TURNED
    thick = 0.8 / max(1, len(plot.curves))
    for i, (name, points) in enumerate(plot.curves.items()):
        kept = _drawable(points, False, plot.log_y)
        at = [index[x] + (i - (len(plot.curves) - 1) / 2) * thick for x, _ in kept]
        draw = axes.barh if lying else axes.bar
        draw(at, [y for _, y in kept], thick, label=_plainly(name), color=COLOURS[i % len(COLOURS)])
    every = max(1, math.ceil(len(places) / TICKS))
    ticks = [(i, name) for i, name in enumerate(names[: len(places)]) if i % every == 0]
    value, place = (axes.xaxis, axes.yaxis) if lying else (axes.yaxis, axes.xaxis)
    place.set_ticks([i for i, _ in ticks], [name for _, name in ticks])
    place.set_label_text(_plainly(plot.x), fontsize=9)
    value.set_label_text(_plainly(plot.y), fontsize=9)
    if lying:
        axes.invert_yaxis()
        axes.figure.set_figheight(max(INCHES[1], 1.0 + ROW * len(ticks)))
    if plot.log_y:
        _logarithmic(axes, "x" if lying else "y")


def _logarithmic(axes: Any, name: str) -> None:
    """A logarithmic axis with plain numbers: decades, and 2 and 5 in them where there are few."""
    from matplotlib import ticker

    if not axes.has_data():
        return
    axes.set(**{f"{name}scale": "log"})
    low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
    axis = axes.xaxis if name == "x" else axes.yaxis
    if not (0 < low < high and math.isfinite(high)):  # nothing to see
        axes.set(**{f"{name}scale": "linear"})
        return
    few = high / low < 200
    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,), numticks=9))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _drawable(points: Sequence[tuple[float, float]], log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    """The points that are numbers, and above 0 on a logarithmic axis."""
    return [
        (x, y)
        for x, y in points
        if math.isfinite(x) and math.isfinite(y) and not (log_x and x <= 0) and not (log_y and y <= 0)
    ]


def _short(name: str) -> str:
    """The end of a long name: layers differ there."""
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _plainly(text: str) -> str:
    """The text as it stands: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")

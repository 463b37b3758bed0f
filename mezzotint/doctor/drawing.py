"""The doctor's plots as PNG data addresses, each in ink for a light page and for a dark one."""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

from mezzotint.doctor.finding import Plot

INCHES, DOTS = (5.2, 3.1), 130
TICKS = 28  # names under bars, at most
TURNED = 42  # letters of all names together from which bars lie
# Colours that people tell apart whatever their eyes (Okabe & Ito 2008), a little lighter on dark.
INKS = {
    "light": ("#1d2329", "#d5dade", ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d00", "#56b4e9", "#6b7280")),
    "dark": ("#e4e8ec", "#3a424b", ("#5ab4ee", "#ff8f4d", "#3ccf9f", "#eba3c8", "#e8c547", "#9bd3f7", "#a3abb5")),
}
DASHES = ("-", "--", "-.", ":")  # where there are more curves than colours, or no colour at all


def drawn(plot: Plot) -> tuple[str, str]:
    """The plot for a light and for a dark page, on no ground of its own."""
    return _png(plot, "light"), _png(plot, "dark")


def _png(plot: Plot, ink: str) -> str:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    text, grid, colours = INKS[ink]
    figure = Figure(figsize=INCHES, layout="constrained", dpi=DOTS)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    _bars(axes, plot, colours) if plot.kind == "bars" else _lines(axes, plot, colours)
    axes.set_title(_plainly("\n".join(textwrap.wrap(plot.title, 64))), fontsize=10, color=text, loc="left")
    axes.grid(color=grid, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8, colors=text, length=0)
    axes.xaxis.label.set_color(text)
    axes.yaxis.label.set_color(text)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(grid)
    if len(plot.curves) > 1:
        axes.legend(fontsize=8, labelcolor=text, framealpha=0)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _lines(axes: Any, plot: Plot, colours: Sequence[str]) -> None:
    for i, (name, points) in enumerate(plot.curves.items()):
        kept = _drawable(points, plot.log_x, plot.log_y)
        axes.plot(
            [x for x, _ in kept], [y for _, y in kept], DASHES[i // len(colours) % len(DASHES)], label=_plainly(name),
            color=colours[i % len(colours)], linewidth=1.7, marker="o" if len(kept) <= 16 else None, markersize=3.5,
        )  # fmt: skip
    if plot.log_x:
        _logarithmic(axes, "x")
    if plot.log_y:
        _logarithmic(axes, "y")
    axes.set_xlabel(_plainly(plot.x), fontsize=9)
    axes.set_ylabel(_plainly(plot.y), fontsize=9)


def _bars(axes: Any, plot: Plot, colours: Sequence[str]) -> None:
    """Bars side by side at the places of all curves; lying where their names are long."""
    places = sorted({x for points in plot.curves.values() for x, _ in points if math.isfinite(x)})
    index = {x: i for i, x in enumerate(places)}
    names = [_plainly(str(name))[:40] for name in plot.labels] or [f"{x:g}" for x in places]
    lying = sum(map(len, names)) > TURNED
    thick = 0.8 / max(1, len(plot.curves))
    for i, (name, points) in enumerate(plot.curves.items()):
        kept = _drawable(points, False, plot.log_y)
        at = [index[x] + (i - (len(plot.curves) - 1) / 2) * thick for x, _ in kept]
        draw = axes.barh if lying else axes.bar
        draw(at, [y for _, y in kept], thick, label=_plainly(name), color=colours[i % len(colours)])
    every = max(1, math.ceil(len(places) / TICKS))
    ticks = [(i, name) for i, name in enumerate(names[: len(places)]) if i % every == 0]
    value, place = (axes.xaxis, axes.yaxis) if lying else (axes.yaxis, axes.xaxis)
    place.set_ticks([i for i, _ in ticks], [name for _, name in ticks])
    place.set_label_text(_plainly(plot.x), fontsize=9)
    value.set_label_text(_plainly(plot.y), fontsize=9)
    if lying:
        axes.invert_yaxis()
    if plot.log_y:
        _logarithmic(axes, "x" if lying else "y")


def _logarithmic(axes: Any, name: str) -> None:
    """A logarithmic axis with plain numbers: decades, and 2 and 5 in them where there are few."""
    from matplotlib import ticker

    axes.set(**{f"{name}scale": "log"})
    low, high = axes.get_xlim() if name == "x" else axes.get_ylim()
    axis = axes.xaxis if name == "x" else axes.yaxis
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


def _plainly(text: str) -> str:
    """The text as it stands: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")

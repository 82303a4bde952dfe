"""Plots as SVG text, by matplotlib: metric against size of trials, the error of every layer, and a frontier."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINT, FRONT, BEST, INK = "#5b7fb5", "#c8752d", "#2e8b57", "#3b4654"
PRODUCERS = ("#1f6fb4", "#d1672b", "#3a9d5d", "#8a5fb0", "#b03a48", "#7a7a7a", "#b5a03a", "#3b4654")
_SIZE = (8.6, 3.4)
_MANY_BARS = 40
"""Number of bars from which their names would overlap, so that they are left out."""

_LETTERS = 24
"""Last letters of a name that leave room for its bar."""


def check_matplotlib() -> None:
    """ImportError when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the plots are made by matplotlib; run `pip install ipex_quant[autotune]`") from error


def scatter_plot(
    points: Sequence[tuple[float, float]], front: Sequence[tuple[float, float]], best: int | None, baseline: float
) -> str:
    """A plot, as SVG, of the `points` (megabytes, metric), with their numbers.

    A line joins the points of `front`, a ring marks the point number `best`, and a dashed line is the float model's
    metric `baseline`.
    """
    figure, axes = _new("model, MB", "metric, more is better")
    axes.axhline(baseline, color=INK, linestyle="--", linewidth=1, label="float model")
    axes.plot(*zip(*front, strict=True), color=FRONT, linewidth=1.5, gid="front", label="Pareto front")
    axes.scatter(*zip(*points, strict=True), color=POINT, s=30, zorder=3, gid="trials", label="trial")
    if best is not None:
        ring = {"s": 130, "facecolors": "none", "edgecolors": BEST, "linewidths": 2}
        axes.scatter(*points[best], **ring, zorder=4, gid="best", label="result")
    for index, point in enumerate(points):
        axes.annotate(str(index), point, xytext=(5, 5), textcoords="offset points")
    axes.legend(loc="best", frameon=False)
    return _svg(figure, "Metric against size of all trials")


def frontier_plot(
    title: str, points: Mapping[str, Sequence[tuple[float, float]]], fronts: Mapping[str, Sequence[tuple[float, float]]]
) -> str:
    """A plot, as SVG, of points (bits a weight, KL divergence) of several producers, by name, in a color each.

    A line joins each producer's `fronts`, thick for the first one. Divergences are on a logarithmic scale; of 0 there
    is no point. `title` begins with a word of its own, so that a page may hold several.
    """
    figure, axes = _new("bits a weight", "KL divergence from float, nats")
    axes.set_yscale("log")
    for number, name in enumerate(points):
        style: dict[str, Any] = {"color": PRODUCERS[number % len(PRODUCERS)]}
        shown, front = ([point for point in each[name] if point[1] > 0] for each in (points, fronts))
        if not shown:
            continue
        axes.scatter(*zip(*shown, strict=True), s=12, alpha=0.5, **style)
        width = 1.0 if number else 2.2
        axes.plot(*zip(*front, strict=True), label=name, marker="o", markersize=4, linewidth=width, **style)
    axes.legend(loc="best", frameon=False, fontsize="small")
    return _svg(figure, title)


def bar_plot(bars: Sequence[tuple[str, float]]) -> str:
    """A plot, as SVG, with a bar on a logarithmic scale for each (name, value); an empty string if all are 0."""
    positive = [value for _, value in bars if value > 0]
    if not positive:
        return ""
    figure, axes = _new("layers, in the order of their calls", "error")
    names, values = zip(*bars, strict=True)
    axes.set_yscale("log")
    axes.set_ylim(min(positive) / 2, max(positive) * 2)  # the lowest bar has some height
    for index, bar in enumerate(axes.bar(range(len(values)), values, color=POINT)):
        bar.set_gid(f"error-{index}")
    axes.set_xticks(range(len(names)) if len(names) < _MANY_BARS else [])
    shown = [name if len(name) <= _LETTERS else f"…{name[1 - _LETTERS :]}" for name in names]
    axes.set_xticklabels(shown if len(names) < _MANY_BARS else [], rotation=90)
    return _svg(figure, "Sensitivity of every layer")


def _new(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained", facecolor="white")  # a dark page would show through
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#e3e7ec")
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """The ``<svg>`` element of `figure`, reproducible; ids begin with the title, so that a page may hold several."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Title": title})
    element = text.getvalue()[text.getvalue().index("<svg ") :]
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{title.split()[0].lower()}-", element)

"""Two plots as SVG text: points with a front, and bars on a logarithmic scale."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

_WIDTH, _HEIGHT = 860, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 14, 46
_INK, _GRID, _POINT, _FRONT, _BEST = "#3b4654", "#e3e7ec", "#5b7fb5", "#c8752d", "#2e8b57"


def scatter_plot(
    points: Sequence[tuple[float, float, str]],
    front: Sequence[tuple[float, float]],
    best: tuple[float, float, str] | None,
    baseline: float,
) -> str:
    """Metric against megabytes of `points` with labels; `front` is joined, `best` ringed, `baseline` a dashed line."""
    x = _Axis([px for px, _, _ in points], _LEFT, _WIDTH - _RIGHT)
    y = _Axis([*(py for _, py, _ in points), baseline], _HEIGHT - _BOTTOM, _TOP)
    parts = [_grid(x, y), _axis_title("model, MB", "metric, more is better")]
    level = y.at(baseline)
    parts.append(
        f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{level:.1f}' y2='{level:.1f}' stroke='{_INK}' "
        f"stroke-dasharray='5 4'/><text x='{_WIDTH - _RIGHT}' y='{level + 15:.1f}' text-anchor='end'>float model</text>"
    )
    line = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in front)
    parts.append(f"<polyline points='{line}' fill='none' stroke='{_FRONT}' stroke-width='1.5'/>")
    for px, py, label in points:
        colour = _FRONT if (px, py) in front else _POINT
        parts.append(
            f"<circle cx='{x.at(px):.1f}' cy='{y.at(py):.1f}' r='5' fill='{colour}'>"
            f"<title>{html.escape(label)}: {px:.2f} MB, {py:.5g}</title></circle>"
        )
    if best is not None:
        parts.append(
            f"<circle cx='{x.at(best[0]):.1f}' cy='{y.at(best[1]):.1f}' r='9' fill='none' stroke='{_BEST}' "
            "stroke-width='2.5'/>"
        )
    key = ((_POINT, "trial"), (_FRONT, "Pareto front"), (_BEST, "result (ringed)"))
    for i, (colour, text) in enumerate(key):
        left = _LEFT + 12 + 120 * i
        parts.append(f"<circle cx='{left}' cy='{_HEIGHT - 8}' r='5' fill='{colour}'/>")
        parts.append(f"<text x='{left + 10}' y='{_HEIGHT - 4}'>{text}</text>")
    return _svg(parts, "Metric against size of all trials")


def bar_plot(bars: Sequence[tuple[str, float, str]]) -> str:
    """A bar for each (name, value, note), in the order given, without height for 0; empty when all are 0."""
    values = [value for _, value, _ in bars]
    positive = [value for value in values if value > 0]
    if not positive:
        return ""
    low, high = math.floor(math.log10(min(positive) / 1.5)), math.ceil(math.log10(max(positive)))
    y = _Axis([low, max(high, low + 1)], _HEIGHT - _BOTTOM, _TOP, margin=0)
    parts = [
        f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y.at(n):.1f}' y2='{y.at(n):.1f}' stroke='{_GRID}'/>"
        f"<text x='{_LEFT - 8}' y='{y.at(n) + 4:.1f}' text-anchor='end'>1e{n}</text>"
        for n in range(low, max(high, low + 1) + 1)
    ]
    step = (_WIDTH - _LEFT - _RIGHT) / len(values)
    for i, ((name, _, note), value) in enumerate(zip(bars, values, strict=True)):
        top = y.at(math.log10(value)) if value > 0 else y.at(low)
        parts.append(
            f"<rect x='{_LEFT + i * step:.1f}' y='{top:.1f}' width='{max(step * 0.8, 0.5):.1f}' "
            f"height='{_HEIGHT - _BOTTOM - top:.1f}' fill='{_POINT}'>"
            f"<title>{html.escape(name)}: {value:.3g}{html.escape(', ' + note if note else '')}</title></rect>"
        )
    parts.append(_axis_title("layers, in the order of their calls", "error"))
    return _svg(parts, "Sensitivity of every layer")


class _Axis:
    """Values to pixels, linearly, with some room at both ends."""

    def __init__(self, values: Sequence[float], start: float, end: float, margin: float = 0.06) -> None:
        low, high = min(values), max(values)
        room = (high - low) * margin or (abs(high) * 0.01 or 1.0) * (margin > 0)
        self.low, self.high = low - room, high + room
        self._start, self._end = start, end

    def at(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Round numbers within the axis, about five."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        first = math.ceil(self.low / step)
        return [step * i for i in range(first, math.floor(self.high / step) + 1)]


def _grid(x: _Axis, y: _Axis) -> str:
    bottom = _HEIGHT - _BOTTOM
    vertical = (
        f"<line x1='{x.at(n):.1f}' x2='{x.at(n):.1f}' y1='{_TOP}' y2='{bottom}' stroke='{_GRID}'/>"
        f"<text x='{x.at(n):.1f}' y='{bottom + 16}' text-anchor='middle'>{n:.6g}</text>"
        for n in x.ticks()
    )
    horizontal = (
        f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y.at(n):.1f}' y2='{y.at(n):.1f}' stroke='{_GRID}'/>"
        f"<text x='{_LEFT - 8}' y='{y.at(n) + 4:.1f}' text-anchor='end'>{n:.6g}</text>"
        for n in y.ticks()
    )
    return "".join((*vertical, *horizontal))


def _axis_title(x: str, y: str) -> str:
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    return (
        f"<text x='{_WIDTH - _RIGHT}' y='{_HEIGHT - 12}' text-anchor='end'>{x}</text>"
        f"<text x='16' y='{middle}' transform='rotate(-90 16 {middle})' text-anchor='middle'>{y}</text>"
    )


def _svg(parts: Sequence[str], title: str) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'"
    ground = f"<rect width='{_WIDTH}' height='{_HEIGHT}' fill='#fff'/>"  # or else a dark page would show through
    style = f"font-family='system-ui, sans-serif' font-size='12' fill='{_INK}'"
    return f"{head} {style}><title>{title}</title>{ground}{''.join(parts)}</svg>"

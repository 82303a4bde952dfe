"""`MonotoneFit`: corrects estimates by what was measured."""

from __future__ import annotations

import itertools
import math


class MonotoneFit:
    """A growing function through measured points, straight in logarithms between them and proportional beyond.

    Without points it is the identity. Where a larger estimate was measured smaller, the points are averaged (the
    algorithm of adjacent violators).
    """

    def __init__(self) -> None:
        self._points: dict[float, float] = {}

    def add(self, estimate: float, measured: float) -> None:
        """Take in that what was `estimate` was measured as `measured`; numbers that have no logarithm say nothing."""
        if 0 < estimate < math.inf and 0 < measured < math.inf:
            self._points[math.log(estimate)] = math.log(measured)

    def __call__(self, estimate: float) -> float:
        """What will be measured where `estimate` is estimated."""
        if not self._points or not 0 < estimate < math.inf:
            return estimate
        points = self._growing()
        x = math.log(estimate)
        if x <= points[0][0]:
            return math.exp(points[0][1] + x - points[0][0])
        for (left, low), (right, high) in itertools.pairwise(points):
            if x <= right:
                return math.exp(low + (high - low) * (x - left) / (right - left))
        return math.exp(points[-1][1] + x - points[-1][0])

    def _growing(self) -> list[tuple[float, float]]:
        """The points with values that do not fall, in order."""
        blocks: list[list[tuple[float, float]]] = []
        for point in sorted(self._points.items()):
            blocks.append([point])
            while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
                blocks[-2:] = [blocks[-2] + blocks[-1]]
        return [(x, _mean(block)) for block in blocks for x, _ in block]


def _mean(block: list[tuple[float, float]]) -> float:
    return sum(y for _, y in block) / len(block)

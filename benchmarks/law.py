"""The law y(n) = a + b · n^−c of a figure against learned tokens, and how far it can be trusted. numpy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 4  # different numbers of tokens: the law has three unknowns, and leaving one out must leave three
POWERS = (0.01, 2.0)
Point = tuple[float, float]  # learned tokens, and the figure


@dataclass(frozen=True)
class Law:
    """y(n) = a + b · n^−c, with a not below a known floor and b ≥ 0."""

    a: float
    b: float
    c: float

    def at(self, tokens: float) -> float:
        return self.a + self.b * tokens**-self.c


@dataclass(frozen=True)
class Fitted:
    """A law and its errors, all relative to the measured figures."""

    law: Law
    residual: float  # root mean square
    left_out: dict[float, float]  # tokens → error of the law fitted without the points there
    others: list[Law]  # these laws

    def between(self, tokens: float) -> tuple[float, float]:
        """The least and the largest figure that the law and those without one of the counts give."""
        values = [law.at(tokens) for law in (self.law, *self.others)]
        return min(values), max(values)


def fit(points: Sequence[Point], floor: float = 0.0) -> Law:
    """The law with the least squares of relative errors, which for small ones are those of logarithms.

    For a given c the best a and b are found exactly; c is searched. At least three different numbers of tokens.
    """
    tokens, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    middle = float(np.exp(np.log(tokens).mean()))  # for numbers near one

    def solved(power: float) -> tuple[float, float, float]:
        """(squared error, a, b at the middle) for this c."""
        shape = (tokens / middle) ** -power / values
        one, target = 1 / values, 1 - floor / values
        columns = np.stack([one, shape], 1)
        above, scale = np.linalg.lstsq(columns, target, rcond=None)[0]
        if above < 0 or scale < 0:  # the best of the two edges
            edges = [(0.0, max(float(shape @ target / (shape @ shape)), 0.0)), (float(one @ target / (one @ one)), 0.0)]
            above, scale = min(edges, key=lambda edge: float(((columns @ np.array(edge) - target) ** 2).sum()))
        error = float(((columns @ np.array([above, scale]) - target) ** 2).sum())
        return error, floor + float(above), float(scale)

    low, high = map(math.log, POWERS)
    for _ in range(12):  # a grid, each time as wide as two steps of the last
        grid = np.linspace(low, high, 41)
        best = int(np.argmin([solved(math.exp(power))[0] for power in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    power = math.exp((low + high) / 2)
    _, a, scale = solved(power)
    return Law(a, scale * middle**power, power)


def fitted(points: Sequence[Point], floor: float = 0.0) -> Fitted | None:
    """The law of the points and its errors; None for fewer than four numbers of tokens."""
    counts = sorted({tokens for tokens, _ in points})
    if len(counts) < FEWEST:
        return None
    law = fit(points, floor)
    residual = math.sqrt(float(np.mean([(law.at(tokens) / value - 1) ** 2 for tokens, value in points])))
    others = {count: fit([point for point in points if point[0] != count], floor) for count in counts}
    left_out = {}
    for count, other in others.items():
        measured = np.mean([value for tokens, value in points if tokens == count])
        left_out[count] = other.at(count) / float(measured) - 1
    return Fitted(law, residual, left_out, list(others.values()))

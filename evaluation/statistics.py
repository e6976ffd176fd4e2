"""Statistics of task results: confidence intervals, paired differences, and the share of the base's score kept.

All are computed from one score per question, with the same questions for every model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..records.models import AnswerKind, TaskResult

Z = 1.959964  # for a two-sided 95 % interval


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class TaskOutcome:
    """One model's result on one task."""

    kind: AnswerKind
    metric: str  # name of the scores' metric; others are in `metrics`
    scores: list[float]  # one per question, in the task's order; empty if the metric is not a mean over questions
    value: float
    n: int
    chance: float | None = None  # what guessing scores
    metrics: dict[str, float] = field(default_factory=dict)
    higher_is_better: bool = True


def mean(scores: Sequence[float]) -> float:
    return math.fsum(scores) / len(scores)


def wilson(hits: float, n: int) -> Interval:
    """Wilson's 95 % interval of a share: stays within 0 and 1, and has nonzero width even if all or none are right."""
    share, z2 = hits / n, Z * Z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives exactly 0 or 1; rounding must not change that.
    return Interval(0.0 if hits == 0 else centre - half, 1.0 if hits == n else centre + half)


def interval(scores: Sequence[float]) -> Interval:
    """The 95 % interval of a mean: Wilson's if every score is 0 or 1, else the normal one."""
    if _binary(scores):
        return wilson(sum(scores), len(scores))
    return _normal(scores)


def paired_interval(base: Sequence[float], scores: Sequence[float]) -> Interval:
    """The 95 % interval of the mean difference `scores` − `base` on the same questions.

    Binary scores: the normal interval with half a question added to each of the four cells (Agresti and Min 2005,
    doi 10.1002/sim.1781), which has nonzero width even if the two models never differ. Other scores: the normal one.
    Raises `ValueError` if the numbers of questions differ.
    """
    if len(base) != len(scores):
        raise ValueError(f"{len(base)} and {len(scores)} scores cannot be paired")
    if not (_binary(base) and _binary(scores)):
        return _normal([b - a for a, b in zip(base, scores, strict=True)])
    won = sum(b > a for a, b in zip(base, scores, strict=True)) + 0.5
    lost = sum(b < a for a, b in zip(base, scores, strict=True)) + 0.5
    n = len(base) + 2
    centre = (won - lost) / n
    half = Z * math.sqrt(won + lost - (won - lost) ** 2 / n) / n
    return Interval(max(-1.0, centre - half), min(1.0, centre + half))


def clustered_interval(groups: Sequence[Sequence[float]]) -> Interval:
    """The 95 % interval of the mean over all values, which come in groups of neighbours that resemble each other.

    Groups vary independently, values within one need not: the linearised variance of a ratio of totals over groups.
    Infinite for fewer than two groups.
    """
    count, n = len(groups), sum(map(len, groups))
    centre = math.fsum(value for group in groups for value in group) / n
    off = [math.fsum(group) - centre * len(group) for group in groups]
    if count < 2:
        return Interval(-math.inf, math.inf)
    half = Z * math.sqrt(math.fsum(value * value for value in off) * count / (count - 1)) / n
    return Interval(centre - half, centre + half)


def _binary(scores: Sequence[float]) -> bool:
    return all(score in (0, 1) for score in scores)


def _normal(scores: Sequence[float]) -> Interval:
    n, centre = len(scores), mean(scores)
    spread = math.fsum((s - centre) ** 2 for s in scores)
    half = Z * math.sqrt(spread / (n - 1) / n) if n > 1 else math.inf
    return Interval(centre - half, centre + half)


def kept_above_chance(value: float, base: TaskOutcome) -> float | None:
    """(value − chance) / (base − chance); None if the base itself may be guessing."""
    if base.chance is None or not base.scores or interval(base.scores).low <= base.chance:
        return None
    return (value - base.chance) / (base.value - base.chance)


def compare(outcome: TaskOutcome, base: TaskOutcome | None) -> TaskResult:
    """The report's figures: the value with its interval, the paired difference to the base, and the share kept.

    `base` is None for the base itself, and if there is none.
    """
    result = TaskResult(
        kind=outcome.kind,
        metric=outcome.metric,
        value=outcome.value,
        n=outcome.n,
        chance=outcome.chance,
        metrics=outcome.metrics,
    )
    if outcome.scores:
        result.low, result.high = _finite(interval(outcome.scores))
    if base is None:
        return result
    result.difference = outcome.value - base.value
    if outcome.scores and base.scores:
        result.difference_low, result.difference_high = _finite(paired_interval(base.scores, outcome.scores))
    if outcome.higher_is_better:
        result.kept = outcome.value / base.value if base.value > 0 else None
        result.kept_above_chance = kept_above_chance(outcome.value, base)
    return result


def _finite(found: Interval) -> tuple[float | None, float | None]:
    """The interval, or (None, None) for the infinite one of a single non-binary score: JSON has no infinity."""
    return (found.low, found.high) if math.isfinite(found.high - found.low) else (None, None)

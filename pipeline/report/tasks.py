"""Task results as lines of a table: one per task and model, generation after multiple choice, never averaged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...records.models import ModelEntry, TaskResult

KINDS = ("choice", "other", "generation")


@dataclass(frozen=True)
class TaskLine:
    """One model's result on one task."""

    task: str
    role: str
    result: TaskResult
    first: bool  # of its task

    @property
    def score(self) -> str:
        return _number(self.result.value, self.result)

    @property
    def interval(self) -> str:
        return _range(self.result.low, self.result.high, self.result)

    @property
    def difference(self) -> str:
        """The paired difference to the base, in points, with its interval."""
        r = self.result
        if r.difference is None:
            return "–"
        span = _range(r.difference_low, r.difference_high, r, signed=True)
        return f"{_number(r.difference, r, signed=True)}" + (f" ({span})" if span != "–" else "")

    @property
    def kept(self) -> str:
        return _percent(self.result.kept)

    @property
    def kept_above_chance(self) -> str:
        return _percent(self.result.kept_above_chance)

    @property
    def title(self) -> str:
        """Name, metric, questions and what guessing scores."""
        r = self.result
        chance = "" if not r.chance else f", chance {_percent(r.chance)}"
        return f"{self.task}: {r.metric}, {r.n} questions{chance}"


def task_lines(models: Sequence[ModelEntry]) -> list[TaskLine]:
    """All results, grouped by task; tasks whose answers are written come last."""
    results = {name: result for model in models for name, result in model.tasks.items()}
    names = sorted(results, key=lambda name: KINDS.index(results[name].kind))  # stable: in the recipe's order
    lines = []
    for name in names:
        found = [(model.role, model.tasks[name]) for model in models if name in model.tasks]
        lines += [TaskLine(name, role, result, i == 0) for i, (role, result) in enumerate(found)]
    return lines


def _share(result: TaskResult) -> bool:
    """Whether the figure is a share of questions, shown in percent."""
    return 0 <= result.value <= 1 and (result.low is None or result.high is None or 0 <= result.low <= result.high <= 1)


def _number(value: float, result: TaskResult, signed: bool = False) -> str:
    if _share(result):
        return f"{100 * value:+.1f}" if signed else _percent(value)
    return f"{value:+.4g}" if signed else f"{value:.4g}"


def _range(low: float | None, high: float | None, result: TaskResult, signed: bool = False) -> str:
    if low is None or high is None:
        return "–"
    if not _share(result):
        return f"{low:+.1f} to {high:+.1f}" if signed else f"{low:.1f} to {high:.1f}"
    form = "+.0f" if signed else ".0f"  # intervals are several points wide
    return f"{100 * low:{form}} to {100 * high:{form}}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"

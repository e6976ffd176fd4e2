"""One student to train: its settings, its share of the rows and its folders."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..core.errors import UserError
from ..core.files import read_json, write_json
from ..core.stage import Context
from ..records.students import StudentFigures
from .config import TrainingConfig

ON_POLICY = "on_policy"  # the folder of answers that the student wrote
T = TypeVar("T")


@dataclass(frozen=True)
class TrainingJob:
    """One student to be trained."""

    name: str  # empty for a single student
    config: TrainingConfig  # the section with this student's overrides
    context: Context  # with this student's seed
    rows: tuple[float, float]  # its part of the training rows: from, to, as fractions
    folder: Path  # for its model and curves
    work: Path  # for checkpoints to resume from

    @property
    def label(self) -> str:
        return f"{self.name}: " if self.name else ""

    @property
    def figures(self) -> StudentFigures | None:
        """Its figures, once it is trained and saved; else None."""
        file = self.work / "done.json"
        return StudentFigures.model_validate(read_json(file)) if file.exists() else None

    def finish(self, figures: StudentFigures) -> None:
        """Record that its model is saved, so that it is not trained again, and delete what it would resume from."""
        write_json(self.work / "done.json", figures.model_dump())
        for folder in ("trainer", ON_POLICY):
            shutil.rmtree(self.work / folder, ignore_errors=True)


def share(rows: Sequence[T], job: TrainingJob) -> list[T]:
    """A job's rows; adjacent ranges neither overlap nor leave rows out."""
    start, end = (round(part * len(rows)) for part in job.rows)
    if start == end:
        raise UserError(
            f"distill.variants: {job.name} has no rows: {list(job.rows)} of {len(rows)} training rows; give it a wider "
            "range, or make more rows"
        )
    return list(rows[start:end])

"""One student that is to be trained: its settings, its share of the rows, and where it is kept."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingJob:
    """One student to be trained."""

    name: str  # empty where it is the only one
    config: TrainingConfig  # as it is for this student
    context: Context  # with its seed
    rows: tuple[float, float]  # shares of the training rows, from and to
    folder: Path  # where its model and its curves go
    work: Path  # what it resumes from

    @property
    def label(self) -> str:
        return f"{self.name}: " if self.name else ""

    @property
    def figures(self) -> StudentFigures | None:
        """Its figures once it is trained and saved; None before."""
        file = self.work / "done.json"
        return StudentFigures.model_validate(read_json(file)) if file.exists() else None

    def finish(self, figures: StudentFigures) -> None:
        """Note that its model is saved, so that it is not trained again; its checkpoints, larger than it, go."""
        write_json(self.work / "done.json", figures.model_dump())
        shutil.rmtree(self.work / "trainer", ignore_errors=True)


def share(rows: Sequence[T], job: TrainingJob) -> list[T]:
    """The rows of a job; neighbouring shares have no row in common and leave none out."""
    start, end = (round(part * len(rows)) for part in job.rows)
    if start == end:
        raise UserError(
            f"distill.variants: {job.name} has no rows: {list(job.rows)} of {len(rows)} training rows; give it a wider "
            "range, or make more rows"
        )
    return list(rows[start:end])

"""Several students from one section: what each one is, where it goes, and which of them goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..stage import WORK, Context, write_whole
from .config import DistillConfig, TrainingConfig

FILE = "variants.json"  # what a merge reads: the variants' names and figures, and how their rows were cut
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
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
    def figures(self) -> dict[str, Any] | None:
        """Its figures once it is trained and saved; None before."""
        file = self.work / "done.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def finish(self, figures: dict[str, Any]) -> None:
        """Note that its model is saved, so that it is not trained again; its checkpoints, larger than it, go."""
        write_whole(self.work / "done.json", json.dumps(figures, indent=1) + "\n")
        shutil.rmtree(self.work / "trainer", ignore_errors=True)


def plan_jobs(config: DistillConfig, out_dir: Path, context: Context) -> list[Job]:
    """A job per variant; the section itself is the only one where it has none."""
    work = out_dir / WORK
    if config.variants is None:
        return [Job("", config, context, (0.0, 1.0), out_dir, work)]
    return [
        Job(
            variant.name,
            config.of(variant),
            context if variant.seed is None else replace(context, seed=variant.seed),
            variant.rows,
            out_dir / "variants" / variant.name,
            work / variant.name,
        )
        for variant in config.variants
    ]


def share(rows: Sequence[T], job: Job) -> list[T]:
    """The rows of a job; neighbouring shares have no row in common and leave none out."""
    start, end = (round(part * len(rows)) for part in job.rows)
    if start == end:
        raise UserError(
            f"distill.variants: {job.name} has no rows: {list(job.rows)} of {len(rows)} training rows; give it a wider "
            "range, or make more rows"
        )
    return list(rows[start:end])


def choose(config: DistillConfig, figures: dict[str, dict[str, Any]]) -> str:
    """The variant with the best held-out figure at the step it kept; of two alike the first."""
    figure = "eval_perplexity" if config.select == "perplexity" else "eval_kl"
    return min(figures, key=lambda name: figures[name]["best"][figure])


def write_record(config: DistillConfig, jobs: list[Job], figures: dict[str, Any], chosen: str, out_dir: Path) -> None:
    """Write `variants.json`; without times, so that the same inputs give the same bytes."""
    variants = [
        {
            "name": job.name,
            "seed": job.context.seed,
            "rows": list(job.rows),
            **{key: value for key, value in figures[job.name].items() if not key.startswith("seconds")},
        }
        for job in jobs
    ]
    record = {"length": config.length, "batch": config.batch, "chosen": chosen, "variants": variants}
    write_whole(out_dir / FILE, json.dumps(record, indent=1) + "\n")

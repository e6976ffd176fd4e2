"""The distill stage: trains the pruned model against the unpruned one, and keeps the best student's best checkpoint."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.stage import WORK, Context, Inputs
from ..modeling.checkpoint import link_files
from ..records.curves import CURVES
from ..records.figures import DistillFigures
from ..records.students import LocalFigures, StudentFigures
from ..training.run import check, train_students
from .config import DistillConfig
from .local import localized
from .variants import choose, plan_jobs, write_record

if TYPE_CHECKING:
    from ..training.rounded import Rounder

__all__ = ["check", "run"]


def run(config: DistillConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/` (the recovered checkpoint) and `curves.jsonl` (a line per step and per measurement).

    With variants each has these two in `variants/NAME/`, the best one's are here as well, and `variants.json` has the
    figures of all. A finished variant is not trained again. With `local` all start from what that phase has made.
    Several processes train together; rank 0 writes.
    """
    inputs, local = localized(config, inputs, out_dir, context)
    jobs = plan_jobs(config, out_dir, context)
    pending = context.group.share([job.name for job in jobs if job.figures is None])
    if pending:
        own = [job for job in jobs if job.name in pending]
        train_students(config, own, inputs, context, partial(_rounder, inputs, out_dir / WORK, context))
    if context.rank:
        return {}
    figures = {job.name: figures for job in jobs if (figures := job.figures) is not None}
    if config.variants is None:
        return _record(figures[""], local=local)
    chosen = choose(config, {name: entry.best for name, entry in figures.items()})
    link_files(out_dir / "variants" / chosen / "model", out_dir / "model")
    shutil.copyfile(out_dir / "variants" / chosen / CURVES, out_dir / CURVES)
    write_record(config, jobs, figures, chosen, out_dir)
    context.progress.note(f"selected variant: {chosen} of {len(jobs)}")
    seconds = round(sum(entry.seconds_training for entry in figures.values()), 1)
    return _record(figures[chosen], local=local, seconds_training=seconds, chosen=chosen, variants=figures)


def _record(figures: StudentFigures, *, local: list[LocalFigures], **beside: Any) -> dict[str, Any]:
    phase = {"local": local} if local else {}
    return DistillFigures.model_validate(figures.model_dump() | phase | beside).model_dump()


def _rounder(inputs: Inputs, work: Path, context: Context, kind: str) -> Rounder:
    """How the export rounds the student's weights as an exported type."""
    from ..export.rounding import weight_rounder

    return weight_rounder(inputs, work, context, kind)

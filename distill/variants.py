"""Several students from one section: their settings, their folders, and the choice of the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..core.stage import WORK, Context
from ..records.students import HeldOutFigures, StudentFigures, VariantFigures, Variants
from ..training.job import TrainingJob
from .config import DistillConfig


def plan_jobs(config: DistillConfig, out_dir: Path, context: Context) -> list[TrainingJob]:
    """A job per variant; without variants a single job, the section itself."""
    work = out_dir / WORK
    if config.variants is None:
        return [TrainingJob("", config, context, (0.0, 1.0), out_dir, work)]
    return [
        TrainingJob(
            variant.name,
            config.of(variant),
            context if variant.seed is None else replace(context, seed=variant.seed),
            variant.rows,
            out_dir / "variants" / variant.name,
            work / variant.name,
        )
        for variant in config.variants
    ]


def choose(config: DistillConfig, best: dict[str, HeldOutFigures]) -> str:
    """The variant whose kept checkpoint has the best held-out figure; of equals the first."""
    key = "eval_perplexity" if config.select == "perplexity" else "eval_kl"
    return min(best, key=lambda name: getattr(best[name], key))


def write_record(
    config: DistillConfig, jobs: list[TrainingJob], figures: dict[str, StudentFigures], chosen: str, out_dir: Path
) -> None:
    """Write `variants.json`. It holds no times, so that the same inputs give the same bytes."""
    variants = [
        VariantFigures(
            name=job.name,
            seed=job.context.seed,
            rows=job.rows,
            **figures[job.name].model_dump(exclude={"seconds_training"}),
        )
        for job in jobs
    ]
    Variants(length=config.length, batch=config.batch, chosen=chosen, variants=variants).write(out_dir)

"""Several students from one section: what each one is, where it goes, and which of them goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.files import write_whole
from ..core.stage import WORK, Context
from ..training.job import TrainingJob
from .config import DistillConfig

FILE = "variants.json"  # what a merge reads: the variants' names and figures, and how their rows were cut


def plan_jobs(config: DistillConfig, out_dir: Path, context: Context) -> list[TrainingJob]:
    """A job per variant; the section itself is the only one where it has none."""
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


def choose(config: DistillConfig, figures: dict[str, dict[str, Any]]) -> str:
    """The variant with the best held-out figure at the step it kept; of two alike the first."""
    figure = "eval_perplexity" if config.select == "perplexity" else "eval_kl"
    return min(figures, key=lambda name: figures[name]["best"][figure])


def write_record(
    config: DistillConfig, jobs: list[TrainingJob], figures: dict[str, Any], chosen: str, out_dir: Path
) -> None:
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

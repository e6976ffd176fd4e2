"""The sort stage: trains all depths together; the checkpoint records which depths it runs at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.stage import WORK, Context, Inputs, check_deepest
from ..modeling.load import load_config
from ..records.figures import SortFigures
from ..training.job import TrainingJob
from ..training.run import check as check_training
from ..training.run import train_students
from .config import SortConfig


def check(config: SortConfig, base: Path, context: Context) -> None:
    """The distill stage's checks; also reject more blocks than the unpruned model has, before any work is done."""
    check_training(config, base, context)
    blocks = load_config(base).num_hidden_layers
    if config.depths[-1] > blocks:
        raise UserError(f"sort.depths: {config.depths[-1]} blocks are asked for, but the unpruned model has {blocks}")


def run(config: SortConfig, inputs: Inputs, out_dir: Path, context: Context) -> dict[str, Any]:
    """Write `model/` (a checkpoint that runs at every depth) and `curves.jsonl` (a line per step and per measurement,
    with each depth's figures)."""
    check_deepest("sort.depths", config.depths, load_config(inputs.model).num_hidden_layers, "the model that is sorted")
    job = TrainingJob("", config, context, (0.0, 1.0), out_dir, out_dir / WORK)
    if context.group.share(job.figures is None):
        train_students(config, [job], inputs, context)
    figures = job.figures
    if context.rank or figures is None:
        return {}
    return SortFigures(depths=config.depths, **figures.model_dump()).model_dump()

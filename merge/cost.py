"""Cost of merging the variants and of measuring them."""

from __future__ import annotations

from dataclasses import replace

from ..core.cost import BYTES, Need, Setting, StageCost, worst
from ..core.work import Work, forward
from .config import MergeConfig

RUNTIME = 612e6  # measured with a tiny model on Linux, torch 2.13 for CPUs
SHARD = 5_000_000_000  # bytes of merged weights per file; a whole file is held in memory
CHUNK = 256  # positions per logits chunk when models are measured
CONTEXT = 512  # assumed: context length of a held-out token


def _leaves(config: MergeConfig, at: Setting) -> Setting:
    return replace(at, measured=(*at.measured, at.kept))


def _need(config: MergeConfig, at: Setting) -> Need:
    """One shard of merged weights and its input tensors; then the models, measured one at a time."""
    shape, runtime = at.shape, {"runtime": at.runtime(RUNTIME)}
    saved = shape.parameters(at.kept) * BYTES[config.out_dtype or at.dtype]
    head = shape.vocab * shape.hidden
    merging = runtime | {"weights": min(saved, SHARD), "other": 4 * head * BYTES[config.dtype]}
    measuring = runtime | {"weights": at.small, "teacher": head * at.size}
    unpruned = runtime | {"weights": at.whole}
    return Need(worst(merging, measuring, unpruned), saved, f"{config.method}, then measured")


def _work(config: MergeConfig, at: Setting) -> Work | None:
    """Reading all models and writing one; then the unpruned model, the variants and their merge on held-out rows."""
    if at.rows is None:
        return None
    held = at.rows.tokens * at.rows.heldout
    measured = forward(at.shape, at.shape.blocks, held, CONTEXT)
    measured += (at.variants + 1) * forward(at.shape, at.kept, held, CONTEXT)
    return Work(measured, host_read=(2 * at.variants + 2) * at.small)


COST = StageCost[MergeConfig](_need, _work, _leaves)

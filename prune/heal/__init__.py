"""Closing the gaps that dropped blocks leave, one way per file; the file's name is its name in the recipe.

A way to heal is a function `fit(gap, config) -> (values, record)`: new values for parameters of kept blocks, so that
the residual stream behind the gap is what it was in the unpruned model. The healed model has the architecture it had,
and costs nothing more. Several gaps are healed upstream first, each behind the healed ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from ...core.errors import UserError
from ...core.stage import Progress
from ...data.packing import Batch
from ...modeling.blocks import Decoder, replaced
from ...records.importance import Healing
from ..config import HealConfig
from ..cuts import gaps
from .stream import Gap, Values


@torch.no_grad()
def heal(
    model: Any, dropped: Sequence[int], batches: Sequence[Batch], config: HealConfig, progress: Progress | None = None
) -> list[Healing]:
    """Change the blocks around each gap of the *unpruned* model so that the pruned one follows it.

    The blocks themselves are dropped by the caller afterwards. Without dropped blocks nothing is touched. Raises
    `UserError` where there is no block before a gap, or where the last block goes.
    """
    values, report = fit_gaps(model, dropped, batches, config, progress or Progress())
    for parameter, value in values.items():
        parameter.copy_(value.to(parameter))
    return report


@torch.no_grad()
def fit_gaps(
    model: Any, dropped: Sequence[int], batches: Sequence[Batch], config: HealConfig, progress: Progress
) -> tuple[Values, list[Healing]]:
    """What `heal` changes, for `modeling.blocks.replaced`; the model is left as it is."""
    decoder, runs = Decoder(model), gaps(dropped)
    if config.kind == "none" or not runs:
        return {}, []
    if runs[0][0] == 0 or runs[-1][1] == decoder.num_blocks - 1:
        raise UserError(f"heal: {config.kind} needs a kept block before each gap, and the last block must stay")
    way = importlib.import_module(f".{config.kind}", __package__)
    values: Values = {}
    report: list[Healing] = []
    scale = 1.0
    for number, (first, last) in enumerate(runs, start=1):
        upstream = [block for block in dropped if block < first]
        kept = [block for block in range(last + 1, decoder.num_blocks) if block not in set(dropped)]
        label = f"healing gap {number} of {len(runs)}"
        with progress.bar(label) as advance, replaced(values) as original:
            gap = Gap(decoder, first, last, upstream, kept, original, scale, list(batches), config.held_out, advance)
            new, record = way.fit(gap, config)
        values.update(new)
        report.append(record)
        scale *= record.scale
    return values, report

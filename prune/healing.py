"""Heals the gaps of a cut from the first to the last, each with the gaps before it healed, by a heal of prune/heals."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..core.errors import UserError
from ..core.stage import Progress
from ..data.packing import Batch
from ..modeling.blocks import Decoder, replaced
from ..modeling.cuts import gaps
from ..modeling.types import CausalModel
from ..records.importance import Healing
from .heals import HELD_OUT, Heal, LeastSquares
from .stream import Gap, Values


@torch.no_grad()
def heal(
    model: CausalModel, dropped: Sequence[int], batches: Sequence[Batch], config: Heal, progress: Progress | None = None
) -> list[Healing]:
    """Change the blocks around each gap of the *unpruned* model so that the pruned one follows it.

    The caller drops the blocks afterwards. Without dropped blocks nothing changes. Raises `UserError` if there is no
    block before a gap, or if the last block is dropped.
    """
    values, report = fit_gaps(model, dropped, batches, config, progress or Progress())
    for parameter, value in values.items():
        parameter.copy_(value.to(parameter))
    return report


@torch.no_grad()
def fit_gaps(
    model: CausalModel, dropped: Sequence[int], batches: Sequence[Batch], config: Heal, progress: Progress
) -> tuple[Values, list[Healing]]:
    """The values that `heal` sets, for `modeling.blocks.replaced`; the model is left unchanged."""
    decoder, runs = Decoder(model), gaps(dropped)
    if config.kind == "none" or not runs:
        return {}, []
    if runs[0][0] == 0 or runs[-1][1] == decoder.num_blocks - 1:
        raise UserError(f"heal: {config.kind} needs a kept block before each gap, and the last block must stay")
    values: Values = {}
    report: list[Healing] = []
    scale = 1.0
    held_out = config.held_out if isinstance(config, LeastSquares) else HELD_OUT
    for number, (first, last) in enumerate(runs, start=1):
        upstream = [block for block in dropped if block < first]
        kept = [block for block in range(last + 1, decoder.num_blocks) if block not in set(dropped)]
        label = f"healing gap {number} of {len(runs)}"
        with progress.bar(label) as advance, replaced(values) as original:
            gap = Gap(decoder, first, last, upstream, kept, original, scale, list(batches), held_out, advance)
            new, record = config.fit(gap)
        values.update(new)
        report.append(record)
        scale *= record.scale
    return values, report

"""Rows in which a text is repeated, to find cuts that can no longer copy from the context.

A model that has lost its induction heads (arXiv 2209.11895) still writes fluent text: perplexity and KL on ordinary
rows hardly notice, but answers that quote the prompt fail. In the repeated half of these rows the unpruned model
predicts every token with near certainty; a cut that cannot copy does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .packing import Batch


def read_twice(batches: Sequence[Batch], share: float) -> list[Batch]:
    """Batches in which the given share of packed rows, evenly spread, has the second half of each segment replaced by
    its first half. The last token of a segment of odd length stays."""
    repeated, number = [], 0
    for batch in batches:
        ids = batch.input_ids.clone()
        for row, segments in enumerate(batch.segment_ids):
            number += 1
            if int(number * share) == int((number - 1) * share):
                continue
            for places in _segments(segments):
                half = len(places) // 2
                ids[row, places[half : 2 * half]] = ids[row, places[:half]]
        repeated.append(replace(batch, input_ids=ids))
    return repeated


def repeated_halves(batch: Batch) -> Tensor:
    """(B, T) bool: the second half of each segment, which `read_twice` fills with the first."""
    mask = torch.zeros_like(batch.loss_mask)
    for row, segments in enumerate(batch.segment_ids):
        for places in _segments(segments):
            half = len(places) // 2
            mask[row, places[half : 2 * half]] = True
    return mask


def _segments(segments: Tensor) -> Iterator[Tensor]:
    """The places (n,) of each segment of a packed row."""
    for segment in range(int(segments.max()) + 1):
        yield (segments == segment).nonzero().flatten()

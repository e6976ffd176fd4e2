"""Rows in which a text is repeated, to find cuts that can no longer copy from the context.

A model that has lost its induction heads (arXiv 2209.11895) still writes fluent text: perplexity and KL on ordinary
rows hardly notice, but answers that quote the prompt fail. In the repeated half of these rows the unpruned model
predicts every token with near certainty; a cut that cannot copy does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..data.packing import Batch


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
            for segment in range(int(segments.max()) + 1):
                places = (segments == segment).nonzero().flatten()
                half = len(places) // 2
                ids[row, places[half : 2 * half]] = ids[row, places[:half]]
        repeated.append(replace(batch, input_ids=ids))
    return repeated

"""Rows in which a text stands twice.

A model that has lost the heads which find what came before and go on from there (arXiv 2209.11895) still writes fluent
text: perplexity and KL on ordinary rows hardly see it, answers that repeat something from their prompt fail. In the
second half of these rows the unpruned model is all but certain of every token, and a cut that cannot copy is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..data.packing import Batch


def read_twice(batches: Sequence[Batch], share: float) -> list[Batch]:
    """Batches in which that share of the packed rows, spread evenly, has in place of the second half of each of its
    segments the first half once more. An odd segment's last token stays."""
    found, number = [], 0
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
        found.append(replace(batch, input_ids=ids))
    return found

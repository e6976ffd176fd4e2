"""Real text and drills beside a source's own rows: as many tokens as the weight says, and one order of all rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..core.errors import UserError
from ..modeling.types import ModelTokenizer
from ..records.figures import SourceShare
from .config import WrittenConfig
from .cost import own_rows_of
from .prose import ProseReader, ProseSource, learned
from .rows import Row


def goals(rows: Sequence[Row], weight: float) -> tuple[int, int]:
    """Tokens to learn and to hold out beside these rows; at least one of each."""
    sums: Counter[str] = Counter()
    for row in rows:
        sums[row.split] += row.targets
    return max(1, round(weight * sums["train"])), max(1, round(weight * sums["heldout"]))


def check_enough(
    config: WrittenConfig, source: ProseSource, weight: float, tokenizer: ModelTokenizer, cache: Path
) -> None:
    """Reject a text that would be too short beside rows of the greatest length, before these are written."""
    most = own_rows_of(config)
    if most is None:
        return
    needed, there = math.ceil(weight * (most.learned + most.targets + most.count)), 0
    for documents, text in enumerate(ProseReader(source, cache).documents(), start=1):
        there += learned(tokenizer, text, config.length)
        if there >= needed and documents > 1:
            return
    raise UserError(
        f"{source.where}.path: {source.title} has {there} tokens, but up to {needed}, in two or more documents, are "
        f"needed beside {most.count} rows at weight {weight:g}: name more text, or lower {source.where}.weight"
    )


def interleaved(*sources: Sequence[Row]) -> list[Row]:
    """All rows in one order, numbered anew, so that any part of a split has about the same share of every source."""
    ranked = [entry for number, rows in enumerate(sources) for entry in _ranked(rows, number)]
    ranked.sort(key=lambda entry: entry[:2])
    return [replace(row, id=id) for id, (_, _, row) in enumerate(ranked)]


def _ranked(rows: Sequence[Row], number: int) -> list[tuple[float, int, Row]]:
    """Rows with the share of their split's tokens to learn that they are at."""
    totals: Counter[str] = Counter()
    for row in rows:
        totals[row.split] += row.targets
    done: Counter[str] = Counter()
    ranked = []
    for row in rows:
        ranked.append(((done[row.split] + row.targets / 2) / max(totals[row.split], 1), number, row))
        done[row.split] += row.targets
    return ranked


def shares(sources: Mapping[str, Sequence[Row]]) -> dict[str, SourceShare]:
    """Rows and tokens of each source, by its title."""
    everything = sum(row.targets for rows in sources.values() for row in rows if row.split == "train")
    return {title: _share(rows, everything) for title, rows in sources.items()}


def _share(rows: Sequence[Row], everything: int) -> SourceShare:
    sums = {split: sum(row.targets for row in rows if row.split == split) for split in ("train", "heldout")}
    return SourceShare(
        rows=len(rows),
        learned=sums["train"],
        heldout=sums["heldout"],
        share=round(sums["train"] / max(everything, 1), 4),
    )

"""Rows written by a model: sampled batch by batch, and saved as soon as they are sampled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.stage import Context
from ..modeling.load import load_config
from ..modeling.types import ModelTokenizer
from .config import MagpieConfig, TextsConfig
from .parts import in_rounds
from .writing import Writer

KEPT = "kept"


@dataclass(frozen=True)
class Draft:
    """One sampled row, as stored in a part file."""

    id: int
    seed: int
    status: str  # KEPT, or why it was dropped
    prompt: str = ""  # empty for plain text
    answer: str = ""
    drawn: int = 0  # number of tokens sampled for it
    cut: bool = False  # kept although the answer was cut off


class Drafts:
    """Samples rows batch by batch. Batch k holds rows k·B … k·B + B − 1 and depends on no other batch, so several
    processes can sample in parallel and a killed run resumes at its unfinished batches."""

    def __init__(
        self, config: MagpieConfig | TextsConfig, base: Path, tokenizer: ModelTokenizer, context: Context, work: Path
    ):
        self.config, self.tokenizer, self.seed = config, tokenizer, context.seed
        self.parts, self.group = work / "parts", context.group
        # Tokenizers may list special tokens that the model has no logit for.
        self.vocab_size = int(load_config(base).vocab_size)
        self.writer = Writer(config.engine, base, self.longest(), config.batch, context)

    def longest(self) -> int:
        """Maximum tokens of a text, prompt included."""
        raise NotImplementedError

    def draw(self, ids: range) -> list[Draft]:
        """The rows with these ids. Later duplicates are marked as such where that saves work."""
        raise NotImplementedError

    def identity(self, draft: Draft) -> str:
        """A key that no two kept rows may share."""
        raise NotImplementedError

    def batches(self) -> Iterator[list[Draft]]:
        """All batches up to the limit on attempts, from all processes; a batch with a part file is read from it. Rows
        that repeat an earlier one are marked as duplicates."""
        count = math.ceil(self.config.rows * self.config.max_attempts / self.config.batch)
        seen: set[str] = set()
        for records in in_rounds(self.parts, count, self.group, self._batch):
            drafts = []
            for draft in (Draft(**record) for record in records):
                known = self.identity(draft) in seen
                drafts.append(replace(draft, status="duplicate") if known and draft.status == KEPT else draft)
                seen.add(self.identity(draft))
            yield drafts

    def _batch(self, number: int) -> list[dict[str, Any]]:
        size = self.config.batch
        return [asdict(draft) for draft in self.draw(range(number * size, (number + 1) * size))]


def draw_rows(drawer: Drafts, context: Context, hint: str) -> tuple[list[Draft], Counter[str]]:
    """The first `rows` usable rows, and counts of dropped rows by reason. Both cover only the drafts up to the last row
    kept, so they do not depend on what else its batch contained.

    Raises `UserError` with the hint if hardly any row is usable; fewer rows than requested are noted.
    """
    target = drawer.config.rows
    kept: list[Draft] = []
    counts: Counter[str] = Counter()
    with context.progress.bar("self-data", target) as advance:
        for drafts in drawer.batches():
            before = len(kept)
            for draft in drafts:
                if len(kept) < target:
                    counts[draft.status] += 1
                    kept += [draft] if draft.status == KEPT else []
            advance(len(kept) - before, f"{sum(counts.values())} drawn")
            if len(kept) == target:
                break
    dropped = reasons(counts)
    if len(kept) < max(2, target // 10):
        raise UserError(f"only {len(kept)} of {sum(counts.values())} generated rows are usable ({dropped}); {hint}")
    if len(kept) < target:
        context.progress.note(f"{len(kept)} rows instead of {target} after data.max_attempts ({dropped})")
    elif dropped:
        context.progress.note(dropped_note(counts))
    return kept, counts


def reasons(counts: Mapping[str, int]) -> str:
    """Why rows were dropped, most frequent reason first, at most ten: "3 too_long, 1 empty"."""
    ranked = sorted(((-n, reason) for reason, n in counts.items() if reason != KEPT and n))
    rest = sum(-n for n, _ in ranked[10:])
    return ", ".join([f"{-n} {reason}" for n, reason in ranked[:10]] + ([f"{rest} for other reasons"] if rest else []))


def dropped_note(counts: Mapping[str, int]) -> str:
    """How many rows were dropped and why; empty if none were."""
    total = sum(counts.values())
    return f"{total - counts.get(KEPT, 0)} of {total} rows dropped ({reasons(counts)})" if reasons(counts) else ""


def normalised(prompt: str) -> str:
    """A key that two prompts share if they differ only in case, spacing and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in prompt.casefold()).split()) or prompt.strip()

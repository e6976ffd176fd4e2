"""Rows a model writes, drawn batch by batch, written down as they are drawn."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..stage import Context
from .config import MagpieConfig, TextsConfig

KEPT = "kept"


@dataclass(frozen=True)
class Draft:
    """One drawn row, as a part file holds it."""

    id: int
    seed: int
    status: str  # KEPT, or why it was dropped
    prompt: str = ""  # empty for plain text
    answer: str = ""
    drawn: int = 0  # tokens sampled for it
    cut: bool = False  # kept although the answer was cut off


class Drafts:
    """Draws rows batch by batch. Batch k holds rows k·B … k·B + B − 1 and is written, whole, to a part file of its
    own, so that a run that was killed goes on with the batch it was in and ends with the same rows."""

    def __init__(self, config: MagpieConfig | TextsConfig, model: Any, tokenizer: Any, context: Context, work: Path):
        self.config, self.model, self.tokenizer, self.seed = config, model, tokenizer, context.seed
        self.parts = work / "parts"
        self.parts.mkdir(parents=True, exist_ok=True)
        self.seen: set[str] = set()  # what `identity` said of the rows so far
        self.seconds = 0.0
        self.sampled = 0  # tokens drawn in this process

    def draw(self, ids: range) -> list[Draft]:
        """The rows of these numbers."""
        raise NotImplementedError

    def identity(self, draft: Draft) -> str:
        """What two rows must not have in common."""
        raise NotImplementedError

    def batches(self) -> Iterator[list[Draft]]:
        """All batches up to the cap on attempts; those whose part file is there are read."""
        size = self.config.batch
        for number in range(math.ceil(self.config.rows * self.config.max_attempts / size)):
            path = self.parts / f"{number:05d}.jsonl"
            if path.exists():
                drafts = [Draft(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
            else:
                begun = time.perf_counter()
                drafts = self.draw(range(number * size, (number + 1) * size))
                self.sampled += sum(draft.drawn for draft in drafts)
                self.seconds += time.perf_counter() - begun
                write_part(path, map(asdict, drafts))
            self.seen.update(self.identity(draft) for draft in drafts)
            yield drafts


def draw_rows(drawer: Drafts, context: Context, hint: str) -> tuple[list[Draft], Counter[str]]:
    """The first `rows` rows kept, and how many were dropped for which reason; both by the drafts up to the last row
    kept, so that they say the same whatever the batch had in store.

    Raises `UserError`, with the hint, when hardly any row is usable; fewer than asked for are noted.
    """
    wanted = drawer.config.rows
    kept: list[Draft] = []
    counts: Counter[str] = Counter()
    with context.progress.bar("self-data", wanted) as advance:
        for drafts in drawer.batches():
            before = len(kept)
            for draft in drafts:
                if len(kept) < wanted:
                    counts[draft.status] += 1
                    kept += [draft] if draft.status == KEPT else []
            advance(len(kept) - before, f"{sum(counts.values())} drawn")
            if len(kept) == wanted:
                break
    dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()) if reason != KEPT)
    if len(kept) < max(2, wanted // 10):
        raise UserError(f"of {sum(counts.values())} rows the model wrote, {len(kept)} are usable ({dropped}); {hint}")
    if len(kept) < wanted:
        context.progress.note(f"{len(kept)} rows instead of {wanted} after data.max_attempts ({dropped})")
    return kept, counts


def normalised(prompt: str) -> str:
    """What two prompts have in common that are the same but for case, spacing and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in prompt.casefold()).split()) or prompt.strip()


def write_part(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

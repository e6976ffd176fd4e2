"""Measurements of the unpruned model that metrics and searches share; each is made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.files import write_whole
from ..core.stage import Progress
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.cuts import Cut, cut
from ..modeling.types import CausalModel
from ..records.importance import SearchNotes
from .importance import Distances, scan
from .moments import Moments
from .scoring import Measure, Scorer


class Study:
    """Measurements of a model's blocks, computed when first asked for.

    `batches` are all calibration rows (for hidden-state metrics and healing statistics), `scoring` the rows that cuts
    are scored on, `held_out` rows that are in neither.
    """

    def __init__(
        self,
        model: CausalModel,
        batches: Sequence[Batch],
        *,
        scoring: Sequence[Batch] | None = None,
        held_out: Sequence[Batch] = (),
        position: str = "all",
        longest: int | None = None,
        ledger: Path | None = None,
        progress: Progress | None = None,
    ):
        self.decoder = Decoder(model)
        self.batches, self.held_out, self.position = list(batches), list(held_out), position
        self.scoring = self.batches if scoring is None else list(scoring)
        self.longest = longest  # longest gap to gather statistics for; None: as long as the search needs
        self.progress = progress or Progress()
        self.notes: SearchNotes = {}  # what the search records for importance.json
        self._known: dict[Any, Any] = {}
        self._ledger = ledger
        self._recorded = read_ledger(ledger) if ledger is not None else {}

    @property
    def num_blocks(self) -> int:
        return self.decoder.num_blocks

    @cached_property
    def distances(self) -> dict[str, Distances]:
        """Distances between all pairs of block boundaries, over all tokens ("all") and each row's last ("last")."""
        with self.progress.bar("importance", sum(batch.tokens for batch in self.batches)) as advance:
            return scan(self.decoder.model, self.batches, advance)

    def moments(self, longest: int, ridges: Sequence[float], toward: str) -> Moments:
        """Statistics for healing any gap of up to `longest` blocks, gathered in one pass."""

        def gather() -> Moments:
            with self.progress.bar("healing statistics", sum(batch.tokens for batch in self.batches)) as advance:
                return Moments(self.decoder, self.batches, longest, ridges, toward, advance)

        return self.remember(("moments", longest, tuple(ridges), toward), gather)

    def scorer(self, measure: Measure, moments: Moments | None = None, *, held_out: bool = False) -> Scorer:
        """The scorer of cuts on the scoring rows, or on the held-out rows."""
        rows = self.held_out if held_out else self.scoring
        return self.remember(
            ("scorer", measure, moments, held_out), lambda: Scorer(self.decoder, rows, measure, moments)
        )

    def removal(self, measure: Measure, length: int) -> list[float]:
        """The measure without blocks i … i + length − 1, unhealed, for every first block i."""

        if length == self.num_blocks:
            return [float("inf")]

        def score() -> list[float]:
            windows: list[Cut] = [cut(range(first, first + length)) for first in range(self.num_blocks - length + 1)]
            with self.progress.bar(f"{measure} of removals", len(windows)) as advance:
                scores = self.scorer(measure).score(windows, advance=advance)
            return [score.perplexity if measure == "perplexity" else score.mean for score in scores.values()]

        return self.recorded(f"{measure} of every {length} blocks", score)

    def remember(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value of `compute`, called the first time that `key` is asked for."""
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def recorded(self, key: str, compute: Callable[[], Any]) -> Any:
        """As `remember`, for JSON values, and written to the ledger at once: a killed search resumes from it."""
        if key not in self._recorded:
            value = compute()
            if self._ledger is not None:
                self._ledger.parent.mkdir(exist_ok=True)
                with self._ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, value]) + "\n")
            self._recorded[key] = value
        return self._recorded[key]


def read_ledger(file: Path) -> dict[str, Any]:
    """The ledger's values by key; a last line that a kill cut short is removed from the file."""
    if not file.exists():
        return {}
    whole, _, rest = file.read_text(encoding="utf-8").rpartition("\n")
    if rest:
        write_whole(file, whole + "\n" if whole else "")
    return dict(json.loads(line) for line in whole.split("\n") if line)

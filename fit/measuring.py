"""Candidates as they will run: built, scored on the held-out windows in stock llama.cpp, timed in a process of their
own, and deleted again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..evaluation.language import engine_divergences
from ..export.gguf import write_gguf
from ..modeling.cuts import Cut
from ..records.fit import FitFigures
from ..runtime.llamacpp_engine import LlamaCppEngine
from ..runtime.measure import Measurement, measure
from .candidates import Combination
from .damage import Damage, listed
from .request import FitRequest

REPEAT = 2


class CandidateBench:
    """Builds and measures a candidate; `name` is the model's in its file."""

    def __init__(self, damage: Damage, request: FitRequest, name: str):
        self.damage, self.request, self.name = damage, request, name

    def measure(self, candidate: Combination, cut: Cut) -> dict[str, Any]:
        """Figures of a candidate, its KL at every position, and its seconds per token on this machine."""
        with self._file(candidate, cut) as file:
            values = self._score(file, candidate.cache, candidate.name)
            found = self._time(file, candidate.cache)
            size = file.stat().st_size
        figures = FitFigures(
            kl=max(statistics.fmean(values), 0.0),
            bytes=size,
            memory=found.peak_memory_bytes,
            latency=1 / found.speed.decode_tokens_per_second,
            prefill=1 / found.speed.prefill_tokens_per_second,
        )
        return {"figures": figures.model_dump(), "kl": [round(value, 6) for value in values]}

    @contextmanager
    def _file(self, candidate: Combination, cut: Cut) -> Iterator[Path]:
        checkpoint = self.damage.checkpoint(cut)
        file = self.damage.area / "candidate.gguf"
        how, progress = self.damage.types(checkpoint, candidate.mix), self.damage.context.progress
        write_gguf(
            checkpoint, file, how.mix, imatrix=how.importance, types=how.types, name=self.name, progress=progress
        )
        try:
            yield file
        finally:
            file.unlink(missing_ok=True)

    def _score(self, file: Path, cache: str, label: str) -> list[float]:
        damage = self.damage
        longest = max(len(row.input_ids) for row in damage.held_out)
        with (
            LlamaCppEngine(file, context=longest, kv_type=cache) as engine,
            damage.context.progress.bar(label, damage.positions) as advance,
        ):
            top_k = listed(damage.reference.shape[1])
            return engine_divergences(engine, damage.held_out, damage.reference, top_k, advance)

    def _time(self, file: Path, cache: str) -> Measurement:
        effort = self.damage.effort
        context = self.request.limits.context
        prompt = max(min(effort.prompt, context - effort.answer), 1)
        new = max(min(effort.answer, context - 1), 1)
        return measure(
            file, prompt_tokens=prompt, new_tokens=new, repeat=REPEAT, context=context, slots=1, kv_type=cache
        )


def standard_error(values: list[float]) -> float:
    """Of their mean; tokens of one text are not independent, so that it is a little more."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf

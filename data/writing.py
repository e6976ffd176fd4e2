"""Text generation by the unpruned model: opens the recipe's engine on first use, times it, and closes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ..core.stage import Context
from ..modeling.load import load_config
from .config import EngineConfig
from .engines import WritingEngine, open_engine
from .sampling import Sampled, Sampling


class Writer:
    """Continues prompts through the recipe's engine on the unpruned model in the folder `base`.

    Up to `rows` texts are generated together, of up to `length` tokens each, prompt included and capped at the model's
    context length. If all texts exist already, no engine is opened.
    """

    def __init__(self, config: EngineConfig, base: Path, length: int, rows: int, context: Context):
        most = int(getattr(load_config(base), "max_position_embeddings", None) or length)
        self.config, self.base, self.length, self.rows, self.context = config, base, min(length, most), rows, context
        self._engine: WritingEngine | None = None
        self._seconds = 0.0
        self._tokens = 0  # sampled in this process

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: Sampling,
        *,
        stop: Collection[int],
        banned: Sequence[int] = (),
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> list[Sampled]:
        """As `WritingEngine.sample`."""
        if self._engine is None:
            self._engine = open_engine(self.config, self.base, self.context, self.length, self.rows)
        begun = time.perf_counter()  # after opening the engine, which is not timed
        drawn = self._engine.sample(prompts, seeds, how, stop=stop, banned=banned, stopped=stopped)
        self._seconds += time.perf_counter() - begun
        self._tokens += sum(len(sampled.tokens) for sampled in drawn)
        return drawn

    def speed(self) -> float | None:
        """Tokens per second over all processes; None if nothing was generated. All processes must call it."""
        drawn = self.context.group.gather([self._tokens, self._seconds])
        seconds = max(seconds for _, seconds in drawn)
        return sum(tokens for tokens, _ in drawn) / seconds if seconds else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

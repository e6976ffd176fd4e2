"""The unpruned model in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ...core.stage import Context
from ...modeling.load import load_model
from ..sampling import Sampled, Sampling, sample


class Torch:
    """The unpruned model, run as in every other stage; the same prompts and seeds give the same bytes."""

    def __init__(self, base: Path, context: Context):
        self.model: Any = load_model(base, context.dtype, context.device)

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
        return sample(self.model, prompts, seeds, how, stop=stop, banned=banned, stopped=stopped)

    def close(self) -> None:
        self.model = None

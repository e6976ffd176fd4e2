"""The cached teacher: the data stage stored its predictions, so training holds no unpruned model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..data.packing import Batch
from ..data.teacher_cache import TeacherCache, read_top_k
from .losses import TopK


class CachedTeacher:
    """The top-k log-probabilities in a data stage's folder, read from disk as needed."""

    def __init__(self, data: Path, batches: Sequence[Batch]):
        """Raises `UserError` if the folder lacks predictions for the batches."""
        self.cache = TeacherCache(data)
        for batch in batches:
            self.cache.find(batch)

    def anchor(self, batch: Batch, positions: Tensor) -> TopK:
        """`positions` are all target positions of the batch, in order."""
        return TopK(*read_top_k(self.cache, batch))

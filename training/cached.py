"""The teacher as the data stage wrote it down: no unpruned model is held while training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..data.packing import Batch
from ..data.teacher_cache import TeacherCache, read_top_k
from .losses import TopK


class CachedTeacher:
    """The top-k log-probabilities of a data stage's folder, read from disk as they are needed."""

    def __init__(self, data: Path, batches: Sequence[Batch]):
        """Raises `UserError` where the folder lacks what it has to say of the batches."""
        self.cache = TeacherCache(data)
        for batch in batches:
            self.cache.find(batch)

    def anchor(self, batch: Batch, positions: Tensor) -> TopK:
        """`positions` are all of the batch's, in order."""
        return TopK(*read_top_k(self.cache, batch))

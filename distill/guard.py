"""Whether a phase of training gained: held-out figures that the phase does not train for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.stage import Context
from ..data.packing import Batch
from ..data.repeated import read_twice, repeated_halves
from ..modeling.blocks import Decoder
from ..training.heldout import mean_terms
from ..training.teacher import CopyTeacher
from ..training.train import HeldOut, hold_out

TOLERANCE = 1.02  # on repeated text, which a phase need not improve but must not harm


@dataclass(frozen=True)
class Divergences:
    """KL to the unpruned model in nats per token."""

    kl: float  # on held-out answers
    repeated: float  # on the second half of held-out rows in which it repeats the first: high where copying is lost

    def better_than(self, other: Divergences) -> bool:
        """Less KL on held-out answers, and no more on repeated text."""
        return self.kl < other.kl and self.repeated <= other.repeated * TOLERANCE


class Guard:
    """Measures students on held-out rows, as they are and with repeated text."""

    def __init__(self, held: Sequence[Batch], teacher: CopyTeacher, chunk: int, context: Context):
        twice = [replace(batch, loss_mask=repeated_halves(batch)) for batch in read_twice(held, 1.0)]
        self.chunk = chunk
        self.held, self.twice = (hold_out(list(rows), teacher, context.device) for rows in (held, twice))

    def measure(self, student: Decoder) -> Divergences:
        """A student's figures."""
        return Divergences(self._kl(student, self.held), self._kl(student, self.twice))

    def _kl(self, student: Decoder, held: HeldOut) -> float:
        return mean_terms(student, held.batches, held.anchors, self.chunk)[1]

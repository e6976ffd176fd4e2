"""Whether a phase of training gained: held-out figures that the phase does not train for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..core.stage import Context
from ..data.packing import Batch
from ..data.repeated import read_twice, repeated_halves
from ..modeling.agreement import Head, response_positions, token_terms
from ..modeling.blocks import Decoder
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
        self.chunk, self.device = chunk, context.device
        self.held, self.twice = (hold_out(list(rows), teacher, context.device) for rows in (held, twice))

    def measure(self, student: Decoder) -> Divergences:
        """A student's figures."""
        return Divergences(self._kl(student, self.held), self._kl(student, self.twice))

    @torch.no_grad()
    def _kl(self, student: Decoder, held: HeldOut) -> float:
        head = Head(student.head_weight, student.softcap)
        total, count = 0.0, 0
        for batch, anchor in zip(held.batches, held.anchors, strict=True):
            batch = batch.to(self.device)
            positions, targets = response_positions(batch.input_ids, batch.loss_mask)
            hidden = student.hidden(**batch.model_inputs()).flatten(0, 1)[positions]
            for start in range(0, len(positions), self.chunk):
                part = slice(start, start + self.chunk)
                terms = token_terms(head.logits(hidden[part]), targets[part], anchor.at(part))
                total += float(terms.kl.sum())
            count += len(positions)
        return total / max(count, 1)

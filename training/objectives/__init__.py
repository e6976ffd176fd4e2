"""Training objectives: the loss per response token, one per file; the file's name is its name in the recipe.

An objective is a class with its options as fields and a function `loss` of the terms at n tokens. The rest is shared
(training/losses.py): which tokens count, their weights, and the chunking of the logits.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ...core.registry import Method, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling.agreement import TokenTerms


# Copies of a chunk's logits: the student's, their softmax, and the gradients of both; with a teacher also its logits,
# log-probabilities and probabilities, the difference and the product, before the gradients.
HEAD_COPIES, HEAD_COPIES_ANCHORED = 4, 9


class Objective(Method):
    """Base of all objectives."""

    @property
    def needs_teacher(self) -> bool:
        """Whether `loss` uses the teacher's distributions."""
        return False

    @property
    def reads_targets(self) -> bool:
        """Whether `loss` makes the target tokens likelier, beside what the teacher says."""
        return True

    @property
    def head_copies(self) -> int:
        """Arrays as large as a chunk's logits that exist at once, for the plan."""
        return HEAD_COPIES_ANCHORED if self.needs_teacher else HEAD_COPIES

    @abstractmethod
    def loss(self, terms: TokenTerms) -> Tensor:
        """The loss of each token in nats, (n,), differentiable; tokens must be independent of each other."""


OBJECTIVES = Registry(__name__, Objective, "compress.objectives", "objective", ("sft", "dft", "asft", "kd"))

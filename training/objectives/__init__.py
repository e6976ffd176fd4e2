"""What a student learns at each response token, one objective per file; the file's name is its name in the recipe.

An objective is a class with its options as fields and a function `loss` of what is known at n tokens. Everything else
is shared: which tokens count, how they are weighed, and that the logits of a whole batch never exist at once
(training/losses.py).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from ...core.registry import Method, Registry

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling.agreement import TokenTerms


class Objective(Method):
    """Base of all objectives."""

    @property
    def needs_teacher(self) -> bool:
        """Whether `loss` reads what the unpruned model says, and so one has to be there."""
        return False

    @abstractmethod
    def loss(self, terms: TokenTerms) -> Tensor:
        """The loss of each token, (n,), in nats, with its gradient; no token may depend on another."""


OBJECTIVES = Registry(__name__, Objective, "compress.objectives", "objective", ("sft", "dft", "asft", "kd"))

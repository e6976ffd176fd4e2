"""What a policy is: scores for the tokens that a bounded cache has read. The greater ones stay.

A policy is asked once per block whenever tokens have been read together: a chunk of a prompt, its local tail, a token
that was written. It never sees what comes later. What it can ask for differs between runtimes (`needs`): every runtime
gives places in the text and the predictions of retaining heads; attention and labels exist in torch alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.registry import Method

if TYPE_CHECKING:
    from .settings import KvBudget

Floats = NDArray[np.float32]
Need = Literal["heads", "attention", "labels"]
NEEDED: dict[Need, str] = {
    "heads": "predictions of retaining heads",
    "attention": "the model's attention",
    "labels": "what the true answer attends to",
}


@dataclass(frozen=True)
class View:
    """One block when T tokens have been read together; with them each of its G KV heads holds n entries."""

    block: int
    heads: int  # G
    places: NDArray[np.int64]  # (T,), ascending: where the T tokens stand in the text
    decoding: bool = False  # they come after the prompt
    predicted: Floats | None = None  # heads: (G, T), what the retaining heads say of the T tokens
    # attention: given W, the mean attention of the newest W of the T tokens to each entry, (G, query heads per G, n)
    attention: Callable[[int], Floats] | None = None
    labels: Floats | None = None  # labels: (G, T), the largest logit of the true answer; inf where there is none


class Policy(Method, ABC):
    """Base of all policies; one file each in `policies/`. Fields are options."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    @classmethod
    def of(cls, settings: KvBudget, seed: int) -> Self:
        """The policy as a cache's settings ask for it."""
        return cls.model_validate({})

    @property
    def first(self) -> int:
        """How many of a text's first tokens stay whatever their score."""
        return 0

    @abstractmethod
    def score(self, view: View) -> Floats:
        """Scores (G, T) of the T tokens; or (G, n) of all entries, which then replace those given before."""


def check_needs(policy: Policy, given: Collection[Need], where: str) -> None:
    """`UserError` for a policy that needs what a runtime (`where`) does not give."""
    missing = [NEEDED[need] for need in sorted(policy.needs - set(given))]
    if missing:
        raise UserError(
            f"the KV policy {policy.kind!r} needs {' and '.join(missing)}, which {where} does not give: choose another"
        )

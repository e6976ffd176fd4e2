"""The interface of an eviction policy: it scores the tokens that a bounded cache has read; the highest scores stay.

A policy is called per block whenever tokens have been read together: a chunk of a prompt, its local tail, a generated
token. It never sees later tokens. What it may use depends on the runtime (`needs`): all provide positions and the
predictions of retaining heads; attention and labels exist only in torch.
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
    """One block after T tokens have been read together; each of its G KV heads now holds n entries."""

    block: int
    heads: int  # G
    places: NDArray[np.int64]  # (T,), ascending: the T tokens' positions in the text
    decoding: bool = False  # whether the tokens come after the prompt
    predicted: Floats | None = None  # heads: (G, T), the retaining heads' predictions for the T tokens
    # attention(W): the mean attention of the newest W of the T tokens to each entry, (G, query heads per KV head, n)
    attention: Callable[[int], Floats] | None = None
    labels: Floats | None = None  # labels: (G, T), the true answer's largest attention logit; inf where unknown


class Policy(Method, ABC):
    """Base of all policies; one file each in `policies/`. Fields are options."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    @classmethod
    def of(cls, settings: KvBudget, seed: int) -> Self:
        """The policy as a cache's settings ask for it."""
        return cls.model_validate({})

    @property
    def first(self) -> int:
        """How many of a text's first tokens always stay."""
        return 0

    @abstractmethod
    def score(self, view: View) -> Floats:
        """Scores (G, T) of the T tokens; or (G, n) of all entries, which replace earlier scores."""


def check_needs(policy: Policy, given: Collection[Need], where: str) -> None:
    """`UserError` for a policy that needs what the runtime named by `where` does not provide."""
    missing = [NEEDED[need] for need in sorted(policy.needs - set(given))]
    if missing:
        raise UserError(
            f"the KV policy {policy.kind!r} needs {' and '.join(missing)}, which {where} does not give: choose another"
        )

"""Supervised fine-tuning: −log π(y)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling.agreement import TokenTerms


class Sft(Objective):
    """Supervised fine-tuning: the negative log-likelihood of the response."""

    kind: Literal["sft"] = "sft"

    def loss(self, terms: TokenTerms) -> Tensor:
        return terms.nll

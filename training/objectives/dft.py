"""Dynamic fine-tuning (arXiv 2508.05629): sg[π(y)] · (−log π(y))."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling.agreement import TokenTerms


class Dft(Objective):
    """Dynamic fine-tuning (arXiv 2508.05629): the likelihood-weighted negative log-likelihood."""

    kind: Literal["dft"] = "dft"

    def loss(self, terms: TokenTerms) -> Tensor:
        return likelihood_weighted(terms.nll)


def likelihood_weighted(nll: Tensor) -> Tensor:
    """Each token's negative log-likelihood, (n,), times its likelihood; no gradient flows through the likelihood."""
    return (-nll).exp().detach() * nll

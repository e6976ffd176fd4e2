"""Anchored supervised fine-tuning (arXiv 2509.23753): dft + λ · KL(p ‖ π), p the unpruned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from . import Objective
from .dft import likelihood_weighted

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling.agreement import TokenTerms


class Asft(Objective):
    """Anchored fine-tuning (arXiv 2509.23753): dft plus a KL term that ties the student to the unpruned model."""

    kind: Literal["asft"] = "asft"
    kl_weight: float = Field(
        default=0.05, ge=0, description="weight of KL(unpruned ‖ student), over the full vocabulary"
    )

    @property
    def needs_teacher(self) -> bool:
        return self.kl_weight > 0

    def loss(self, terms: TokenTerms) -> Tensor:
        return likelihood_weighted(terms.nll) + self.kl_weight * terms.kl

"""Knowledge distillation: KL(p ‖ π), p the unpruned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from . import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling.agreement import TokenTerms


class Kd(Objective):
    """Distillation: KL(unpruned ‖ student), over the full vocabulary."""

    kind: Literal["kd"] = "kd"

    @property
    def needs_teacher(self) -> bool:
        return True

    def loss(self, terms: TokenTerms) -> Tensor:
        return terms.kl

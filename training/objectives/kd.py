"""Knowledge distillation: a divergence between p, the unpruned model, and the student π.

    forward   KL(p ‖ π)
    reverse   KL(π ‖ p)
    mixed     (1 − β) · KL(p ‖ π) + β · KL(π ‖ p)
    jsd       β · KL(p ‖ m) + (1 − β) · KL(π ‖ m), m = β · p + (1 − β) · π

The last is the generalised Jensen–Shannon divergence of GKD (arXiv 2306.13649). It tends to 0 at both ends of β:
divided by β it tends to `forward` at 0, divided by 1 − β to `reverse` at 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from . import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from ...modeling.agreement import TokenTerms

BETA = 0.5
ROWS = 16  # positions worked on at once: what is made of them stays in the processor's cache
SMALLEST = 1e-38  # of a probability whose logarithm is taken


class Kd(Objective):
    """Distillation: a divergence between unpruned model and student, over the full vocabulary."""

    kind: Literal["kd"] = "kd"
    divergence: Literal["forward", "reverse", "mixed", "jsd"] = Field(
        default="forward",
        description="forward: KL(unpruned ‖ student); reverse: KL(student ‖ unpruned); mixed: both, weighted by beta; "
        "jsd: generalised Jensen–Shannon (arXiv 2306.13649)",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="of mixed and jsd: near 0 the loss is like forward, near 1 like reverse (default: 0.5)",
    )

    @model_validator(mode="after")
    def _beta_is_used(self) -> Self:
        if self.beta is not None and self.divergence in ("forward", "reverse"):
            raise ValueError(f"divergence: {self.divergence} has no beta; leave it out, or choose mixed or jsd")
        return self

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def reads_targets(self) -> bool:
        return False

    @property
    def head_copies(self) -> int:
        return super().head_copies + (0 if self.divergence == "forward" else 4)

    def loss(self, terms: TokenTerms) -> Tensor:
        if self.divergence == "forward":
            return terms.kl
        assert terms.teacher is not None
        pairs = zip(*(part.split(ROWS) for part in terms.teacher.paired(terms.log_probs)), strict=True)
        if self.divergence == "jsd":
            return _joined([jensen_shannon(teacher, student, self.share) for teacher, student in pairs])
        reverse = _joined([reverse_kl(teacher, student) for teacher, student in pairs])
        return reverse if self.divergence == "reverse" else (1 - self.share) * terms.kl + self.share * reverse

    @property
    def share(self) -> float:
        """β, where it is used."""
        return BETA if self.beta is None else self.beta


def _joined(parts: list[Tensor]) -> Tensor:
    import torch

    return torch.cat(parts)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(student ‖ teacher), (n,), of log-probabilities (n, K); the gradient flows to the student's."""
    value, terms, probs = _kl(student.detach(), teacher)
    return _with_gradient(value, terms.add_(probs), student)


def jensen_shannon(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """β · KL(teacher ‖ m) + (1 − β) · KL(student ‖ m), (n,), where m = β · teacher + (1 − β) · student; else as
    `reverse_kl`."""
    mixture = beta * teacher.exp() + (1 - beta) * student.detach().exp()
    mixture = mixture.clamp_min_(SMALLEST).log_()
    towards, _, _ = _kl(teacher, mixture)
    value, terms, _ = _kl(student.detach(), mixture)
    return _with_gradient(beta * towards + (1 - beta) * value, terms.mul_(1 - beta), student)


def _kl(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(first ‖ second), (n,), its terms (n, K), and the first's probabilities; what it excludes counts nothing."""
    probs = first.exp()
    terms = (first - second).mul_(probs).masked_fill_(probs == 0, 0.0)
    return terms.sum(-1), terms, probs


def _with_gradient(value: Tensor, gradient: Tensor, at: Tensor) -> Tensor:
    """`value` (n,), whose gradient with respect to `at` (n, K) is `gradient`. Written out, because the many factors
    that autograd keeps of these formulas are each as large as a chunk's logits."""
    carrier = (gradient * at).sum(-1)
    return value + (carrier - carrier.detach())

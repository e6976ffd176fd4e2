"""How much two models disagree on response tokens: KL and the targets' log-likelihood, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .linear import linear


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap(hidden · weightᵀ)."""

    weight: Tensor  # (V, H)
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """(N, H) → (N, V), at least float32."""
        weight = self.weight if weight is None else weight
        logits = linear(hidden.to(weight.dtype), weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Spoken(Protocol):
    """Teacher distributions at n positions."""

    def kl(self, log_probs: Tensor) -> Tensor:
        """KL(teacher ‖ student), (n,), from the student's log-probabilities there, (n, V)."""
        ...

    def paired(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the teacher and of the student over the same outcomes, (n, K) each, from the student's
        over the vocabulary, (n, V): K is V, or fewer where the teacher knows some tokens as one outcome."""
        ...


class Anchor(Protocol):
    """Teacher distributions at N response positions, read in chunks."""

    def at(self, part: slice) -> Spoken: ...


class Whole:
    """Full distributions, computed once for any number of students."""

    def __init__(self, logits: Tensor):
        self.log_probs = logits.log_softmax(-1)  # (n, V)
        self.probs = self.log_probs.exp()

    def kl(self, log_probs: Tensor) -> Tensor:
        dtype = log_probs.dtype
        return (self.probs.to(dtype) * (self.log_probs.to(dtype) - log_probs)).sum(-1)

    def paired(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_probs.to(log_probs.dtype), log_probs


@dataclass(frozen=True)
class States:
    """The teacher's full distributions, computed from its hidden states after the final norm and its head."""

    hidden: Tensor  # (N, H')
    head: Head

    def at(self, part: slice) -> Whole:
        with torch.no_grad():
            return Whole(self.head.logits(self.hidden[part]))


@dataclass(frozen=True)
class TokenTerms:
    """What an objective is computed from, of n tokens: the student (with gradients) and the teacher."""

    nll: Tensor  # (n,) −log π(y)
    kl: Tensor  # (n,) KL(teacher ‖ student); zero without a teacher
    log_probs: Tensor  # (n, V) log π
    targets: Tensor  # (n,) y
    teacher: Spoken | None


def token_terms(logits: Tensor, targets: Tensor, teacher: Spoken | None) -> TokenTerms:
    """The terms of n tokens from logits (n, V), targets (n,) and the teacher's predictions at the same positions."""
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(-1, targets[:, None]).squeeze(-1)
    kl = torch.zeros_like(nll) if teacher is None else teacher.kl(log_probs)
    return TokenTerms(nll, kl, log_probs, targets, teacher)


def response_positions(input_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where targets are predicted, as flat indices into (B·T), and the targets themselves; (N,) each.

    `loss_mask[b, t]` marks token t as a target; it is predicted at t − 1. A mark at t = 0 has no
    predecessor and is ignored.
    """
    marked = loss_mask[:, 1:].nonzero()
    rows, columns = marked[:, 0], marked[:, 1]
    return rows * input_ids.shape[1] + columns, input_ids[rows, columns + 1]

"""How far a model is from another on response tokens: KL, and the likelihood of what was said, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = softcap(hidden · weightᵀ)."""

    weight: Tensor  # (V, H)
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """(N, H) → (N, V), at least float32."""
        weight = self.weight if weight is None else weight
        logits = hidden.to(weight.dtype) @ weight.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def token_terms(logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """(nll, kl) per token, (N,) each, from logits (N, V) and targets (N,); kl is zero without a teacher."""
    log_probs = logits.log_softmax(-1)
    nll = -log_probs.gather(-1, targets[:, None]).squeeze(-1)
    if teacher_logits is None:
        return nll, torch.zeros_like(nll)
    teacher = teacher_logits.to(log_probs.dtype).log_softmax(-1)
    return nll, (teacher.exp() * (teacher - log_probs)).sum(-1)


def response_positions(input_ids: Tensor, loss_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Where targets are predicted, as flat indices into (B·T), and the targets themselves; (N,) each.

    `loss_mask[b, t]` marks token t as a target; it is predicted at t − 1. A mark at t = 0 would have no
    predecessor and counts as none.
    """
    marked = loss_mask[:, 1:].nonzero()
    rows, columns = marked[:, 0], marked[:, 1]
    return rows * input_ids.shape[1] + columns, input_ids[rows, columns + 1]

"""Objectives on response tokens, computed from hidden states a chunk of positions at a time.

The objectives themselves are in training/objectives. The logits of a whole batch are never held: each chunk's gradient
with respect to its hidden states is computed while its logits exist, and only the gradient is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..modeling.agreement import Anchor, Head, Spoken, token_terms
from .objectives import Objective


@dataclass(frozen=True)
class TopK:
    """The teacher's k most likely tokens, and all others as one bucket.

    The KL divergence over these buckets is a lower bound of the full one:
    Σ_topk p·(log p − log q) + p_rest·(log p_rest − log q_rest).
    """

    tokens: Tensor  # (N, k) int64, distinct per row
    log_probs: Tensor  # (N, k + 1); the last is the rest's; normalized before use

    def at(self, part: slice) -> TopK:
        return TopK(self.tokens[part], self.log_probs[part])

    def kl(self, log_probs: Tensor) -> Tensor:
        teacher, student = self.paired(log_probs)
        probs = teacher.exp()
        return (probs * (teacher.where(probs > 0, 0.0) - student)).sum(-1)

    def paired(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens
        teacher = self.log_probs.to(log_probs.dtype).log_softmax(-1)
        student = log_probs.gather(-1, tokens)
        if tokens.shape[-1] < log_probs.shape[-1]:
            # Not as 1 − Σ q: nothing would be left of a small rest, nor of its gradient.
            others = log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1)
            student = torch.cat([student, others[:, None]], -1)
        else:
            teacher = teacher[:, :-1]  # no other tokens
        return teacher, student


@dataclass(frozen=True)
class LossSums:
    """Sums over response tokens; `loss` carries the gradient."""

    loss: Tensor
    nll: Tensor
    kl: Tensor
    tokens: int


def objective_loss(
    objective: Objective,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    anchor: Anchor | None = None,
    chunk: int = 256,
) -> LossSums:
    """Sums of an objective over N response tokens.

    hidden: (N, H) student states after the final norm; targets: (N,); anchor: the teacher at the same N positions. The
    gradient flows to `hidden` and to `head.weight` where they require it. Raises `ValueError` when a KL term lacks its
    anchor.
    """
    weights = torch.ones(1, len(targets), device=hidden.device)
    loss, values = weighted_loss(objective, hidden[None], weights, head, targets, anchor, chunk)
    _, nll, kl = values.sum((1, 2))
    return LossSums(loss, nll, kl, len(targets))


def weighted_loss(
    objective: Objective,
    hidden: Tensor,
    weights: Tensor,
    head: Head,
    targets: Tensor,
    anchor: Anchor | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of an objective over P students' states at the same N response tokens, and its terms.

    hidden: (P, N, H), after the final norm; weights: (P, N); the rest as in `objective_loss`. What the teacher says is
    worked out once for all P. Returns the sum, which carries the gradient, and (3, P, N) without one: loss, negative
    log-likelihood and KL per token.
    """
    if objective.needs_teacher and anchor is None:
        raise ValueError(f"the objective {objective.kind} needs a teacher")
    weight = head.weight
    if not torch.is_grad_enabled():  # the function below cannot see that no gradient is wanted
        hidden, weight = hidden.detach(), weight.detach()
    loss, values = _Chunked.apply(hidden, weight, weights, objective, head, targets, anchor, chunk)
    return loss, values


def _per_token(
    objective: Objective, logits: Tensor, targets: Tensor, teacher: Spoken | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, negative log-likelihood and KL of n tokens, (n,) each; all else about them is let go."""
    terms = token_terms(logits, targets, teacher)
    return objective.loss(terms), terms.nll, terms.kl


class _Chunked(torch.autograd.Function):
    """Value and gradient in one pass over the chunks; the backward pass only scales what was kept."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        weights: Tensor,
        objective: Objective,
        head: Head,
        targets: Tensor,
        anchor: Anchor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        values = torch.zeros(3, *hidden.shape[:2], dtype=dtype, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            teacher = None if anchor is None else anchor.at(part)
            for number in range(len(hidden)):
                with torch.set_grad_enabled(wants_hidden or wants_weight):
                    h = hidden[number, part].detach().requires_grad_(wants_hidden)
                    w = weight.detach().requires_grad_(wants_weight)
                    loss, nll, kl = _per_token(objective, head.logits(h, w), targets[part], teacher)
                    total = (loss * weights[number, part]).sum()
                if wants_hidden or wants_weight:
                    inputs = [tensor for tensor in (h, w) if tensor.requires_grad]
                    grads = list(torch.autograd.grad(total, inputs))
                    if grad_hidden is not None:
                        grad_hidden[number, part] = grads.pop(0)
                    if grad_weight is not None:
                        grad_weight += grads.pop(0)
                values[:, number, part] = torch.stack([loss, nll, kl]).detach().to(dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(values)
        return (values[0] * weights).sum(), values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight * scale.to(grad_weight.dtype),
            *([None] * 6),
        )

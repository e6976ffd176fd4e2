"""Divergences other than KL(teacher ‖ student), against the formulas of GKD and at their ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compress.modeling.agreement import Head, States
from compress.training.losses import TopK, objective_loss
from compress.training.objectives.kd import Kd
from torch import Tensor


def sample(tokens: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    return {
        "hidden": normal(tokens, 6).requires_grad_(),
        "weight": normal(37, 6),
        "targets": torch.zeros(tokens, dtype=torch.long),
        "teacher_hidden": normal(tokens, 8),
        "teacher_head": Head(normal(37, 8)),
    }


def trl_loss(student_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """The sum over tokens as TRL's GKDTrainer defines it: β = 0 is KL(teacher ‖ student), β = 1 KL(student ‖ teacher),
    between them Jensen–Shannon against the mixture β · teacher + (1 − β) · student."""
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)

    def kl(first: Tensor, second: Tensor) -> Tensor:  # torch takes the second first
        return torch.nn.functional.kl_div(second, first, reduction="sum", log_target=True)

    if beta in (0, 1):
        return kl(teacher, student) if beta == 0 else kl(student, teacher)
    mixture = torch.stack([teacher + math.log(beta), student + math.log(1 - beta)]).logsumexp(0)
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


@pytest.mark.parametrize(
    ("options", "beta"),
    [({}, 0), ({"divergence": "reverse"}, 1), ({"divergence": "jsd"}, 0.5)]
    + [({"divergence": "jsd", "beta": beta}, beta) for beta in (0.01, 0.3, 0.9)],
)
def test_divergences_are_those_of_gkd(options: dict[str, Any], beta: float) -> None:
    s = sample(40)  # more positions than are worked on at once
    hidden = s["hidden"].detach().requires_grad_()
    teacher = s["teacher_hidden"] @ s["teacher_head"].weight.T
    wanted = trl_loss(hidden @ s["weight"].T, teacher, beta)
    wanted.backward()
    states = States(s["teacher_hidden"], s["teacher_head"])
    found = objective_loss(Kd(**options), s["hidden"], Head(s["weight"]), s["targets"], states, 25)
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), wanted.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(s["hidden"].grad, hidden.grad, rtol=1e-9, atol=1e-12)


def test_jensen_shannon_becomes_either_kl_at_its_ends() -> None:
    s = sample(9)
    states, head = States(s["teacher_hidden"], s["teacher_head"]), Head(s["weight"])

    def loss(**options: Any) -> float:
        return float(objective_loss(Kd(**options), s["hidden"], head, s["targets"], states).loss.detach())

    forward, reverse = loss(), loss(divergence="reverse")
    assert abs(forward - reverse) > 0.01 * forward
    assert loss(divergence="jsd", beta=1e-6) / 1e-6 == pytest.approx(forward, rel=5e-3)
    assert loss(divergence="jsd", beta=1 - 1e-6) / 1e-6 == pytest.approx(reverse, rel=5e-3)


def test_divergences_of_tokens_that_one_side_excludes_are_finite_where_they_should_be() -> None:
    """In float32 the probabilities of these tokens are zero."""
    student = torch.tensor([[0.0, 0.0, -200.0, -200.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, -200.0, 0.0, -200.0]])
    head = Head(torch.eye(4))
    states = States(teacher, head)

    def loss(**options: Any) -> Tensor:
        return objective_loss(Kd(**options), student, head, torch.tensor([0]), states).loss

    total = loss(divergence="jsd")
    total.backward()
    assert float(total.detach()) == pytest.approx(0.5 * math.log(2), rel=1e-5)  # half of each is shared
    assert student.grad is not None and bool(student.grad.isfinite().all()) and student.grad[0, 0] < 0
    assert float(loss(divergence="reverse").detach()) == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("options", [{"beta": 0.5}, {"divergence": "reverse", "beta": 0.5}])
def test_beta_without_a_use_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no beta; leave it out, or choose mixed or jsd"):
        Kd(**options)
    for beta in (0, 1):
        with pytest.raises(ValueError, match="beta"):
            Kd(divergence="jsd", beta=beta)


@pytest.mark.parametrize("k", [1, 5, 36])
@pytest.mark.parametrize("beta", [0.3, 1])
def test_divergences_of_buckets_are_those_of_tokens_put_together(beta: float, k: int) -> None:
    """The teacher's k first tokens, and all others as one; written as logits of k + 1 tokens."""
    s = sample(7)
    hidden = s["hidden"].detach().requires_grad_()

    def together(logits: Tensor) -> Tensor:
        return torch.cat([logits[:, :k], logits[:, k:].logsumexp(-1, keepdim=True)], -1)

    teacher = together(s["teacher_hidden"] @ s["teacher_head"].weight.T)
    wanted = trl_loss(together(hidden @ s["weight"].T), teacher, beta)
    wanted.backward()
    objective = Kd(divergence="reverse") if beta == 1 else Kd(divergence="jsd", beta=beta)
    anchor = TopK(torch.arange(k).expand(7, k), teacher.log_softmax(-1))
    found = objective_loss(objective, s["hidden"], Head(s["weight"]), s["targets"], anchor, 3)
    found.loss.backward()
    torch.testing.assert_close(found.loss.detach(), wanted.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(s["hidden"].grad, hidden.grad, rtol=1e-9, atol=1e-11)

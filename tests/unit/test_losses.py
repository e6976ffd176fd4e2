"""Objectives in chunks against plain full-logits losses written here, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.modeling.agreement import Head, States, response_positions
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model
from compress.training.losses import TopK, objective_loss
from compress.training.objectives.asft import Asft
from compress.training.objectives.dft import Dft
from compress.training.objectives.kd import Kd
from compress.training.objectives.sft import Sft
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VOCABULARY, WIDTH = 37, 6
OBJECTIVES = [
    Sft(),
    Dft(),
    Asft(kl_weight=0.3),
    Kd(),
    Kd(divergence="reverse"),
    Kd(divergence="mixed", beta=0.3),
    Kd(divergence="jsd", beta=0.3),
]
NAMES = ["sft", "dft", "asft", "kd", "reverse", "mixed", "jsd"]


def name_of(objective: Any) -> str:
    return NAMES[OBJECTIVES.index(objective)]


def plain_kl(first: Any, second: Any) -> Tensor:
    return torch.stack([a * (a.log() - b.log()) for a, b in zip(first, second, strict=True)]).sum()


def plain_jsd(teacher: Tensor, student: Tensor) -> Tensor:
    mixture = 0.3 * teacher + 0.7 * student
    return 0.3 * plain_kl(teacher, mixture) + 0.7 * plain_kl(student, mixture)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "asft": lambda teacher, student: 0.3 * plain_kl(teacher, student),
    "kd": plain_kl,
    "reverse": lambda teacher, student: plain_kl(student, teacher),
    "mixed": lambda teacher, student: 0.7 * plain_kl(teacher, student) + 0.3 * plain_kl(student, teacher),
    "jsd": plain_jsd,
}


def plain_loss(kind: str, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """The sum over tokens straight from the definitions, one token after another."""
    total = logits.sum() * 0
    for n, target in enumerate(targets.tolist()):
        student = logits[n].exp() / logits[n].exp().sum()
        likelihood = student[target]
        if kind in ("sft", "dft", "asft"):
            weight = 1.0 if kind == "sft" else likelihood.item()
            total = total - weight * likelihood.log()
        if kind in DIVERGENCES:
            assert teacher_logits is not None
            teacher = teacher_logits[n].exp() / teacher_logits[n].exp().sum()
            total = total + DIVERGENCES[kind](teacher, student)
    return total


def capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * (logits / cap).tanh()


def sample(tokens: int, cap: float | None = None, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    return {
        "hidden": normal(tokens, WIDTH).requires_grad_(),
        "weight": normal(VOCABULARY, WIDTH).requires_grad_(),
        "targets": torch.randint(VOCABULARY, (tokens,), generator=draw),
        "teacher_hidden": normal(tokens, WIDTH + 2),  # a teacher may be wider
        "teacher_head": Head(normal(VOCABULARY, WIDTH + 2), cap),
    }


def expected(kind: str, s: dict[str, Any], cap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient to the hidden states and gradient to the head weight, times 1.7."""
    hidden, weight = (s[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    teacher = capped(s["teacher_hidden"].double() @ s["teacher_head"].weight.double().T, cap)
    loss = plain_loss(kind, capped(hidden @ weight.T, cap), s["targets"], teacher)
    (1.7 * loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_value_and_gradients_match_plain_losses(objective: Any, chunk: int, cap: float | None) -> None:
    s = sample(7, cap)
    loss, grad_hidden, grad_weight = expected(name_of(objective), s, cap)
    found = objective_loss(
        objective,
        s["hidden"],
        Head(s["weight"], cap),
        s["targets"],
        States(s["teacher_hidden"], s["teacher_head"]),
        chunk,
    )
    (1.7 * found.loss).backward()
    torch.testing.assert_close(found.loss.detach(), loss, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(s["hidden"].grad, grad_hidden, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(s["weight"].grad, grad_weight, rtol=1e-10, atol=1e-12)
    # The two figures every objective reports beside its loss.
    logits = capped(s["hidden"].detach() @ s["weight"].detach().T, cap)
    teacher = capped(s["teacher_hidden"] @ s["teacher_head"].weight.T, cap)
    torch.testing.assert_close(found.nll, plain_loss("sft", logits, s["targets"], None), rtol=1e-11, atol=0)
    torch.testing.assert_close(found.kl, plain_loss("kd", logits, s["targets"], teacher), rtol=1e-11, atol=0)
    assert found.tokens == 7 and not found.nll.requires_grad and not found.kl.requires_grad


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_no_token_and_one_token(objective: Any) -> None:
    for tokens in (0, 1):
        s = sample(tokens)
        loss, grad_hidden, grad_weight = expected(name_of(objective), s, None)
        found = objective_loss(
            objective, s["hidden"], Head(s["weight"]), s["targets"], States(s["teacher_hidden"], s["teacher_head"])
        )
        (1.7 * found.loss).backward()
        torch.testing.assert_close(found.loss.detach(), loss, rtol=1e-11, atol=0)
        torch.testing.assert_close(s["hidden"].grad, grad_hidden, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(s["weight"].grad, grad_weight, rtol=1e-10, atol=1e-13)
        assert found.tokens == tokens and (tokens == 1) is bool(found.loss.abs() > 1e-3)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_gradients_flow_only_where_they_are_wanted(frozen: str) -> None:
    s = sample(5)
    _, *gradients = expected("asft", s, None)
    for name in ("hidden", "weight"):
        s[name].requires_grad_(frozen not in (name, "both"))
    found = objective_loss(
        OBJECTIVES[2], s["hidden"], Head(s["weight"]), s["targets"], States(s["teacher_hidden"], s["teacher_head"]), 2
    )
    if frozen == "both":
        assert not found.loss.requires_grad
        return
    (1.7 * found.loss).backward()
    for name, gradient in zip(("hidden", "weight"), gradients, strict=True):
        if name == frozen:
            assert s[name].grad is None
        else:
            torch.testing.assert_close(s[name].grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    s = sample(600, dtype=dtype)
    loss, grad_hidden, _ = expected("sft", s, None)
    found = objective_loss(Sft(), s["hidden"], Head(s["weight"]), s["targets"], chunk=64)
    assert found.loss.dtype == torch.float32
    (1.7 * found.loss).backward()
    share = 1e-6 if dtype == torch.float32 else 4e-3  # bfloat16 logits have 8 bits
    torch.testing.assert_close(found.loss.detach().double(), loss, rtol=share, atol=0)
    assert s["hidden"].grad.dtype == dtype
    difference = (s["hidden"].grad.double() - grad_hidden).norm() / grad_hidden.norm()
    assert difference < 4 * share


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_a_missing_teacher_is_an_error_where_one_is_needed(objective: Any) -> None:
    s = sample(3)
    if name_of(objective) in DIVERGENCES:
        with pytest.raises(ValueError, match=f"objective {objective.kind} needs a teacher"):
            objective_loss(objective, s["hidden"], Head(s["weight"]), s["targets"])
    else:
        found = objective_loss(objective, s["hidden"], Head(s["weight"]), s["targets"])
        torch.testing.assert_close(found.loss.detach(), expected(name_of(objective), s, None)[0])
        assert found.kl == 0
    assert objective.needs_teacher is (name_of(objective) in DIVERGENCES)


def test_an_anchor_without_weight_is_dft() -> None:
    s = sample(5)
    assert not Asft(kl_weight=0).needs_teacher
    found = objective_loss(Asft(kl_weight=0), s["hidden"], Head(s["weight"]), s["targets"])
    torch.testing.assert_close(found.loss.detach(), expected("dft", s, None)[0], rtol=1e-11, atol=0)


def test_response_positions_stand_before_their_targets() -> None:
    ids = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 1]], dtype=torch.bool)  # a mark at t = 0 counts as none
    positions, targets = response_positions(ids, mask)
    assert positions.tolist() == [1, 2, 6, 10] and targets.tolist() == [2, 3, 7, 11]
    none = response_positions(ids, torch.zeros_like(mask))
    assert [len(part) for part in none] == [0, 0]


class Largest(TorchDispatchMode):
    """Records the size of the largest result of any operation, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        self.products += func is torch.ops.aten.mm.default
        return result


@pytest.mark.parametrize("objective", OBJECTIVES, ids=NAMES)
def test_the_logits_of_all_tokens_never_exist(objective: Any) -> None:
    tokens, chunk = 400, 16
    s = sample(tokens)
    with Largest() as seen:
        found = objective_loss(
            objective,
            s["hidden"],
            Head(s["weight"]),
            s["targets"],
            States(s["teacher_hidden"], s["teacher_head"]),
            chunk,
        )
        found.loss.backward()
    assert seen.elements == tokens * WIDTH < tokens * VOCABULARY  # the gradient to the hidden states


def test_nothing_is_differentiated_while_measuring() -> None:
    s = sample(8)
    with torch.no_grad(), Largest() as seen:
        found = objective_loss(
            Kd(), s["hidden"], Head(s["weight"]), s["targets"], States(s["teacher_hidden"], s["teacher_head"]), 4
        )
    assert seen.products == 4  # student and teacher logits of two chunks
    torch.testing.assert_close(found.loss, expected("kd", s, None)[0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("objective", [OBJECTIVES[1], OBJECTIVES[3], OBJECTIVES[6]], ids=["dft", "kd", "jsd"])
def test_gradients_of_a_whole_model(tiny: Callable[..., Path], objective: Any, tied: bool) -> None:
    """A tied head adds its gradient to the embedding's; each parameter's gradient as from the model's own logits."""
    folder = tiny(blocks=2, hidden=16, heads=2, kv_heads=1, intermediate=16, tied=tied)
    model, teacher = load_model(folder).double(), load_model(tiny(blocks=1)).double()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :4] = False
    positions, targets = response_positions(ids, mask)
    with torch.no_grad():
        teacher_hidden = Decoder(teacher).hidden(input_ids=ids).flatten(0, 1)[positions]
        teacher_logits = teacher(ids).logits[:, 3:-1].flatten(0, 1)
    plain_loss(
        name_of(objective), model(ids).logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten(), teacher_logits
    ).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert ("lm_head.weight" in wanted) is not tied
    model.zero_grad()
    decoder = Decoder(model)
    hidden = decoder.hidden(input_ids=ids).flatten(0, 1)[positions]
    head = Head(decoder.head_weight)
    objective_loss(
        objective, hidden, head, targets, States(teacher_hidden, Head(Decoder(teacher).head_weight.detach())), 3
    ).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m)


# A teacher of which only the likeliest tokens are known


def buckets(logits: Tensor, k: int) -> TopK:
    """The k likeliest tokens of each position, in some order, and the rest."""
    probs = logits.exp() / logits.exp().sum(-1, keepdim=True)
    tokens = torch.stack([row.argsort(descending=True)[:k].flip(0) for row in probs])
    top = probs.gather(-1, tokens)
    rest = torch.stack([sum((p for v, p in enumerate(row) if v not in seen), row.sum() * 0) for row, seen in
                        zip(probs, tokens.tolist(), strict=True)])  # fmt: skip
    return TopK(tokens, torch.cat([top, rest[:, None]], -1).log())


def plain_bucketed(logits: Tensor, anchor: TopK) -> Tensor:
    """The sum over tokens of Σ p log(p/q), the rest as one token of what remains; one token after another."""
    total = logits.sum() * 0
    for row, tokens, log_p in zip(logits, anchor.tokens.tolist(), anchor.log_probs, strict=True):
        q = row.exp() / row.exp().sum()
        others = [q[v] for v in range(len(q)) if v not in tokens]
        student = [q[v] for v in tokens] + [torch.stack(others).sum() if others else q.sum() * 0]
        for p, s in zip(log_p.exp(), student, strict=True):
            if p > 0:
                total = total + p * (p.log() - s.log())
    return total


@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1, VOCABULARY])
def test_buckets_match_the_plain_sum(k: int, chunk: int, cap: float | None) -> None:
    s = sample(7)
    anchor = buckets(s["teacher_hidden"] @ s["teacher_head"].weight.T, k)
    assert bool(torch.isneginf(anchor.log_probs[:, -1]).all()) is (k == VOCABULARY)
    hidden, weight = (s[name].detach().requires_grad_() for name in ("hidden", "weight"))
    wanted = plain_bucketed(capped(hidden @ weight.T, cap), anchor)
    (1.7 * wanted).backward()
    found = objective_loss(Kd(), s["hidden"], Head(s["weight"], cap), s["targets"], anchor, chunk)
    (1.7 * found.loss).backward()
    torch.testing.assert_close(found.loss.detach(), wanted.detach(), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(s["hidden"].grad, hidden.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(s["weight"].grad, weight.grad, rtol=1e-9, atol=1e-11)
    anchored = objective_loss(OBJECTIVES[2], s["hidden"], Head(s["weight"], cap), s["targets"], anchor, chunk)
    dft = objective_loss(Dft(), s["hidden"], Head(s["weight"], cap), s["targets"]).loss
    torch.testing.assert_close(anchored.loss, dft + 0.3 * wanted.detach(), rtol=1e-11, atol=1e-11)


def test_all_tokens_as_buckets_are_the_whole_divergence_and_fewer_say_less() -> None:
    s = sample(40)
    logits = s["teacher_hidden"] @ s["teacher_head"].weight.T
    head = Head(s["weight"])
    states = States(s["teacher_hidden"], s["teacher_head"])
    whole = objective_loss(Kd(), s["hidden"], head, s["targets"], states).kl
    found = [objective_loss(Kd(), s["hidden"], head, s["targets"], buckets(logits, k)).kl for k in (1, 2, 9, 36, 37)]
    assert 0 < found[0] < found[1] < found[2] < found[3] < whole * (1 + 1e-12)
    torch.testing.assert_close(found[-1], whole, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rest_too_small_to_be_subtracted_still_counts(dtype: torch.dtype) -> None:
    """The student is all but sure of the likeliest token; 1 − q is zero in float32."""
    logits = torch.tensor([[60.0, 1.0, 0.0, -1.0]], dtype=dtype, requires_grad=True)
    anchor = TopK(torch.tensor([[0]]), torch.tensor([[0.9, 0.1]], dtype=dtype).log())
    kl = anchor.kl(logits.log_softmax(-1)).sum()
    others = float(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).logsumexp(0)) - 60
    wanted = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - others)
    assert float(kl.detach()) == pytest.approx(wanted, rel=1e-6)
    kl.backward()
    share = torch.tensor([1.0, 0.0, -1.0], dtype=dtype).softmax(0)
    torch.testing.assert_close(logits.grad, torch.cat([torch.tensor([0.1], dtype=dtype), -0.1 * share])[None])


def test_a_teacher_that_knows_nothing_of_some_token_asks_nothing_of_it() -> None:
    anchor = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.0, -300.0, -400.0]]))
    logits = torch.zeros(1, 4, requires_grad=True)
    kl = anchor.kl(logits.log_softmax(-1)).sum()
    assert float(kl.detach()) == pytest.approx(math.log(4), rel=1e-6)
    kl.backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, 0.25, -0.75, 0.25]]))


def test_what_was_written_in_few_bits_is_a_distribution_again() -> None:
    """Rounded log-probabilities sum to a little more or less than one; a student that agrees is at no distance."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(50, VOCABULARY, dtype=torch.float64)
    exact = buckets(logits, 5)
    rounded = TopK(exact.tokens, exact.log_probs.half().float())
    kl = rounded.kl(logits.log_softmax(-1))
    assert (kl > -1e-7).all() and kl.max() < 1e-5


def test_buckets_too_never_need_the_logits_of_all_tokens() -> None:
    tokens, chunk = 400, 16
    s = sample(tokens)
    anchor = buckets(s["teacher_hidden"] @ s["teacher_head"].weight.T, 3)
    with Largest() as seen:
        objective_loss(Kd(), s["hidden"], Head(s["weight"]), s["targets"], anchor, chunk).loss.backward()
    assert seen.elements == tokens * WIDTH < tokens * VOCABULARY

"""The mathematics of healing against direct formulas: sums, the cosine objective, the patch and its basis."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compress.core.errors import UserError
from compress.data.chat import Encoded
from compress.data.packing import pack
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model
from compress.prune.hadamard import hadamard
from compress.prune.heals import cosine
from compress.prune.heals.cosine import CosineHeal
from compress.prune.heals.linear import LinearHeal
from compress.prune.heals.patch import patch_matrix
from compress.prune.least_squares import LEAST_SCALE, Sums, choose
from compress.prune.stream import Gap, Tokens, Values
from torch import Tensor
from torch.nn.functional import cosine_similarity

SIZE = 16
CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def data(count: int, features: int, outputs: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, r, z and w; z is a little of x and 1.6 times r."""
    x, r = drawn(count, features, seed=seed), drawn(count, outputs, seed=seed + 1)
    z = 0.5 * x @ drawn(features, outputs, seed=9) + 1.6 * r + 0.3 * drawn(count, outputs, seed=seed + 2)
    return x, r, z, 0.2 + drawn(count, seed=seed + 3).abs()


def summed(x: Tensor, r: Tensor, z: Tensor, weight: Tensor | None, *, diagonal: bool) -> Sums:
    sums = Sums.empty(x.shape[1], r.shape[1], CPU, diagonal=diagonal)
    sums.add(x, r, z, weight)
    return sums


def off(x: Tensor, r: Tensor, z: Tensor, w: Tensor | float, solution: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Σ w²‖x·X + s·r − z‖²."""
    mapped = x * solution if solution.ndim == 1 else x @ solution
    return ((mapped + scale * r - z).square().sum(-1) * torch.as_tensor(w).square()).sum()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.7])
def test_solve_ends_where_the_objective_has_no_slope(
    diagonal: bool, scaled: bool, weighted: bool, ridge: float
) -> None:
    """Σ w²‖x·X + s·r − z‖² + α‖X − s·X₀‖² is convex: its gradient vanishes (to 1e-9 of what it is at X₀) only there."""
    x, r, z, w = data(60, 5, 5) if diagonal else data(60, 7, 4)
    prior = drawn(5, seed=5) if diagonal else drawn(7, 4, seed=5)
    weight = w if weighted else torch.ones(60, dtype=torch.float64)
    alpha = ridge * (x * weight[:, None]).square().sum(0).mean()

    def slope(solution: Tensor, scale: float) -> tuple[float, float]:
        of = solution.clone().requires_grad_(), torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        objective = off(x, r, z, weight, *of) + alpha * (of[0] - of[1] * prior).square().sum()
        by_solution, by_scale = torch.autograd.grad(objective, of)
        return float(by_solution.abs().max()), float(by_scale.abs())

    sums = summed(x, r, z, w if weighted else None, diagonal=diagonal)
    solution, scale = sums.solve(ridge, prior, scaled=scaled)
    assert slope(solution, scale)[0] < 1e-9 * slope(prior, 1.0)[0]
    if scaled:
        assert slope(solution, scale)[1] < 1e-9 * slope(prior, 1.0)[1] and abs(scale - 1) > 0.1
    else:
        assert scale == 1.0


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_the_scale_stays_above_its_least_value(diagonal: bool, ridge: float) -> None:
    """A stream that should turn round would be divided by a negative scale. Against a search over scales, each with
    the best solution for it."""
    x, r, _, _ = data(60, 5, 5)
    z, prior = -2.0 * r + 0.1 * drawn(60, 5, seed=4), 0 * (drawn(5) if diagonal else drawn(5, 5))
    sums = summed(x, r, z, None, diagonal=diagonal)
    alpha = ridge * x.square().sum(0).mean()

    def best(scale: float) -> float:
        away = summed(x, 0 * r, z - scale * r, None, diagonal=diagonal).solve(ridge, prior)[0]
        return float(off(x, r, z, 1.0, away, scale) + alpha * away.square().sum())

    solution, scale = sums.solve(ridge, prior, scaled=True)
    assert scale == pytest.approx(LEAST_SCALE)
    assert min((best(s), s) for s in (LEAST_SCALE, 0.5, 1.0, 2.0))[1] == LEAST_SCALE and best(-1.0) < best(LEAST_SCALE)
    found = float(off(x, r, z, 1.0, solution, scale) + alpha * solution.square().sum())
    assert found == pytest.approx(best(LEAST_SCALE))


def test_a_stream_that_the_features_explain_keeps_its_scale() -> None:
    x = drawn(30, 4)
    solution, scale = summed(x, 0 * x, x, None, diagonal=False).solve(0.0, torch.eye(4).double(), scaled=True)
    assert scale == 1.0 and torch.allclose(solution, torch.eye(4).double())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_that_of_the_tokens(diagonal: bool, weighted: bool) -> None:
    """Also of a solution and a scale that were not fitted, in single precision too, and of no tokens at all."""
    x, r, z, w = data(40, 6, 6)
    solution = drawn(6, seed=7) if diagonal else drawn(6, 6, seed=7)
    weight = w if weighted else None
    for scale in (1.0, 0.3, -2.0):
        wanted = off(x, r, z, w if weighted else 1.0, solution, scale) / off(x, r, z, w if weighted else 1.0, 0 * x[0])
        assert summed(x, r, z, weight, diagonal=diagonal).error(solution, scale) == pytest.approx(
            float(wanted), rel=1e-12
        )
        single = summed(x.float(), r.float(), z.float(), weight, diagonal=diagonal)
        assert single.xx.dtype == torch.float64
        assert single.error(solution, scale) == pytest.approx(float(wanted), rel=1e-5)
    assert Sums.empty(6, 6, CPU, diagonal=diagonal).error(solution, 2.0) == 0.0


@pytest.mark.parametrize("diagonal", [False, True])
def test_sums_of_parts_are_the_sums_of_all(diagonal: bool) -> None:
    x, r, z, w = data(50, 6, 6)
    first, second = slice(0, 13), slice(13, 50)
    a, b, whole = (
        summed(x[part], r[part], z[part], w[part], diagonal=diagonal) for part in (first, second, slice(None))
    )
    added = a + b
    a.add(x[second], r[second], z[second], w[second])
    for found in (added, a):
        assert found.tokens == whole.tokens == 50 and found.diagonal == diagonal
        for name in ("xx", "xd", "xr"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
        for name in ("dd", "rd", "rr"):
            assert getattr(found, name) == pytest.approx(getattr(whole, name), rel=1e-12)
    assert b.tokens == 37  # adding changes neither


def test_held_out_rows_choose_and_all_rows_are_solved() -> None:
    """Few noisy tokens: neither the weakest nor the strongest pull is best; where all are equal, the least counts."""
    ridges, prior, same = [10.0, 1e-6, 0.3], torch.zeros(7, 4).double(), drawn(7, 4, seed=4)
    fit, held = Sums.empty(7, 4, CPU, diagonal=False), Sums.empty(7, 4, CPU, diagonal=False)
    for sums, count, seed in ((fit, 9, 20), (held, 200, 30)):
        x, r, z, w = data(count, 7, 4, seed)
        sums.add(x, r, z + drawn(count, 4, seed=seed + 5), w)
    found = choose([fit, held], ridges, prior, same, scaled=True)
    errors = {f"{ridge:g}": held.error(*fit.solve(ridge, prior, scaled=True)) for ridge in ridges}
    assert found.errors == errors and min(errors, key=lambda ridge: errors[ridge]) == "0.3" and found.ridge == 0.3
    solution, scale = (fit + held).solve(0.3, prior, scaled=True)
    assert torch.equal(found.solution, solution) and found.scale == scale
    assert (found.unhealed, found.tokens) == (held.error(same), 209)
    nothing = Sums.empty(7, 4, CPU, diagonal=False)
    assert choose([fit, nothing], ridges, prior, same).ridge == 1e-6


@pytest.mark.parametrize("diagonal", [False, True])
def test_what_has_no_solution_is_refused(diagonal: bool) -> None:
    x, r, z, _ = data(30, 6, 6)
    sums = summed(x * torch.tensor([1, 1, 0, 1, 1, 1]), r, z, None, diagonal=diagonal)
    prior = torch.ones(6).double() if diagonal else torch.eye(6).double()
    with pytest.raises(UserError, match=r"no solution on 30 tokens; give prune\.heal\.ridge larger values"):
        sums.solve(0.0, prior)
    assert sums.solve(1e-3, prior)[0].isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 64, 576, 896, 3072])
def test_hadamard_matrices_have_one_size_of_entry(size: int) -> None:
    """Whole numbers in single precision: the check is exact."""
    matrix = hadamard(size) * size**0.5
    torch.testing.assert_close(matrix.abs(), torch.ones_like(matrix), rtol=0, atol=1e-12)
    signs = matrix.sign().float()
    assert torch.equal(signs @ signs.T, size * torch.eye(size))


@pytest.mark.parametrize("size", [3, 172])
def test_where_there_is_no_hadamard_matrix_entries_are_hardly_larger(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 1 < matrix.abs().max() * size**0.5 <= 2**0.5 + 1e-12


@pytest.mark.parametrize("map", [drawn(SIZE, SIZE, seed=3), torch.ones(SIZE).double().diag(), drawn(SIZE, seed=4)])
def test_the_cosine_objective_has_half_the_gradient_of_its_weighted_problem(map: Tensor) -> None:
    """d/dT Σ 1 − cos(u·T + r, z) = ½ · d/dT Σ w²‖u·T + r − target‖², w and target held, wherever the cosine is not
    below the least (to 1e-9)."""
    u, r = drawn(200, SIZE, seed=1), drawn(200, SIZE, seed=2)
    close = (u * map if map.ndim == 1 else u @ map) + r
    z = close + 0.7 * close.norm(dim=-1, keepdim=True) / SIZE**0.5 * drawn(200, SIZE, seed=5)
    tokens = Tokens(False, u, u, r, z)
    cosines, weight, target = cosine.problem(tokens, map)
    assert 0.3 < cosines.min() < cosines.max() < 0.97
    at = map.clone().requires_grad_()
    y = (u * at if map.ndim == 1 else u @ at) + r
    (wanted,) = torch.autograd.grad((1 - cosine_similarity(y, z, dim=-1)).sum(), at)
    (found,) = torch.autograd.grad(off(u, r, target, weight, at), at)
    torch.testing.assert_close(found / 2, wanted, rtol=1e-9, atol=1e-9)
    # A target at a right angle, or behind, is kept in sight: as if the cosine were 0.1.
    cosines, weight, target = cosine.problem(Tokens(False, u, u, r, -z), map)
    assert cosines.max() < 0
    torch.testing.assert_close(weight * close.norm(dim=-1), torch.full_like(weight, 0.1**0.5))
    torch.testing.assert_close(target.norm(dim=-1), 10 * close.norm(dim=-1))


@pytest.fixture
def gap(shaken: Callable[..., Path]) -> Callable[..., Gap]:
    """gap(family, rows) -> the gap of blocks 2 and 3 of a tiny model; every fourth row is held out."""

    def make(family: str = "llama", count: int = 12, seed: int = 11) -> Gap:
        folder = shaken(family, blocks=6, hidden=SIZE, heads=2, kv_heads=1, intermediate=24)
        draw = random.Random(seed)
        rows = [[draw.randrange(3, 300) for _ in range(25 + draw.randrange(24))] for _ in range(count)]
        batches = pack([Encoded(row, [True] * len(row)) for row in rows], 48, 5, 9)
        decoder = Decoder(load_model(folder))
        return Gap(decoder, 2, 3, [], [4, 5], {}, 1.0, batches, 0.25, lambda n=1, note="": None)

    return make


@torch.no_grad()
def stored(gap: Gap, held: bool | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inner, u, r and z of all tokens, of those held out, or of those that are not; float64."""
    tokens = [part for part in gap.rows() if held in (None, part.held)]
    names = ("inner", "mlp", "residual", "target")
    inner, u, r, z = (torch.cat([getattr(part, name).double() for part in tokens]) for name in names)
    return inner, u, r, z


def missed(y: Tensor, z: Tensor) -> Tensor:
    return (1 - cosine_similarity(y, z, dim=-1)).mean()


@torch.no_grad()
def added(gap: Gap, values: Values, inner: Tensor, u: Tensor) -> Tensor:
    """What the healed MLP adds."""
    ((parameter, value),) = values.items()
    return inner @ value.T if gap.decoder.can_fuse_after_mlp else u * (1 + value) / (1 + parameter.double())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_cosine_gets_where_adam_gets(gap: Any, family: str) -> None:
    """Within 1 % of 400 steps of Adam on stored activations, and closer than the least-squares map by as much."""
    here = gap(family)
    inner, u, r, z = stored(here)
    with torch.no_grad():
        values, record = CosineHeal(ridge=[1e-9], iterations=12).fit(here)
        plain, _ = LinearHeal(ridge=[1e-9]).fit(here)
    assert record.errors[min(record.errors, key=lambda n: record.errors[n])] < record.unhealed_error
    map = here.identity.requires_grad_()
    optimizer = torch.optim.Adam([map], lr=0.1)
    for _ in range(400):
        loss = missed((u * map if map.ndim == 1 else u @ map) + r, z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = missed(added(here, values, inner, u) + r, z)
    assert found < 1.01 * loss
    assert found < 0.99 * missed(added(here, plain, inner, u) + r, z)


def weighted_map(u: Tensor, r: Tensor, z: Tensor, ridge: float, *, full: bool) -> Tensor:
    """A round of cosine from the identity, its weighted problem solved at once."""
    y, c = u + r, cosine_similarity(u + r, z, dim=-1).clamp_min(0.1)
    w = (c.sqrt() / y.norm(dim=-1))[:, None]
    x, d = u * w, (z * (y.norm(dim=-1) / (z.norm(dim=-1) * c))[:, None] - r) * w
    alpha = ridge * x.square().sum(0).mean()
    if not full:
        return ((x * d).sum(0) + alpha) / (x.square().sum(0) + alpha)
    pull = alpha.sqrt() * torch.eye(SIZE, dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([x, pull]), torch.cat([d, pull]), driver="gelsd").solution


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_held_out_rows_judge_a_round_of_cosine_without_having_been_fitted(gap: Any, family: str) -> None:
    """Of the rows to fit on is the map that is judged; of all rows the one that is used."""
    here, full = gap(family), family == "llama"
    _, u, r, z = stored(here, held=True)
    trial = weighted_map(*stored(here, held=False)[1:], 1e-3, full=full)
    errors = [float(missed((u @ map if full else u * map) + r, z)) for map in (here.identity, trial)]
    assert errors[1] < errors[0]
    with torch.no_grad():
        values, record = CosineHeal(ridge=[1e-3], iterations=1).fit(here)
    assert record.errors == pytest.approx({"0": errors[0], "1": errors[1]}, rel=1e-6)
    inner, u, r, z = stored(here)
    assert (record.unhealed_error, record.ridge, record.tokens) == (record.errors["0"], 1e-3, len(u))
    map = weighted_map(u, r, z, 1e-3, full=full)
    wanted = u @ map if full else u * map
    torch.testing.assert_close(added(here, values, inner, u), wanted, rtol=1e-5, atol=1e-5)


def test_cosine_leaves_the_mlp_as_it_is_where_every_round_is_worse(gap: Any) -> None:
    """Of two rows one is fitted with no pull to speak of: that does not suit the other, which needed nothing."""
    here = gap(count=2)
    real = list(here.rows())
    still = [Tokens(p.held, p.inner, p.mlp, p.residual, p.residual + p.mlp if p.held else p.target) for p in real]
    here.rows = lambda: iter(still)
    with torch.no_grad():
        values, record = CosineHeal(ridge=[1e-9], iterations=3).fit(here)
    assert record.errors["0"] < 1e-6 < 1e-3 < min(record.errors[number] for number in "123")
    assert record.ridge == 0
    ((weight, value),) = values.items()
    assert torch.equal(value, weight.double())


def test_the_patch_is_a_ratio_of_sizes_per_channel_of_the_basis(gap: Any) -> None:
    """P = Q·diag(d)·Qᵀ with Sylvester's matrix of order 16; where the stream has nothing, the ratio is 1."""
    here = gap()
    _, u, r, z = stored(here)
    basis = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        basis = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), basis) / 2**0.5
    ratio = (z @ basis).abs().mean(0) / ((u + r) @ basis).abs().mean(0)
    assert ratio.max() > 1.2 * ratio.min()
    with torch.no_grad():
        found = patch_matrix(here)
    torch.testing.assert_close(found, basis @ ratio.diag() @ basis.T, rtol=1e-6, atol=1e-6)
    nothing = torch.zeros(3, SIZE)
    here.rows = lambda: iter([Tokens(False, nothing, nothing, nothing, nothing + 1)])
    torch.testing.assert_close(patch_matrix(here), torch.eye(SIZE, dtype=torch.float64))


def test_the_patch_undoes_a_scale_per_channel_of_a_basis_that_is_not_symmetric() -> None:
    """Order 12, where Q and Qᵀ differ: a target made by scaling the coordinates h·Q is reached exactly (to 1e-12)."""
    basis, ratio = hadamard(12), torch.linspace(0.5, 3.0, 12, dtype=torch.float64)
    assert not torch.equal(basis, basis.T)
    u, r = drawn(30, 12, seed=1), drawn(30, 12, seed=2)
    z = (u + r) @ basis * ratio @ basis.T
    decoder = SimpleNamespace(hidden_size=12, model=SimpleNamespace(device=CPU))
    fake: Any = SimpleNamespace(decoder=decoder, rows=lambda: iter([Tokens(False, u, u, r, z)]))
    torch.testing.assert_close((u + r) @ patch_matrix(fake), z, rtol=1e-12, atol=1e-12)

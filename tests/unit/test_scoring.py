"""Scores of cuts and healing statistics, against forward passes of every row alone with all logits in float64."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from compress.core.errors import UserError
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.modeling.blocks import Decoder, without_blocks
from compress.modeling.cuts import Cut, gaps
from compress.modeling.load import load_model
from compress.prune.moments import Moments
from compress.prune.scoring import ROWS, SURE, Measure, Score, Scorer, behind
from torch import Tensor

BLOCKS, SIZE = 6, 32
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"mlp_bias": True, "tied": False}),
    ("qwen2", {}),
    ("qwen2", {"tied": False}),
    ("gemma3_text", SLIDING),
    ("phi3", {"tied": False}),
]
SIZES = [20, 1, 29, 2, 60, 31]  # tokens; the longest is cut
LENGTH = 48
# The parent, and cuts that contain it: alone, beside its gap, merging with it, before it, behind it, at both ends.
CHILDREN: list[tuple[Cut, list[Cut]]] = [
    ((), [(2,), (1, 3), (1, 2, 3), (0,), (0, 1, 4), (5,), (3, 4), ()]),
    ((3,), [(3,), (2, 3), (3, 4), (1, 3), (0, 3), (3, 5), (1, 3, 4), (1, 2, 3, 5)]),
    ((1, 4), [(0, 1, 4), (1, 2, 4), (1, 3, 4), (1, 2, 3, 4), (1, 4, 5)]),
]
SETTINGS: list[tuple[Measure, int]] = [("kl", 1), ("kl", 3), ("perplexity", 3)]  # and cuts in one forward pass
TOLERANCE = 1e-6  # nats; ten times what float32 costs here, half of what two cuts are at least apart


def rows(sizes: Sequence[int] = SIZES, seed: int = 5) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 300) for _ in range(size)] for size in sizes]


def packed(ids: list[list[int]], pad: int = 9, batch: int = 2, length: int = LENGTH) -> list[Batch]:
    return pack([Encoded(row, [True] * len(row)) for row in ids], length, batch, pad)


@pytest.fixture
def build(shaken: Callable[..., Path]) -> Callable[..., Any]:
    """A tiny model whose norms and biases are random too, so that none can be left out unseen."""

    def make(family: str = "llama", **options: Any) -> Any:
        options = {"blocks": BLOCKS, "hidden": SIZE, "heads": 2, "kv_heads": 1, "intermediate": 48} | options
        return load_model(shaken(family, **options))

    return make


def added(model: Any, block: int) -> Any:
    """The module whose output is what a block's MLP adds."""
    layer = model.model.layers[block]
    return layer.post_feedforward_layernorm if model.config.model_type == "gemma3_text" else layer.mlp.down_proj


@torch.no_grad()
def log_chances(model: Any, ids: list[list[int]], cut: Cut = (), maps: dict[int, Tensor] | None = None) -> list[Tensor]:
    """Of every row alone, (T, V) in float64, without some blocks and with maps behind some MLPs."""

    def through(map: Tensor) -> Any:
        return lambda _m, _a, out: out * map if map.ndim == 1 else out @ map

    handles = [added(model, block).register_forward_hook(through(map)) for block, map in (maps or {}).items()]
    with without_blocks(model, cut):
        logits = [model(input_ids=torch.tensor([row[:LENGTH]]), use_cache=False).logits[0] for row in ids]
    for handle in handles:
        handle.remove()
    return [part.double().log_softmax(-1) for part in logits]


def reference(
    model: Any, ids: list[list[int]], cuts: Iterable[Cut], moments: Moments | None = None
) -> dict[str, dict[Cut, float]]:
    """measure → cut → mean over all tokens that have a next one in their row."""
    whole = log_chances(model, ids)
    found: dict[str, dict[Cut, float]] = {"kl": {}, "perplexity": {}}
    for cut in sorted(set(cuts)):
        maps = {first - 1: moments.map(first, last) for first, last in gaps(cut) if first} if moments else {}
        after = log_chances(model, ids, cut, maps)
        divergences = [(old.exp() * (old - new)).sum(-1)[:-1] for old, new in zip(whole, after, strict=True)]
        chosen = [new[range(len(new) - 1), row[1 : len(new)]] for row, new in zip(ids, after, strict=True)]
        found["kl"][cut] = float(torch.cat(divergences).mean())
        found["perplexity"][cut] = -float(torch.cat(chosen).mean())
    return found


def silent(n: int = 1, note: str = "") -> None:
    return None


def statistics(model: Any, batches: Sequence[Batch], longest: int = 4, **options: Any) -> Moments:
    options = {"ridges": [1e-2], "toward": "identity"} | options
    return Moments(Decoder(model), batches, longest, options["ridges"], options["toward"], silent)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """A list of how many rows each run of a block was given."""
    seen: list[int] = []
    handles = [layer.register_forward_hook(lambda _m, _a, out: seen.append(len(out))) for layer in model.model.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("healed", [False, True], ids=["pruned", "healed"])
@pytest.mark.parametrize(("family", "options"), MODELS, ids=lambda value: str(value) if isinstance(value, str) else "")
def test_scores_are_those_of_rows_run_alone(
    build: Callable[..., Any], family: str, options: dict[str, Any], healed: bool
) -> None:
    model, ids = build(family, **options), rows()
    batches = packed(ids)
    assert len(batches) > 1 and any((batch.segment_ids < 0).any() for batch in batches)
    assert any((batch.segment_ids > 0).any() for batch in batches)  # several rows in one sequence
    moments = statistics(model, batches) if healed else None
    wanted = reference(model, ids, [cut for _, cuts in CHILDREN for cut in cuts], moments)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for measure, values in wanted.items():
        assert min(b - a for a, b in itertools.pairwise(sorted(values.values()))) > 2 * TOLERANCE, measure
    for measure, together in SETTINGS:
        scorer = Scorer(Decoder(model), batches, measure, moments)
        assert scorer.together == 1  # what a CPU is given
        scorer.together = together
        for parent, cuts in CHILDREN:
            found = scorer.score(cuts, parent)
            assert list(found) == cuts and all(score.complete for score in found.values())
            for cut, score in found.items():
                assert score.mean == pytest.approx(wanted[measure][cut], rel=0, abs=TOLERANCE), (measure, parent, cut)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(BLOCKS))


def test_the_unpruned_model_has_no_divergence_and_its_own_perplexity(build: Callable[..., Any]) -> None:
    model, ids = build(), rows()
    assert abs(Scorer(Decoder(model), packed(ids), "kl").score([()])[()].mean) < TOLERANCE
    loss = reference(model, ids, [()])["perplexity"][()]
    found = Scorer(Decoder(model), packed(ids), "perplexity").score([()])[()]
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert math.isfinite(Score(1e6).perplexity)


def test_what_is_padded_with_and_how_rows_are_batched_change_nothing(build: Callable[..., Any]) -> None:
    model, cuts = build(), [(2,), (1, 3)]
    scores = []
    for options in ({}, {"pad": 77}, {"batch": 1}, {"batch": 9}, {"length": 200}):
        ids = [row[:LENGTH] for row in rows()]
        scorer = Scorer(Decoder(model), packed(ids, **options), "kl")
        scores.append([score.mean for score in scorer.score(cuts).values()])
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=TOLERANCE)


def test_more_positions_than_have_logits_at_once(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, cuts = build(), [(2,), (1, 3)]
    whole = Scorer(Decoder(model), packed(rows()), "kl").score(cuts)
    monkeypatch.setattr("compress.prune.scoring.CHUNK", 7)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _a, out: sizes.append(len(out)))
    parts = Scorer(Decoder(model), packed(rows()), "kl").score(cuts)
    assert max(sizes) == 7
    for cut in cuts:
        assert parts[cut].mean == pytest.approx(whole[cut].mean, abs=TOLERANCE)


@pytest.mark.parametrize("healed", [False, True], ids=["pruned", "healed"])
@pytest.mark.parametrize("together", [1, 3])
def test_passes_are_what_the_blocks_were_given(build: Callable[..., Any], healed: bool, together: int) -> None:
    model, batches = build(), packed(rows())
    moments = statistics(model, batches) if healed else None
    scorer = Scorer(Decoder(model), batches, "kl", moments)
    scorer.together = together
    count = sum(len(batch.input_ids) for batch in batches) * BLOCKS
    with counted(model) as seen:
        scorer.prepare()
        assert scorer.passes == sum(seen) / count == 1.0
        scorer.prepare()
        for parent, cuts in CHILDREN:
            scorer.score(cuts, parent)
        assert scorer.spent == sum(seen) and scorer.passes == sum(seen) / count
        before = scorer.spent
        scorer.score([(3,), (4,)])  # four blocks shared, then 4 and 5 of the one and 5 of the other
        scorer.score([(1, 4), (4, 5)], (4,))  # 0-3 shared; then 2, 3 and 5; nothing is left of the other
        assert scorer.spent - before == (7 + 8 - 1) * count // BLOCKS


def test_a_cut_must_contain_its_parent(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"\(1, 3\) does not extend \(2,\)"):
        Scorer(Decoder(build()), packed(rows()), "kl").score([(1, 3)], (2,))


def test_models_that_cap_their_logits_are_refused(build: Callable[..., Any]) -> None:
    model = build("gemma3_text", final_logit_softcapping=30.0, **SLIDING)
    for measure in get_args(Measure):
        with pytest.raises(UserError, match=f"cannot be scored by {measure} for a model that caps its logits"):
            Scorer(Decoder(model), packed(rows()), measure)


def test_rows_without_a_second_token_are_nothing_to_score_on(build: Callable[..., Any]) -> None:
    decoder = Decoder(build())
    for batches in ([], packed(rows([1, 1, 1]))):
        with pytest.raises(UserError, match="nothing to score blocks on"):
            Scorer(decoder, batches, "kl")
    some, more = packed(rows([40])), packed(rows([40])) + packed(rows([1]))
    assert Scorer(decoder, more, "kl").score([(2,)]) == Scorer(decoder, some, "kl").score([(2,)])


@pytest.fixture
def lopsided(build: Callable[..., Any]) -> Any:
    """Blocks 1, 2 and 4 add next to nothing, so that all others are clearly worse to drop."""
    model = build()
    for block in (1, 2, 4):
        for linear in (model.model.layers[block].self_attn.o_proj, model.model.layers[block].mlp.down_proj):
            linear.weight.data *= 0.02 * (block + 1)
    return model


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_clearly_worse_cuts_are_given_up_and_the_best_are_the_same(lopsided: Any, keep: int) -> None:
    batches, cuts = packed(rows([40] * 16), batch=2), [(block,) for block in range(BLOCKS)]
    patient, racing = (Scorer(Decoder(lopsided), batches, "kl") for _ in range(2))
    steps: list[int] = []
    whole = patient.score(cuts)
    with counted(lopsided) as seen:
        found = racing.score(cuts, keep=keep, advance=lambda n=1, note="": steps.append(n))
    best = sorted(cuts, key=lambda cut: whole[cut].mean)[:keep]
    assert set(best) <= {(1,), (2,), (4,)}
    assert all(found[cut] == whole[cut] for cut in best)  # to the last bit
    given_up = [cut for cut in cuts if not found[cut].complete]
    assert {(0,), (3,), (5,)} <= set(given_up) and list(found) == cuts and sum(steps) == len(cuts)
    assert racing.spent == sum(seen) and racing.passes < 0.82 * patient.passes
    first = Scorer(Decoder(lopsided), batches[: ROWS // 2], "kl").score([(0,)])[(0,)]
    assert found[(0,)].mean == pytest.approx(first.mean, abs=TOLERANCE)  # after `ROWS` rows, and no later


def test_no_cut_is_given_up_where_all_can_be_kept_or_rows_are_few(lopsided: Any) -> None:
    cuts: list[Cut] = [(block,) for block in range(BLOCKS)]
    for count, keep in ((16, BLOCKS), (16, None), (ROWS, 1), (2, 1)):  # the last batch ends the race anyway
        scorer = Scorer(Decoder(lopsided), packed(rows([40] * count), batch=2), "kl")
        assert all(score.complete for score in scorer.score(cuts, keep=keep).values())


def test_behind_is_a_paired_test_against_the_last_that_is_kept() -> None:
    draw = torch.Generator().manual_seed(4)
    row = torch.rand(20, generator=draw, dtype=torch.float64) * 50  # rows differ far more than cuts do
    noise = torch.randn(20, generator=draw, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()

    def seen(shifts: Sequence[float], count: int = 20) -> dict[Cut, list[Tensor]]:
        """Cut i is worse than cut 0 by `shifts[i]` where i is the standard error of their difference."""
        found = {}
        for number, shift in enumerate(shifts):
            losses = row + number * noise + shift / 20**0.5
            table = torch.stack([losses, torch.full((20,), 7.0, dtype=torch.float64)], dim=1)[:count]
            found[(number,)] = list(table.split(2))
        return found

    assert behind(seen([0, SURE + 0.01, 2 * SURE - 0.01, 50]), 1) == [(1,), (3,)]  # from the best to the worst
    assert behind(seen([0, 50, 50 + SURE - 0.01, 50 + 2 * SURE + 0.01]), 2) == [(3,)]  # behind cut 1, not cut 0
    assert behind(seen([0, SURE + 0.01]), 2) == []
    assert behind(seen([0, 0, 0]), 1) == []  # equals
    assert behind(seen([0, 50], ROWS), 1) == [(1,)] and behind(seen([0, 50], ROWS - 1), 1) == []


def stored(model: Any, ids: list[list[int]]) -> dict[str, list[list[Tensor]]]:
    """ "mlp" (what it adds) and "output" of every block for each row run alone, float64."""
    seen: dict[str, list[list[Tensor]]] = {name: [[] for _ in model.model.layers] for name in ("mlp", "output")}
    handles = []
    for number, layer in enumerate(model.model.layers):
        for name, module in (("mlp", added(model, number)), ("output", layer)):
            kept = seen[name][number]
            handles.append(module.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0].double())))
    with torch.no_grad():
        for row in ids:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def least_squares(u: Tensor, d: Tensor, ridge: float, toward: str, full: bool) -> Tensor:
    """argmin ‖U·T − D‖² + α‖T − T₀‖², α = ridge · ‖U‖² / H, as plain least-squares problems."""
    weight = float((ridge * u.square().sum() / u.shape[1]).sqrt())
    start = weight if toward == "identity" else 0.0
    if full:
        eye = torch.eye(u.shape[1], dtype=torch.float64)
        return torch.linalg.lstsq(torch.cat([u, weight * eye]), torch.cat([d, start * eye]), driver="gelsd").solution
    ones = torch.ones(1, 1, dtype=torch.float64)
    columns = zip(u.T[:, :, None], d.T[:, :, None], strict=True)
    return torch.cat(
        [
            torch.linalg.lstsq(torch.cat([x, weight * ones]), torch.cat([y, start * ones])).solution[0]
            for x, y in columns
        ]
    )


WIDE = [40, 33, 48, 29, 37, 45, 26, 44, 31, 48, 39, 28]  # none fits beside another: row i is packed sequence i


@pytest.mark.parametrize("toward", ["identity", "zero"])
@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("qwen2", {}), ("gemma3_text", SLIDING), ("phi3", {})])
@pytest.mark.parametrize("count", [3, 12])
def test_maps_are_least_squares_with_the_ridge_that_held_out_rows_choose(
    build: Callable[..., Any], family: str, options: dict[str, Any], count: int, toward: str
) -> None:
    """Every eighth row is held out, of fewer rows the last one."""
    model, ids, ridges = build(family, **options), rows(WIDE[:count]), [1e2, 1e-4, 1e-2, 1.0]
    full = family != "gemma3_text"
    held = {7} if count == 12 else {2}
    found = statistics(model, packed(ids, batch=5), ridges=ridges, toward=toward)
    whole, turned = stored(model, ids), []

    def problem(block: int, last: int, of_held: bool) -> tuple[Tensor, Tensor]:
        mlp, before, after = whole["mlp"][block], whole["output"][block], whole["output"][last]
        numbers = [number for number in range(count) if (number in held) == of_held]
        u = torch.cat([mlp[number] for number in numbers])
        return u, torch.cat([after[number] - (before[number] - mlp[number]) for number in numbers])

    for first, last in [(1, 1), (1, 4), (2, 3), (3, 3), (4, 5), (5, 5)]:
        fitted, other = problem(first - 1, last, False), problem(first - 1, last, True)
        maps = {ridge: least_squares(*fitted, ridge, toward, full) for ridge in ridges}
        errors = {
            ridge: float(((other[0] @ map if full else other[0] * map) - other[1]).square().sum())
            for ridge, map in maps.items()
        }
        best = min(ridges, key=lambda ridge: errors[ridge])
        map = found.map(first, last)
        assert map.dtype == torch.float32 and map.shape == ((SIZE, SIZE) if full else (SIZE,))
        tolerance = 3e-3 if full else 2e-6  # sums are float32, and weak ridges leave a matrix badly conditioned
        torch.testing.assert_close(map.double(), maps[best], rtol=0, atol=tolerance)
        u, d = (torch.cat(parts) for parts in zip(fitted, other, strict=True))  # of all rows
        wrong = [least_squares(u, d, best, toward, full), *(maps[ridge] for ridge in ridges if ridge != best)]
        assert min(float((map - maps[best]).abs().max()) for map in wrong) > 0.03  # each of these would be seen
        swapped = least_squares(*fitted, best, "zero" if toward == "identity" else "identity", full)
        turned.append(float((swapped - maps[best]).abs().max()))
    assert max(turned) > 0.03


def test_statistics_do_not_grow_with_tokens(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.prune.moments.HELD", 40)
    model = build()
    few, many = (statistics(model, packed(rows(WIDE * times)), 2) for times in (1, 4))
    for found in (few, many):
        assert [part.shape for part in found._uu] == [(SIZE, SIZE)] * BLOCKS
        assert sorted(found._ud) == [(i, j) for i in range(BLOCKS) for j in range(i + 1, min(i + 3, BLOCKS))]
        assert {part.shape for part in found._ud.values()} == {(SIZE, SIZE)}
        assert {len(part) for part in found._held.mlp + found._held.after} == {40}
    slim = statistics(build("gemma3_text", **SLIDING), packed(rows(WIDE)), 2)
    assert {part.shape for part in [*slim._uu, *slim._ud.values()]} == {(SIZE,)}


def test_what_statistics_cannot_be_gathered_or_solved_is_refused(build: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"two packed calibration rows; raise prune\.calibration\.tokens"):
        statistics(build(), packed(rows([30])))
    for family, options in (("llama", {}), ("gemma3_text", SLIDING)):
        model = build(family, **options)
        if family == "llama":
            model.model.layers[1].mlp.down_proj.weight.data.zero_()
        else:
            model.model.layers[1].post_feedforward_layernorm.weight.data.fill_(-1)
        found = statistics(model, packed(rows(WIDE)))
        with pytest.raises(UserError, match=r"no map for the blocks 2 to 3 with the ridge 0\.01; give"):
            found.map(2, 3)
        assert found.map(3, 3).isfinite().all()

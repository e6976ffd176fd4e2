"""Searches against brute force, on tables of scores, and killed half-way."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from compress.core.errors import UserError
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.data.repeated import read_twice
from compress.modeling.blocks import without_blocks
from compress.modeling.cuts import Cut, gaps
from compress.modeling.load import load_model
from compress.prune import searches
from compress.prune.config import PruneConfig
from compress.prune.importance import Distances
from compress.prune.metrics import METRICS
from compress.prune.metrics.kl import Kl
from compress.prune.scoring import Scorer
from compress.prune.searches import choose
from compress.prune.study import Study, read_ledger
from compress.prune.trials import Trials
from torch import Tensor

BLOCKS = 6
INNER = range(1, BLOCKS - 1)  # what may go where gaps are healed
KINDS = searches.SEARCHES.names
FITTED, SCORED, HELD_OUT = ([40] * 10, 1), ([20, 1, 35, 2, 48, 31, 40, 44, 39, 12], 2), ([33, 40, 25], 3)


def rows(sizes: Sequence[int], seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 300) for _ in range(size)] for size in sizes]


def packed(ids: list[list[int]]) -> list[Batch]:
    return pack([Encoded(row, [True] * len(row)) for row in ids], 48, 2, 9)


@pytest.fixture
def model(shaken: Callable[..., Path]) -> Any:
    return load_model(shaken(blocks=BLOCKS, hidden=32, heads=2, kv_heads=1, intermediate=48))


def study(model: Any, **options: Any) -> Study:
    batches = [packed(rows(*part)) for part in (FITTED, SCORED, HELD_OUT)]
    return Study(model, batches[0], **({"scoring": batches[1], "held_out": batches[2]} | options))


def config(kind: str, blocks: int = 2, heal: str = "none", importance: str = "angular", **search: Any) -> PruneConfig:
    return PruneConfig.model_validate(
        {"blocks": blocks, "search": {"kind": kind} | search, "heal": heal, "importance": importance}
    )


class Reference:
    """Cuts scored slowly: every row alone, all logits, float64; gaps healed by the study's maps, or not."""

    def __init__(self, model: Any, ids: list[list[int]], measure: str, moments: Any = None):
        self.model, self.ids, self.measure, self.moments = model, ids, measure, moments
        self.whole = self.logs(())
        self.known: dict[Cut, float] = {}

    @torch.no_grad()
    def logs(self, cut: Cut) -> Tensor:
        handles = []
        for first, last in gaps(cut) if self.moments else []:
            map = self.moments.map(first, last)
            module = self.model.model.layers[first - 1].mlp.down_proj
            handles.append(module.register_forward_hook(lambda _m, _a, out, map=map: out @ map))
        with without_blocks(self.model, cut):
            logits = [self.model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] for row in self.ids]
        for handle in handles:
            handle.remove()
        return torch.cat(logits).double().log_softmax(-1)

    def __call__(self, cut: Cut) -> float:
        if cut not in self.known:
            after = self.logs(cut)
            following = torch.tensor([token for row in self.ids for token in row[1:]])
            nll = -after.gather(1, following[:, None]).mean()
            divergence = (self.whole.exp() * (self.whole - after)).sum(-1).mean()
            self.known[cut] = float(divergence if self.measure == "kl" else nll)
        return self.known[cut]


@pytest.mark.parametrize("healed", [False, True], ids=["pruned", "healed"])
@pytest.mark.parametrize("measure", ["kl", "perplexity"])
def test_greedy_is_brute_force_block_by_block(model: Any, measure: str, healed: bool) -> None:
    known, candidates = study(model), INNER if healed else range(BLOCKS - 1)
    chosen = config("greedy", 3, score=measure, healed=healed, heal="linear" if healed else "none")
    found = choose(known, chosen, 3, candidates)
    moments = known.moments(3, chosen.heal.ridge, chosen.heal.toward) if healed else None  # type: ignore[union-attr]
    score = Reference(model, rows(*SCORED), measure, moments)
    cut: Cut = ()
    for record in known.notes["rounds"]:
        cut = min((tuple(sorted([*cut, other])) for other in candidates if other not in cut), key=score)
        assert record == {"dropped": list(cut), "score": pytest.approx(score(cut), abs=1e-6)}
    assert len(cut) == 3
    first = sorted(score((block,)) for block in candidates)
    assert min(b - a for a, b in itertools.pairwise(first)) > 1e-5  # ten times the tolerance
    guard, held_out = known.notes["guard"], Reference(model, rows(*HELD_OUT), measure, moments)
    assert list(guard) == ["greedy", "angular window", "lowest influence"] and guard["greedy"]["dropped"] == list(cut)
    for entry in guard.values():
        assert entry["held_out"] == pytest.approx(held_out(tuple(entry["dropped"])), abs=1e-6)
    assert found == min((tuple(entry["dropped"]) for entry in guard.values()), key=held_out)


def test_whether_cuts_are_scored_healed_follows_the_recipe(model: Any) -> None:
    scores, studies = {}, {heal: study(model) for heal in ("none", "linear", "cosine")}
    for heal, healed in itertools.product(studies, (None, True, False)):
        known = studies[heal]  # one study of all three: what is written down says which it was
        cast(dict[str, Any], known.notes).clear()
        choose(known, config("greedy", 1, heal=heal, healed=healed, guard=False), 1, INNER)
        scores[heal, healed] = known.notes["rounds"][0]["score"]
    assert scores["linear", None] == scores["linear", True] != scores["linear", False] == scores["none", None]
    assert scores["cosine", None] == scores["cosine", True] and scores["none", False] == scores["none", None]
    assert scores["none", True] != scores["none", None]


@pytest.mark.parametrize("measure", ["kl", "perplexity"])
def test_a_beam_as_wide_as_there_are_cuts_is_exhaustive(model: Any, measure: str) -> None:
    known, candidates = study(model), range(BLOCKS - 1)
    beam = config("beam", score=measure, width=10, patience=0, guard=False)
    found = choose(known, beam, 2, candidates)
    pairs = list(itertools.combinations(candidates, 2))
    score, held_out = (Reference(model, rows(*part), measure) for part in (SCORED, HELD_OUT))
    best = min(pairs, key=score)
    assert known.notes["rounds"][1] == {"dropped": list(best), "score": pytest.approx(score(best), abs=1e-6)}
    assert found == min(pairs, key=held_out)  # which of the finalists it is, held-out rows decide
    known = study(model, held_out=packed(rows(*SCORED)))
    assert choose(known, beam, 2, candidates) == best


@pytest.fixture
def tables(noted: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, model: Any) -> Callable[..., Study]:
    """tables(scores, held_out) → a study whose trials read scores from tables; `notes["asked"]` are the parents."""

    def make(scores: dict[Cut, float], held_out: dict[Cut, float] | None = None) -> Study:
        known = study(model, progress=noted())

        def look_up(self: Trials, cuts: list[Cut], parent: Cut, keep: int) -> dict[Cut, float]:
            assert all(set(parent) < set(c) for c in cuts)
            cast(dict[str, Any], self.study.notes).setdefault("asked", []).append((parent, keep))
            return {c: scores.get(c, 9.0) for c in cuts}

        monkeypatch.setattr(Trials, "_scores", look_up)
        monkeypatch.setattr(Trials, "held_out", lambda _self, c: (held_out or scores).get(c, 9.0))
        return known

    return make


SINGLES: dict[Cut, float] = {(1,): 0.1, (2,): 0.5, (3,): 0.6, (4,): 0.7}
TRAP = SINGLES | {(1, 2): 3.0, (1, 3): 3.1, (1, 4): 3.2, (2, 3): 0.2, (2, 4): 2.0, (3, 4): 2.5}


def test_an_exchange_leads_out_of_where_greedy_is_caught(tables: Callable[..., Study]) -> None:
    assert choose(tables(TRAP), config("greedy", guard=False), 2, INNER) == (1, 2)
    for patience, wanted in ((0, (1, 2)), (1, (2, 3)), (5, (2, 3))):
        found = choose(tables(TRAP), config("beam", width=1, patience=patience, guard=False), 2, INNER)
        assert found == wanted
    assert choose(tables(TRAP), config("beam", width=2, patience=0, guard=False), 2, INNER) == (2, 3)


def test_a_beam_keeps_the_best_of_each_size_and_grows_each(tables: Callable[..., Study]) -> None:
    known = tables(TRAP | {(1, 2, 3): 5.0, (1, 3, 4): 4.0, (2, 3, 4): 6.0})
    assert choose(known, config("beam", 3, width=2, patience=0, guard=False), 3, INNER) == (1, 2, 3)
    # (1, 3, 4) grows from neither (2, 3) nor (2, 4).
    assert known.notes["asked"] == [((), 2), ((1,), 2), ((2,), 2), ((2, 3), 2), ((2, 4), 2)]
    assert known.notes["rounds"] == [
        {"dropped": [1], "score": 0.1},
        {"dropped": [2, 3], "score": 0.2},
        {"dropped": [1, 2, 3], "score": 5.0},
    ]


# (1, 2) is what the beam finds; the way to (3, 4) leads over (1, 3), which is worse.
HILL = SINGLES | {(1, 2): 1.0, (1, 3): 2.0, (3, 4): 0.5, (2, 3): 3.0, (2, 4): 3.5, (1, 4): 4.0}


@pytest.mark.parametrize(("patience", "wanted", "rounds"), [(0, (1, 2), 0), (1, (1, 2), 1), (2, (3, 4), 4)])
def test_patience_ends_the_exchanges(tables: Callable[..., Study], patience: int, wanted: Cut, rounds: int) -> None:
    known = tables(HILL)
    assert choose(known, config("beam", width=1, patience=patience, guard=False), 2, INNER) == wanted
    asked = known.notes["asked"][2:]  # after the rounds that grow
    assert len(asked) == 2 * rounds and all(len(parent) == 1 and keep == 1 for parent, keep in asked)


def test_exchanges_end_where_all_was_visited(tables: Callable[..., Study]) -> None:
    known = tables(HILL)
    assert choose(known, config("beam", width=1, patience=99, guard=False), 2, INNER) == (3, 4)
    assert len(known.notes["asked"]) == 2 + 2 * 6  # the five other pairs, and the round that finds none
    assert choose(tables(HILL), config("beam", patience=99, guard=False), 2, range(1, 3)) == (1, 2)


def test_held_out_rows_choose_between_finalists_and_exchanges(tables: Callable[..., Study]) -> None:
    other: dict[Cut, float] = {(1, 2): 0.1, (2, 3): 0.3, (2, 4): 0.2}
    beam = config("beam", width=1, patience=1, guard=False)
    assert choose(tables(TRAP, other), beam, 2, INNER) == (1, 2)  # an exchange that only scoring rows like
    wide = config("beam", width=3, patience=0, guard=False)
    assert choose(tables(TRAP, other), wide, 2, INNER) == (2, 4)  # third on the scoring rows


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_the_guard_takes_a_cheap_cut_where_held_out_rows_prefer_it(tables: Callable[..., Study], kind: str) -> None:
    """Both cheap cuts come from a pass whose angles favour blocks 3 and 4, and its influence 1 and 3."""
    angular, influence = (torch.ones(BLOCKS + 1, BLOCKS + 1, dtype=torch.float64) for _ in range(2))
    angular[3, 5] = influence[1, 2] = influence[3, 4] = 0.5
    distances = {"all": Distances(angular, influence, torch.ones_like(angular), 1)}
    cheap, free = {"angular window": (3, 4), "lowest influence": (1, 3)}, (2, 4)
    scores = {(block,): 1.0 for block in INNER} | {(2,): 0.1, free: 0.2}
    for name, wanted in [*cheap.items(), (kind, free)]:
        held_out = {cut: 2.0 for cut in [free, *cheap.values()]} | {wanted: 1.0}
        known = tables(scores, held_out)
        vars(known)["distances"] = distances
        options: dict[str, Any] = {} if kind == "greedy" else {"width": 1, "patience": 0}
        assert choose(known, config(kind, importance="magnitude", **options), 2, INNER) == wanted
        assert known.notes["guard"] == {
            key: {"dropped": list(cut), "held_out": held_out[cut]} for key, cut in {kind: free, **cheap}.items()
        }
        told = [line for line in cast(Any, known.progress).texts if "held-out rows prefer" in line]
        assert len(told) == (wanted != free) and all(f"prefer the {name} (" in line for line in told)
        known = tables(scores, held_out)
        assert choose(known, config(kind, guard=False, **options), 2, INNER) == free
        assert "guard" not in known.notes


class Killed(Exception):
    pass


class Kill:
    """Counts what scorers are asked for, and raises after the work of a round is done but before it is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls, self.limit = 0, 10**9
        plain = Scorer.score

        def score(scorer: Scorer, *args: Any, **options: Any) -> Any:
            found = plain(scorer, *args, **options)
            if self.calls == self.limit:
                raise Killed
            self.calls += 1
            return found

        monkeypatch.setattr(Scorer, "score", score)

    def __call__(self, known: Study, chosen: PruneConfig, limit: int = 10**9) -> tuple[Cut, int]:
        self.calls, self.limit = 0, limit
        return choose(known, chosen, 2, INNER), self.calls


SEARCHES = [
    ("greedy", {"score": "kl"}),
    ("greedy", {"score": "perplexity", "healed": True}),
    ("beam", {"width": 2, "patience": 2, "healed": True}),
]


@pytest.mark.parametrize(("kind", "options"), SEARCHES)
def test_a_killed_search_goes_on_and_ends_the_same(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    kill, chosen = Kill(monkeypatch), config(kind, **options)
    whole = study(model)
    wanted, calls = kill(whole, chosen)
    assert calls >= 4
    for rounds in sorted({1, calls // 2, calls - 1}):
        ledger = tmp_path / f"work{rounds}" / "search.jsonl"
        with pytest.raises(Killed):
            kill(study(model, ledger=ledger), chosen, rounds)
        assert len(ledger.read_text().splitlines()) == rounds
        known = study(model, ledger=ledger)
        assert kill(known, chosen) == (wanted, calls - rounds)
        assert json.dumps(known.notes) == json.dumps(whole.notes)  # to the last bit
        assert kill(study(model, ledger=ledger), chosen) == (wanted, 0)


def test_a_ledger_line_cut_short_is_scored_again(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill, chosen, ledger = Kill(monkeypatch), config("greedy"), tmp_path / "search.jsonl"
    whole = study(model, ledger=ledger)
    wanted, calls = kill(whole, chosen)
    lines = ledger.read_text().splitlines(keepends=True)
    assert len(lines) == calls
    for rest in (lines[-1][:-1], lines[-1][:5]):  # without its end of line, too, a line may be cut short
        ledger.write_text("".join(lines[:-1]) + rest)
        known = study(model, ledger=ledger)
        assert ledger.read_text() == "".join(lines[:-1])
        assert kill(known, chosen) == (wanted, 1) and known.notes == whole.notes
        assert ledger.read_text() == "".join(lines)
    ledger.write_text(lines[0][:9])
    assert read_ledger(ledger) == {} and ledger.read_text() == ""
    assert read_ledger(tmp_path / "none.jsonl") == {}


def test_larger_cuts_of_one_study_score_no_round_twice(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `blocks: auto` asks: the record is that of the largest cut alone."""
    kill, chosen = Kill(monkeypatch), config("greedy", guard=False)
    grown, alone = study(model), study(model)
    cuts = [choose(grown, chosen, count, INNER) for count in (1, 2, 3)]
    assert kill.calls == 3
    assert cuts[-1] == choose(alone, chosen, 3, INNER) and [len(found) for found in cuts] == [1, 2, 3]
    assert grown.notes == alone.notes and len(alone.notes["rounds"]) == 3


def test_passes_noted_are_those_of_the_scoring_rounds(model: Any) -> None:
    known = study(model)
    scorer = known.scorer("kl")
    choose(known, config("greedy", guard=False), 2, INNER)
    assert known.notes["passes"] == pytest.approx(scorer.passes - 1)  # the one that the unpruned model's figures take
    assert 1 < known.notes["passes"] < 4 + 3  # a pass per cut


@pytest.mark.parametrize("kind", KINDS)
def test_no_block_and_too_many(model: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(Scorer, "score", lambda *_, **__: pytest.fail("nothing is to be scored"))
    assert choose(study(model), config(kind), 0, INNER) == ()
    with pytest.raises(UserError, match=r"prune\.blocks is 5, but only 4 blocks can be removed \(blocks 1 to 4\)"):
        choose(study(model), config(kind), 5, INNER)
    with pytest.raises(UserError, match=r"only 0 blocks can be removed; lower"):
        choose(study(model), config(kind), 1, range(1, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_all_candidates_leave_no_choice(model: Any, kind: str) -> None:
    assert choose(study(model), config(kind), 4, INNER) == (1, 2, 3, 4)


def test_single_blocks_are_chosen_by_the_metric(model: Any) -> None:
    for importance in METRICS.names:
        known = study(model)
        values = METRICS.get(importance).model_validate({}).windows(known, 1)
        wanted = (min(INNER, key=lambda block: values[block]),)
        for kind in ("window", "lowest"):
            assert choose(known, config(kind, importance=importance), 1, INNER) == wanted, importance
    for kind in ("greedy", "beam"):
        known = study(model)
        choose(known, config(kind, patience=0, width=1, guard=False) if kind == "beam" else config(kind), 1, INNER)
        values = Kl().windows(known, 1)
        best = min(INNER, key=lambda block: values[block])
        assert known.notes["rounds"] == [{"dropped": [best], "score": pytest.approx(values[best], abs=1e-6)}]


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_without_rows_nothing_is_searched(model: Any, kind: str) -> None:
    short = packed(rows([1, 1], 4))
    for rows_ in ({"scoring": []}, {"scoring": short}, {"held_out": []}, {"held_out": short}):
        with pytest.raises(UserError, match="nothing to score blocks on"):
            choose(study(model, **rows_), config(kind), 2, INNER)
    with pytest.raises(UserError, match="needs two packed calibration rows"):
        few = Study(model, packed(rows([40], 1)), scoring=packed(rows(*SCORED)), held_out=packed(rows(*HELD_OUT)))
        choose(few, config(kind, heal="linear"), 2, INNER)


def test_a_text_is_read_twice_within_its_segment(model: Any) -> None:
    batches = packed(rows([20, 21, 48, 1, 30, 44, 9], 4))
    both = list(zip(batches, read_twice(batches, 1.0), strict=True))
    for before, after in both:
        for row, segments in enumerate(before.segment_ids.tolist()):
            places: dict[int, list[int]] = {}
            for place, segment in enumerate(segments):
                places.setdefault(segment, []).append(place)
            for segment, where in places.items():
                old = before.input_ids[row, where].tolist()
                half = 0 if segment < 0 else len(old) // 2  # padding stays
                wanted = old[:half] + old[:half] + old[2 * half :]
                assert after.input_ids[row, where].tolist() == wanted
        assert after.segment_ids is before.segment_ids and after.position_ids is before.position_ids
    assert any(not torch.equal(before.input_ids, after.input_ids) for before, after in both)


@pytest.mark.parametrize(("share", "wanted"), [(0.0, []), (0.5, [1, 3, 5]), (0.34, [2, 5]), (1.0, [0, 1, 2, 3, 4, 5])])
def test_the_share_of_rows_read_twice_is_spread(share: float, wanted: list[int]) -> None:
    batches = packed(rows([48] * 6, 5))
    pairs = zip(batches, read_twice(batches, share), strict=True)
    same = torch.cat([(before.input_ids == after.input_ids).all(1) for before, after in pairs])
    assert (~same).nonzero().flatten().tolist() == wanted

"""The rules of a bounded KV cache alone: which entries stay, however a text is cut, against a slow account of them; and
that a policy in one new file serves torch, ONNX Runtime and llama.cpp."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.evaluation.config import RetrievalConfig
from compress.evaluation.kv_cache import KVCache
from compress.export.gguf import write_gguf
from compress.export.onnx import write_onnx
from compress.kv import policies
from compress.kv.eviction import best, entry_scores, worst
from compress.kv.policies import POLICIES, make, policy
from compress.kv.policies.random import Random
from compress.kv.policies.recent import Recent
from compress.kv.policies.retaining import Retaining, pooled
from compress.kv.policies.snapkv import SnapKV
from compress.kv.policy import View
from compress.kv.settings import HeadSettings, KvBudget, choose_budget, read_settings
from compress.kv.steps import most_held, read_in_steps, steps
from compress.kv.tokens import HeldTokens
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model
from compress.modeling.retaining import RetainingHeads
from compress.modeling.shape import AttentionShape
from compress.records.bundle import RetainingEntry
from compress.runtime.generator import Request, RequestWork
from compress.runtime.onnx_generator import BoundedGenerator
from pydantic import ValidationError

# What entries of one block stay, with everything that is kept in lists, and nothing taken from `kv`.


def slow_scores(settings: KvBudget, predicted: list[float], start: int, end: int) -> list[float]:
    """Scores of the tokens `start` to `end`, read together."""
    if settings.policy == "recent":
        return [math.inf if place < 4 else place for place in range(start, end)]
    found = []
    for place in range(start, end):
        near = [predicted[p] for p in range(start, end) if abs(p - place) <= settings.pool // 2]
        found.append(math.inf if place < settings.sinks else math.fsum(near) / len(near))
    return found


def slow_head(settings: KvBudget, predicted: list[float], turns: list[tuple[int, int]]) -> list[list[int]]:
    """Places that one KV head holds after each turn: a prompt of so many tokens, then so many written."""
    budget, local, held, place, seen = settings.budget or 10**9, settings.local, [], 0, []

    def read(count: int) -> None:
        nonlocal place
        scores = slow_scores(settings, predicted, place, place + count)
        held.extend(zip(range(place, place + count), scores, strict=True))
        place += count

    def evict(room: int, newest: int) -> None:
        while len(held) > room:
            worth = [score if i < len(held) - newest else math.inf for i, (_, score) in enumerate(held)]
            held.pop(max(i for i in range(len(held)) if worth[i] == min(worth)))

    for prompt, written in turns:
        body = max(0, prompt - local)
        if len(held) + min(prompt, local) > budget + local:
            evict(budget, settings.stabilizers if body else 0)
        for start in range(0, body, settings.chunk):
            count = min(settings.chunk, body - start)
            read(count)
            evict(budget, settings.stabilizers if start + count < body else 0)
        read(prompt - body)
        for _ in range(written):
            if settings.evict_decoding:
                evict(budget + local - 1, local)
            read(1)
        seen.append([place for place, _ in held])
    return seen


class Block:
    """One block's entries in numpy arrays, by the functions of `kv` as the runtimes call them."""

    def __init__(self, settings: KvBudget, predicted: np.ndarray):
        self.settings, self.policy, self.predicted = settings, make(settings), predicted
        self.places, self.scores = np.empty((len(predicted), 0), int), np.empty((len(predicted), 0), np.float32)
        self.read_tokens = self.most = 0

    def read(self, ids: Any, decoding: bool = False) -> None:
        new = np.arange(self.read_tokens, self.read_tokens + len(ids))
        said = self.predicted[:, new] if "heads" in self.policy.needs else None
        scores = entry_scores(self.policy, View(0, len(self.predicted), new, decoding, said))
        self.places = np.concatenate([self.places, np.repeat(new[None], len(self.predicted), 0)], 1)
        self.scores = np.concatenate([self.scores, scores], 1)
        self.read_tokens += len(ids)
        self.most = max(self.most, self.places.shape[1])

    def keep(self, count: int, protected: int) -> None:
        if self.places.shape[1] > count:
            kept = best(self.scores, count, protected)
            if count == self.places.shape[1] - 1:  # the quick way to drop a single one
                gone = [set(range(count + 1)) - set(row) for row in kept.tolist()]
                assert [{index} for index in worst(self.scores, protected).tolist()] == gone
            self.places, self.scores = (np.take_along_axis(part, kept, 1) for part in (self.places, self.scores))

    def turn(self, prompt: int, written: int) -> list[list[int]]:
        settings, budget = self.settings, self.settings.budget or 10**9
        plan = steps(prompt, settings, self.places.shape[1])
        read_in_steps(range(prompt), plan, self.read, lambda protected: self.keep(budget, protected))
        for _ in range(written):
            if settings.evict_decoding:
                self.keep(budget + settings.local - 1, settings.local)
            self.read([0], decoding=True)
        return self.places.tolist()


EDGES: dict[str, KvBudget] = {
    "as shipped": KvBudget(24, 16, 6, 8, pool=9, sinks=4),
    "as published": KvBudget(24, 16, 6, 8),
    "newest": KvBudget(24, 16, 6, 8, policy="recent"),
    "a budget larger than the text": KvBudget(500, 16, 6, 8, pool=3, sinks=2),
    "no budget": KvBudget(None, 16, 6, 8, pool=3, sinks=2),
    "a budget smaller than first tokens and stabilizers together": KvBudget(5, 16, 4, 8, pool=3, sinks=4),
    "a budget smaller than the first tokens": KvBudget(3, 16, 0, 8, pool=3, sinks=9),
    "a budget smaller than the newest policy's first tokens": KvBudget(2, 16, 1, 8, policy="recent"),
    "a budget of one": KvBudget(1, 7, 0, 1, evict_decoding=True),
    "all of it stabilizers": KvBudget(6, 16, 6, 8),
    "no local tail": KvBudget(12, 5, 2, 0),
    "a local tail longer than the text": KvBudget(12, 5, 2, 300),
    "token by token": KvBudget(12, 1, 3, 4, pool=5, sinks=1),
    "one chunk": KvBudget(12, 500, 3, 4, pool=5, sinks=1),
    "evicting while it writes": KvBudget(12, 7, 3, 4, pool=3, sinks=2, evict_decoding=True),
}


@pytest.mark.parametrize("heads", [1, 3], ids=["one head", "three"])
@pytest.mark.parametrize("name", EDGES)
def test_the_entries_that_stay_are_those_of_a_slow_account(name, heads):
    settings = EDGES[name]
    for seed, turns in enumerate([[(60, 5)], [(33, 12), (3, 9), (40, 2)], [(1, 0)], [(9, 20), (9, 20)]]):
        draw = np.random.default_rng(seed)
        predicted = draw.integers(-6, 6, (heads, 160)).astype(np.float32)  # with many equal ones
        if settings.pool > 1:
            predicted = draw.normal(size=(heads, 160)).astype(np.float32)
        block = Block(settings, predicted)
        found = [block.turn(*turn) for turn in turns]
        for head in range(heads):
            assert [turn[head] for turn in found] == slow_head(settings, predicted[head].tolist(), turns)
        if len(turns) == 1:
            assert block.most <= most_held(settings, *turns[0])
            fits = settings.budget is None or turns[0][0] <= settings.budget
            assert not fits or block.most == most_held(settings, *turns[0]) or settings.evict_decoding


def test_means_over_neighbours():
    scores = np.random.default_rng(0).normal(100, 1, (3, 20)).astype(np.float32)
    for kernel in (1, 3, 9, 41):
        slow = [[np.mean(row[max(0, i - kernel // 2) : i + kernel // 2 + 1]) for i in range(20)] for row in scores]
        np.testing.assert_allclose(pooled(scores, kernel), slow, rtol=1e-6)
    assert pooled(scores[:, :1], 9).tolist() == scores[:, :1].tolist()


def test_random_scores_do_not_depend_on_chunks_and_differ_in_all_else():
    def score(seed: int, block: int, places: range) -> list[list[float]]:
        return Random(seed=seed).score(View(block, 2, np.asarray(places))).tolist()

    whole = score(3, 1, range(40))
    parts = [score(3, 1, range(a, b)) for a, b in ((0, 7), (7, 8), (8, 40))]
    assert [[*parts[0][head], *parts[1][head], *parts[2][head]] for head in (0, 1)] == whole
    rows = [*whole, *score(4, 1, range(40)), *score(3, 2, range(40))]
    assert len({tuple(row) for row in rows}) == 6 and min(map(min, rows)) >= 0 and max(map(max, rows)) < 1


def test_first_tokens_stay_where_all_entries_are_scored_anew():
    class Anew(Recent):
        def score(self, view: View) -> np.ndarray:
            return np.zeros((view.heads, 9), np.float32)

    assert entry_scores(Anew(), View(0, 1, np.arange(6))).tolist() == [[0, 0, 0, *[math.inf] * 4, 0, 0]]
    assert entry_scores(Anew(), View(0, 1, np.arange(20, 26))).tolist() == [[0] * 9]
    predicted = np.ones((1, 3), np.float32)
    entry_scores(Retaining(sinks=2), View(0, 1, np.arange(3), False, predicted))
    assert predicted.tolist() == [[1, 1, 1]]  # what a runtime hands out stays its own


def test_snapkv_s_newest_stay_and_what_they_attend_to():
    attention = np.random.default_rng(2).random((2, 3, 12)).astype(np.float32)
    view = View(0, 2, np.arange(20, 26), False, None, lambda window: attention)
    scores = SnapKV(window=4, kernel=3).score(view)
    for head in range(2):
        for i in range(8):
            near = attention[head, :, max(0, i - 1) : min(8, i + 2)].sum(1) / 3
            assert scores[head, i] == pytest.approx(near.mean(), rel=1e-5)
    assert np.isinf(scores[:, 8:]).all()
    assert np.isinf(SnapKV(window=40).score(View(0, 1, np.arange(12), attention=lambda w: attention[:1]))).all()


def test_settings_of_heads_are_the_same_file_as_ever(tmp_path):
    (tmp_path / "retaining").mkdir()
    HeadSettings(budget=77, stabilizers=3).write(tmp_path)
    file = tmp_path / "retaining" / "settings.json"
    numbers = {"budget": 77, "chunk": 256, "stabilizers": 3, "local": 100, "pool": 9, "sinks": 4}
    assert file.read_text() == json.dumps(numbers, indent=2) + "\n"
    assert read_settings(tmp_path) == HeadSettings(budget=77, stabilizers=3)
    chosen = choose_budget(tmp_path, 50, local=7, chunk=None, policy="random")
    assert chosen == KvBudget(50, 256, 3, 7, "random", pool=9, sinks=4)
    for broken in ({**numbers, "pool": 2}, {k: v for k, v in numbers.items() if k != "sinks"}, [], {"budget": "x"}):
        file.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="cannot read the retaining heads' settings"):
            read_settings(tmp_path)


def test_defaults_and_names_stand_alike():
    written = {"path": "p", "gguf": "g", "width": 3, **HeadSettings(budget=77).numbers()}
    assert json.dumps(RetainingEntry.model_validate(written).model_dump()) == json.dumps(written)
    for name in HeadSettings.model_fields:
        with pytest.raises(ValidationError, match=f"retaining lacks {name}"):
            RetainingEntry.model_validate({key: value for key, value in written.items() if key != name})
    bare, made_for = KvBudget(None), HeadSettings()
    assert [getattr(bare, n) for n in ("chunk", "stabilizers", "local")] == [
        getattr(made_for, n) for n in ("chunk", "stabilizers", "local")
    ]


def test_an_unknown_policy_is_an_error_everywhere(tmp_path):
    message = r"unknown KV policy 'newest'\. Known: retaining, recent, random, oracle, snapkv"
    for call in (lambda: policy("newest"), lambda: KvBudget(9, 4, 1, policy="newest")):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(ValidationError, match=r"no policy 'newest'; there are: full, retaining, recent"):
        RetrievalConfig(policies=["recent", "newest"])
    with pytest.raises(UserError, match=message):
        choose_budget(tmp_path, 9, policy="newest", stabilizers=1)


TOY = '''"""Every third token, for a test."""

from typing import Literal

import numpy as np

from ..policy import Policy, View


class Thirds(Policy):
    """Places that three divides stay, the later ones first."""

    kind: Literal["thirds"] = "thirds"

    def score(self, view: View) -> np.ndarray:
        row = np.where(view.places % 3 == 0, view.places, -view.places - 1).astype(np.float32)
        return np.repeat(row[None], view.heads, 0)
'''
LLAMA_CPP = """
import json, sys
from pathlib import Path
from compress.kv import policies
from compress.kv.settings import KvBudget
from compress.runtime.generator import Request, RequestWork
from compress.runtime.llamacpp_kv import LlamaCppKvGenerator

policies.__path__.append(sys.argv[1])
settings = KvBudget(**json.loads(sys.argv[3]))
generator = LlamaCppKvGenerator({4: Path(sys.argv[2])}, Path("none"), settings, threads=1)
tokens = list(generator.generate(Request(json.loads(sys.argv[4]), 6, 4), RequestWork()))
print(json.dumps([generator._text.held.positions.tolist(), tokens]))
"""
IDS = [(37 * i) % 440 + 3 for i in range(61)]
THIRDS = {"budget": 12, "chunk": 9, "stabilizers": 0, "local": 5, "policy": "thirds"}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder with the new file, found as one of our own."""
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "thirds.py").write_text(TOY)
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(folder)])
    POLICIES.__dict__.pop("methods", None)
    yield folder
    sys.modules.pop("compress.kv.policies.thirds", None)
    POLICIES.__dict__.pop("methods", None)


def test_a_policy_in_one_new_file_serves_every_runtime(toy, shaken, tmp_path, inline_builder):
    checkpoint, settings = shaken(initializer_range=0.2), KvBudget(**THIRDS)
    kept = [*range(21, 56, 3), *range(56, 61)]  # all but the local tail: twelve that three divides
    decoder = Decoder(load_model(checkpoint))
    torch_cache = KVCache(decoder, make(settings), settings, len(IDS), 5)
    logits = torch_cache.read_prompt(IDS)
    for layer in torch_cache.layers:
        assert layer.positions[:, : layer.count].tolist() == [kept] * 2
    written = torch_cache.write(logits, 6, frozenset())

    write_onnx(checkpoint, tmp_path / "onnx", "fp32")
    generator = BoundedGenerator(tmp_path / "onnx", (4,), settings, 1)
    assert list(generator.generate(Request(IDS, 6, 4), RequestWork())) == written
    assert generator._text.held == len(kept) + 5  # the last token written was not read
    first = [place if place % 3 == 0 else -place - 1 for place in kept]
    assert generator._text.scores[3][1, : len(kept)].tolist() == first

    write_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    command = [sys.executable, "-c", LLAMA_CPP, str(toy), str(tmp_path / "m.gguf"), json.dumps(THIRDS), json.dumps(IDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # Of llama.cpp's cache the newest token never goes.
    held, tokens = json.loads(done.stdout.splitlines()[-1])
    assert held[:-5][-5:] == list(range(56, 61)) and len(held) == len(kept) + 5
    assert [place % 3 for place in held[:11]] == [0] * 11 and held[11] == 55
    assert len(tokens) == 6

    assert RetrievalConfig(policies=["full", "thirds"]).needs_heads is False
    assert "thirds" in POLICIES.names


def test_one_head_or_all_choose_alike():
    """Where a token has one score in all heads, token by token and head by head keep the same."""
    settings = KvBudget(9, 8, 2, 3, policy="recent")
    tokens, block = HeldTokens(make(settings), 2, 2), Block(settings, np.zeros((2, 60), np.float32))

    def read(ids: range) -> None:
        tokens.read(ids, None, False)

    read_in_steps(range(40), steps(40, settings), read, lambda protected: tokens.evict(9, protected))
    assert [tokens.positions.tolist()] * 2 == block.turn(40, 0)


def test_grouped_queries_have_one_choice_per_kv_head(shaken):
    """Four query heads on two, four and one KV heads: as many sets of entries as KV heads."""
    for kv_heads in (1, 2, 4):
        decoder = Decoder(load_model(shaken(kv_heads=kv_heads, blocks=2)))
        settings = KvBudget(12, 9, 4, 5, pool=3, sinks=2)
        torch.manual_seed(3)
        heads = RetainingHeads(2, AttentionShape.of(decoder.config), 16)
        cache = KVCache(decoder, make(settings), settings, len(IDS), heads=heads)
        cache.read_prompt(IDS)
        kept = {tuple(row) for layer in cache.layers for row in layer.positions[:, : layer.count].tolist()}
        assert cache.layers[0].positions.shape[0] == kv_heads and len(kept) == 2 * kv_heads
        assert all(row[:2] == (0, 1) and row[-5:] == tuple(range(56, 61)) and len(row) == 17 for row in kept)

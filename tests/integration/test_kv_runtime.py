"""A KV cache of fixed size in ONNX Runtime, token by token against a slow reference in torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.evaluation.kv_cache import KVCache
from compress.export.onnx import write_onnx
from compress.export.onnx_kv import CacheScales, calibrate
from compress.kv.eviction import best, worst
from compress.kv.policies import make
from compress.kv.settings import HeadSettings, KvBudget
from compress.kv.steps import most_held
from compress.modeling.blocks import Decoder
from compress.modeling.checkpoint import link_files
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_config, load_model
from compress.modeling.retaining import RetainingHeads, load_heads, save_heads
from compress.modeling.shape import AttentionShape
from compress.runtime.block_chain import BlockChain, CachedText
from compress.runtime.bounded_text import BoundedText
from compress.runtime.generator import Request, RequestWork
from compress.runtime.onnx_generator import BoundedGenerator, OnnxGenerator
from safetensors.torch import load_file
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IDS = [(37 * i) % 440 + 3 for i in range(61)]
SETTINGS = KvBudget(12, chunk=9, stabilizers=4, local=5, pool=3, sinks=2)
FULL = ["full_attention"] * 4  # a KV budget is not kept for sliding windows
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {"layer_types": FULL} if family == "gemma3_text" else {}) for family in FAMILIES},
    "multi-head": ("llama", {"kv_heads": 4, "tied": False, "attention_bias": True}),
    "llama3 rope": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64}}),
    "int8 cache": ("llama", {}),
    "int8 cache, norms": ("qwen3", {"kv_heads": 4}),
    "linear rope": ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
}


def with_heads(checkpoint: Path, folder: Path, width: int = 24) -> Path:
    """A copy of a checkpoint with random heads, whose scores differ by much more than rounding."""
    link_files(checkpoint, folder)
    config = load_config(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        heads = RetainingHeads(config.num_hidden_layers, AttentionShape.of(config), width)
    save_heads(heads, HeadSettings(budget=64, chunk=16, stabilizers=8, local=8), folder)
    return folder


@dataclass
class Held:
    """One block's and KV head's cache, simulated with lists: (place in the text, score) of every entry."""

    settings: KvBudget
    entries: list[tuple[int, float]] = field(default_factory=list)
    given: list[float] = field(default_factory=list)  # the score of every token read, means and all

    def evict(self, protected: int) -> None:
        count = len(self.entries)
        ranked = [
            (-(float("inf") if i >= count - protected else score), i) for i, (_, score) in enumerate(self.entries)
        ]
        kept = sorted(i for _, i in sorted(ranked)[: self.settings.budget])
        self.entries = [self.entries[i] for i in kept]

    def drop(self) -> None:
        old = self.entries[: len(self.entries) - self.settings.local]
        lowest = min(score for _, score in old)
        self.entries.pop(max(i for i, (_, score) in enumerate(old) if score == lowest))

    def views(self, scores: list[float], prompt: int) -> list[list[int]]:
        """Places that each token sees, itself the last of them, with a prompt of so many tokens."""
        s, found, start = self.settings, [], 0
        body = max(0, prompt - s.local)
        while start < len(scores):
            end = min(start + s.chunk, body) if start < body else max(prompt, start + 1)
            if start >= prompt and s.evict_decoding and len(self.entries) >= s.budget + s.local:
                self.drop()
            for place in range(start, end):
                near = [scores[p] for p in range(start, end) if abs(p - place) <= s.pool // 2]
                self.given.append(float("inf") if place < s.sinks else sum(near) / len(near))
                self.entries.append((place, self.given[place]))
                found.append([p for p, _ in self.entries])
            if start < body and len(self.entries) > s.budget:
                self.evict(s.stabilizers if end < body else 0)
            start = end
        return found


class Reference:
    """The whole text through transformers' own forward pass; attention alone is replaced, by one that looks up for each
    query, KV head and block what the simulated cache holds, and turns keys to where they stand in it."""

    def __init__(self, checkpoint: Path, settings: KvBudget, heads: RetainingHeads | None = None):
        self.model, self.settings = load_model(checkpoint), settings
        self.heads = heads or load_heads(checkpoint, self.model.config)
        self.model.config._attn_implementation = "slow_bounded"
        self.held: dict[tuple[int, int], Held] = {}
        file = checkpoint.with_name("scales.safetensors")  # of a cache of integers
        self.scales = load_file(file) if file.exists() else None

    def rounded(self, x: torch.Tensor, part: str, block: int) -> torch.Tensor:
        """Keys or values (1, G, T, D) as a cache holds them."""
        if self.scales is None:
            return x
        steps = self.scales[part][block].reshape(x.shape[1], 1, -1)
        return (x / steps).round().clamp(-128, 127) * steps

    @torch.no_grad()
    def logits(self, ids: list[int], prompt: int) -> torch.Tensor:
        """(T, V) after each token, where the first `prompt` are read as a prompt and the others one by one."""
        with Decoder(self.model).projections() as projected:

            def attend(module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: float, **_: Any) -> Any:
                block = module.layer_idx
                key, value = self.rounded(key, "keys", block), self.rounded(value, "values", block)
                scores = self.heads.score(block, projected[block])[0]
                out = torch.zeros_like(query)
                group = query.shape[1] // key.shape[1]
                for head in range(key.shape[1]):
                    held = self.held[block, head] = Held(self.settings)
                    for place, view in enumerate(held.views(scores[:, head].tolist(), prompt)):
                        keys = key[0, head, view]
                        q = query[0, head * group : (head + 1) * group, place]
                        if self.settings.positions == "contiguous":
                            keys = self._turned(keys, torch.arange(len(view)) - torch.tensor(view))
                            q = self._turned(q, torch.full((group,), len(view) - 1 - place))
                        weights = (scaling * q @ keys.T).softmax(-1)
                        out[0, head * group : (head + 1) * group, place] = weights @ value[0, head, view]
                return out.transpose(1, 2), None

            ALL_ATTENTION_FUNCTIONS["slow_bounded"] = attend
            try:
                return self.model(torch.tensor([ids]), use_cache=False).logits[0]
            finally:
                del ALL_ATTENTION_FUNCTIONS["slow_bounded"]

    def _turned(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """Rows (n, D) turned on by so many positions, as complex numbers."""
        rotary = self.model.model.rotary_emb
        speeds = getattr(rotary, "inv_freq", None)
        speeds = (rotary.full_attention_inv_freq if speeds is None else speeds).double()
        half = len(speeds)
        pairs = torch.complex(x[:, :half].double(), x[:, half : 2 * half].double())
        pairs = pairs * torch.polar(torch.ones(len(x), half, dtype=torch.double), by[:, None].double() * speeds)
        return torch.cat([pairs.real.float(), pairs.imag.float(), x[:, 2 * half :]], -1)

    def greedy(self, ids: list[int], count: int) -> list[int]:
        made: list[int] = []
        for _ in range(count):
            made.append(int(self.logits([*ids, *made], len(ids))[-1].argmax()))
        return made


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kv")


@pytest.fixture
def exported(shaken, root, inline_builder) -> Callable[..., Any]:
    """exported(case) -> a checkpoint with heads and its float32 ONNX folder, made once."""

    def make(case: str = "llama") -> tuple[Path, Path]:
        family, options = CASES[case]
        folder = root / case
        if not folder.exists():
            checkpoint = with_heads(shaken(family, initializer_range=0.2, **options), folder / "checkpoint")
            scales = None
            if "int8" in case:
                write_onnx(checkpoint, folder / "float", "fp32")
                found = calibrate(folder / "float", [IDS], 16, 1)
                # So coarse that rounding is seen, and that hardly any value is near a half.
                scales = CacheScales(found.keys * np.float32(12), found.values * np.float32(12))
                scales.save(folder / "scales.safetensors")
            write_onnx(checkpoint, folder / "onnx", "fp32", kv=scales)
        return folder / "checkpoint", folder / "onnx"

    return make


def compare(checkpoint: Path, folder: Path, settings: KvBudget, prompt: int, chain: BlockChain | None = None) -> None:
    """Read IDS, `prompt` of them as a prompt, in both: logits, and what is held in the end, with its scores."""
    text = BoundedText(chain or BlockChain(folder, (2, 4), 1, scores=True), settings)
    assert text.begin(IDS, 4) == 0
    found = [text.read_prompt(IDS[:prompt])] + [text.read_token(token) for token in IDS[prompt:]]
    reference = Reference(checkpoint, settings)
    expected = reference.logits(IDS, prompt)[prompt - 1 :].numpy()
    np.testing.assert_allclose(np.array(found), expected, atol=2e-4 * np.abs(expected).max())
    for (block, head), held in reference.held.items():
        scores = text.scores[block][head, : text.held]
        np.testing.assert_allclose(scores, [score for _, score in held.entries], atol=1e-5)
        places = [place for place, _ in held.entries]
        assert places[: settings.sinks] == [*range(settings.sinks)] and np.isinf(scores[: settings.sinks]).all()
        given = np.array(held.given[settings.sinks :])
        own = [settings.sinks + int(np.abs(given - s).argmin()) for s in scores[settings.sinks :]]
        assert own == places[settings.sinks :]


@pytest.mark.parametrize("case", CASES)
def test_scores_and_evictions_are_the_references(exported, case):
    checkpoint, folder = exported(case)
    chain = BlockChain(folder, (2, 4), 1, scores=True)
    compare(checkpoint, folder, SETTINGS, 55, chain)
    if case in ("llama", "phi3", "qwen3", "llama3 rope", "linear rope", "gemma3_text"):
        compare(checkpoint, folder, replace(SETTINGS, positions="contiguous", evict_decoding=True), 45, chain)


@pytest.mark.parametrize("evict", [False, True], ids=["prefill", "decoding"])
@pytest.mark.parametrize("positions", ["true", "contiguous"])
@pytest.mark.parametrize("policy", ["retaining", "recent", "random"])
def test_torch_and_the_runtime_hold_the_same(exported, policy, positions, evict):
    """The cache that policies are measured in, and the one that ships: the same entries after every token."""
    checkpoint, folder = exported("qwen3")
    settings = replace(SETTINGS, policy=policy, positions=positions, evict_decoding=evict)
    text = BoundedText(BlockChain(folder, (2, 4), 1, scores=policy == "retaining"), settings)
    text.begin(IDS, 4)
    decoder = Decoder(load_model(checkpoint))
    heads = load_heads(checkpoint, decoder.config)
    cache = KVCache(decoder, make(settings), settings, 45, len(IDS) - 45, heads=heads)
    found, expected = [text.read_prompt(IDS[:45])], [cache.read_prompt(IDS[:45]).numpy()]
    for token in (None, *IDS[45:]):
        if token is not None:
            found.append(text.read_token(token))
            expected.append(cache.read_on([token])[0].numpy())
        assert text.held == cache.held
        for block, layer in enumerate(cache.layers):
            scores = layer.scores[:, : cache.held]
            np.testing.assert_allclose(text.scores[block][:, : text.held], scores, atol=1e-5)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [
        ({"evict_decoding": True}, 30),
        ({"evict_decoding": True, "budget": 10}, 4),  # a short prompt: the cache fills while decoding
        ({"stabilizers": 12}, 50),  # the budget is all stabilizers
        ({"stabilizers": 0, "local": 0}, 50),
        ({"chunk": 1}, 40),
        ({"pool": 1, "sinks": 0}, 50),  # as published
        ({"pool": 5, "sinks": 12, "stabilizers": 0}, 50),  # the budget is all first tokens
        ({"chunk": 50}, 58),
        ({"budget": 300, "chunk": 300}, 61),
        ({"local": 30, "positions": "contiguous"}, 20),  # all of it is the local tail
    ],
    ids=str,
)
def test_hard_edges(exported, changes, prompt):
    checkpoint, folder = exported()
    compare(checkpoint, folder, replace(SETTINGS, **changes), prompt)


def test_greedy_text_is_the_references(exported):
    checkpoint, folder = exported()
    generator = BoundedGenerator(folder, (2, 4), SETTINGS, 1)
    assert list(generator.generate(Request(IDS[:40], 6, 4), RequestWork())) == Reference(checkpoint, SETTINGS).greedy(
        IDS[:40], 6
    )


def test_a_budget_as_large_as_the_text_changes_nothing(exported):
    _, folder = exported()
    whole = OnnxGenerator(folder, (2, 4), 1)
    long = [*IDS, *IDS, *IDS, *IDS, *IDS]  # more than one pass
    for positions, chunk, depth in itertools.product(("true", "contiguous"), (70, 300), (2, 4)):
        settings = KvBudget(400, chunk=chunk, positions=positions)  # type: ignore[arg-type]
        generator = BoundedGenerator(folder, (2, 4), settings, 1)
        assert list(generator.generate(Request(long, 12, depth), RequestWork())) == list(
            whole.generate(Request(long, 12, depth), RequestWork())
        )
        cached = CachedText(generator._chain)
        cached.add(long)
        text = generator._text
        text.begin([], depth)
        text.tokens, text.held = [], 0
        np.testing.assert_array_equal(text.read_prompt(long), cached.logits(depth)[0])  # to the bit


def test_each_depth_reads_its_own_blocks(exported):
    _, folder = exported()
    generator = BoundedGenerator(folder, (2, 4), SETTINGS, 1)
    alone = BoundedGenerator(folder, (2,), SETTINGS, 1)
    expected = list(alone.generate(Request(IDS, 8, 2), RequestWork()))
    assert list(generator.generate(Request(IDS, 8, 4), RequestWork())) != expected
    work = RequestWork()
    assert list(generator.generate(Request(IDS, 8, 2), work)) == expected
    assert work.reused == 0 and len(generator._text.keys) == 2


def test_only_a_text_that_goes_on_is_gone_on_with(exported):
    _, folder = exported()
    generator, fresh = (BoundedGenerator(folder, (4,), SETTINGS, 1) for _ in range(2))
    work = RequestWork()
    made = list(generator.generate(Request(IDS[:30], 6, 4), work))
    more = [*IDS[:30], *made, *IDS[30:45]]
    work = RequestWork()
    again = list(generator.generate(Request(more, 6, 4), work))
    assert work.reused == 35  # the last token that was written has not been read
    # As one text: what had been written was read token by token, and evicted with the rest at the next chunk's end.
    text = BoundedText(fresh._chain, SETTINGS)
    text.begin(more, 4)
    text.read_prompt(IDS[:30])
    for token in made[:-1]:
        text.read_token(token)
    assert int(text.read_prompt(more[35:]).argmax()) == again[0]
    for other in (IDS[1:40], more, [*IDS[:29], 7, 8]):
        work = RequestWork()
        expected = list(BoundedGenerator(folder, (4,), SETTINGS, 1).generate(Request(other, 4, 4), RequestWork()))
        assert list(generator.generate(Request(other, 4, 4), work)) == expected and work.reused == 0


def test_memory_does_not_grow_with_the_text(exported):
    _, folder = exported()
    settings = replace(SETTINGS, positions="contiguous", evict_decoding=True)
    generator, sizes = BoundedGenerator(folder, (4,), settings, 1), []
    assert generator.context > 10_000
    for length in (60, 480, 2000):  # the model was trained for 512
        prompt = [(11 * i + length) % 440 + 3 for i in range(length)]
        assert len(list(generator.generate(Request(prompt, 40, 4), RequestWork()))) == 40
        text = generator._text
        sizes.append([array.nbytes for array in (*text.keys, *text.values, *text.scores)])
        assert text.held == settings.budget + settings.local
    assert sizes[0] == sizes[1] == sizes[2] and len(sizes[0]) == 12
    assert sizes[0][0] == 2 * (most_held(settings, 10**6) + 1) * 16 * 4
    turns = BoundedGenerator(folder, (4,), replace(SETTINGS, positions="contiguous"), 1)
    ids = list(IDS)
    for _ in range(100):  # short turns, whose tokens are all local
        ids += [*turns.generate(Request(ids, 3, 4), RequestWork()), 9, 8, 7]
    assert turns._text.held <= SETTINGS.budget + SETTINGS.local + 3


@pytest.mark.parametrize("policy", ["recent", "random"])
def test_policies_without_heads(shaken, tmp_path, inline_builder, policy):
    write_onnx(shaken(), tmp_path / "onnx", "fp32")
    settings = replace(SETTINGS, policy=policy, stabilizers=0)
    generator = BoundedGenerator(tmp_path / "onnx", (4,), settings, 1)
    list(generator.generate(Request(IDS, 1, 4), RequestWork()))
    kept = generator._text.scores[0][:, : settings.budget]
    places = len(IDS) - settings.local
    if policy == "recent":
        assert kept.tolist() == [[np.inf] * 4 + [float(p) for p in range(places - 8, places)]] * 2
    else:
        assert not np.array_equal(kept[0], kept[1]) and kept.min() > 0.5
    with pytest.raises(UserError, match="exported from a checkpoint without retaining heads"):
        BoundedGenerator(tmp_path / "onnx", (4,), SETTINGS, 1)


def test_ties_fall_to_the_first():
    scores = np.array([[1.0, 2, 1, 2, 2, 1], [0, 0, 0, 0, 0, 0]], np.float32)
    assert best(scores, 4).tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]]
    assert best(scores, 4, protected=2).tolist() == [[1, 3, 4, 5], [0, 1, 4, 5]]
    assert worst(scores).tolist() == [5, 5] and scores.min() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 3}, "no room for 4 stabilizers"),
        ({"budget": 0, "stabilizers": 0}, "no room"),
        ({"chunk": 0}, "a chunk of 1 token or more"),
        ({"policy": "best"}, "Known: retaining, recent, random"),
        ({"positions": "none"}, "there are: true, contiguous"),
        ({"local": 0, "evict_decoding": True}, "--kv-local"),
    ],
    ids=str,
)
def test_impossible_budgets_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SETTINGS, **changes)


def test_what_a_bounded_cache_cannot_do_is_refused(exported, shaken, tmp_path):
    _, folder = exported()
    generator = BoundedGenerator(folder, (2, 4), SETTINGS, 1)
    for options in ({"draft_depth": 2}, {"exits": {2: 0.5}}):
        with pytest.raises(UserError, match="cannot be combined with drafts or early exit"):
            next(generator.generate(Request(IDS, 4, 4, **options), RequestWork()))
    with pytest.raises(UserError, match=r"longer than the model's context of 511: .* --kv-positions contiguous"):
        next(generator.generate(Request(IDS * 9, 4, 4), RequestWork()))
    wide = BoundedGenerator(folder, (4,), KvBudget(500, positions="contiguous"), 1)
    with pytest.raises(UserError, match=r"lower --kv-budget"):
        next(wide.generate(Request(IDS * 12, 4, 4), RequestWork()))
    for family, options in (("gemma3_text", {}), ("mistral", {"sliding_window": 8})):
        write_onnx(shaken(family, **options), tmp_path / family, "fp32")
        with pytest.raises(UserError, match="sliding window"):
            BoundedGenerator(tmp_path / family, (4,), replace(SETTINGS, policy="recent"), 1)


def test_what_rope_scaling_contiguous_positions_cannot_turn_is_refused(shaken, tmp_path, inline_builder):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    write_onnx(shaken("phi3", rope_parameters=rope, original_max_position_embeddings=256), tmp_path / "m", "fp32")
    settings = replace(SETTINGS, policy="recent")
    BoundedGenerator(tmp_path / "m", (4,), settings, 1)
    with pytest.raises(UserError, match="rope scaling 'longrope'"):
        BoundedGenerator(tmp_path / "m", (4,), replace(settings, positions="contiguous"), 1)

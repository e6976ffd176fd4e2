"""The bounded KV cache against references that know no caches: masks over the whole text, built step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.evaluation.kv_cache import KVCache, answer_labels
from compress.kv.eviction import best, worst
from compress.kv.policies import make
from compress.kv.policies.oracle import Oracle
from compress.kv.policies.random import Random
from compress.kv.policies.recent import SINKS, Recent
from compress.kv.policies.retaining import Retaining
from compress.kv.policies.snapkv import SnapKV
from compress.kv.settings import KvBudget
from compress.kv.steps import Step, shared_steps, steps
from compress.modeling.blocks import Decoder
from compress.modeling.load import load_model
from compress.modeling.retaining import RetainingHeads
from compress.modeling.shape import AttentionShape
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1, "layer_types": None},
    "qwen3": {"kv_heads": 4},  # as many as query heads
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma3_text": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTH, NEW = 61, 7
TOKENS = torch.randint(3, 300, (LENGTH + NEW,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture(scope="module")
def decoders(shaken: Callable[..., Path]) -> Callable[[str], Decoder]:
    made: dict[str, Decoder] = {}

    def make(family: str) -> Decoder:
        if family not in made:
            made[family] = Decoder(load_model(shaken(family, blocks=2, **FAMILIES[family])))
        return made[family]

    return make


def heads_for(decoder: Decoder, seed: int = 3) -> RetainingHeads:
    torch.manual_seed(seed)
    heads = RetainingHeads(decoder.num_blocks, AttentionShape.of(decoder.config), 16)
    for parameter in heads.parameters():
        parameter.data.normal_()
    return heads.requires_grad_(False)


def read(decoder: Decoder, policy: Any, settings: KvBudget, heads: RetainingHeads | None = None) -> Tensor:
    """Logits (NEW, V): after the prompt, and after each new token but the last."""
    ids, cache = TOKENS, KVCache(decoder, policy, settings, LENGTH, NEW, heads=heads)
    first = cache.read_prompt(ids[:LENGTH])
    return torch.cat([first[None], cache.read_on(ids[LENGTH:-1])])


# A slow, obvious reference. Evicting an entry is hiding its key from all later queries of its head: a whole forward
# pass with a mask per block and head, (T, T), which the steps of the contract fill in one by one.


@torch.no_grad()
def masked_pass(decoder: Decoder, ids: list[int], hidden_from: list[Tensor], watch: dict[int, Any]) -> Tensor:
    """Logits (T, V) where query t of block b and KV head g does not see key k once t ≥ hidden_from[b][g, k]."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Any, scaling: float, **options: Any) -> Any:
        count, groups = q.shape[2], k.shape[1]
        out = torch.zeros_like(q)
        window = options.get("sliding_window") or 10**9
        watch[module.layer_idx] = (q[0], k[0], scaling)
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // groups)
            gone = hidden_from[module.layer_idx][group].tolist()
            for t in range(count):
                seen = [s for s in range(t + 1) if t < gone[s] and t - s < window]
                weights = (k[0, group, seen] @ q[0, head, t] * scaling).softmax(0)
                out[0, head, t] = weights @ v[0, group, seen]
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["slow_reference"] = attend
    decoder.config._attn_implementation = "slow_reference"
    try:
        return decoder.model(torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        decoder.config._attn_implementation = "sdpa"
        del ALL_ATTENTION_FUNCTIONS["slow_reference"]


def reference(decoder: Decoder, scores_of: Callable[..., Any], settings: KvBudget, while_decoding: bool) -> Tensor:
    """Logits as `read` gives them. `scores_of(block, group, held, newest, seen)` → a score per held position."""
    count, groups = LENGTH + NEW - 1, AttentionShape.of(decoder.config).kv_heads
    never = 10**9
    hidden_from = [torch.full((groups, count), never) for _ in range(decoder.num_blocks)]
    budget, local = settings.budget, settings.local
    assert budget is not None
    body, moments = max(0, LENGTH - local), []  # (tokens read, the newest that are protected, room)
    for end in [*range(settings.chunk, body, settings.chunk), *([body] if body else [])]:
        moments.append((end, settings.stabilizers if end < body else 0, budget))
    if while_decoding:
        moments += [(end, local, budget + local - 1) for end in range(LENGTH, count)]
    # Blocks depend on one another: what a block evicts is known once all before it are masked right, so go moment by
    # moment, and within one block by block.
    for end, protected, room in moments:
        for block in range(decoder.num_blocks):
            watch: dict[int, Any] = {}
            with decoder.projections() as projected:
                masked_pass(decoder, TOKENS[:end], [gone[:, :end] for gone in hidden_from], watch)
            for group in range(groups):
                gone = hidden_from[block][group]
                held = [position for position in range(end) if gone[position] == never]
                scores = scores_of(block, group, held, watch[block], projected[block][0])
                if end > LENGTH - 1 and while_decoding and len(held) < budget + local:
                    continue
                free = held[: len(held) - protected] if protected else held
                order = sorted(free, key=lambda p: (scores[held.index(p)], -p))
                for position in order[: max(0, len(held) - room)]:
                    gone[position] = end
    logits = masked_pass(decoder, TOKENS[:count], hidden_from, {})
    return logits[LENGTH - 1 :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", ["true", "contiguous"])
@pytest.mark.parametrize("chunk", [9, 100])
def test_a_budget_as_large_as_the_context_changes_nothing(decoders, family, positions, chunk):
    decoder = decoders(family)
    with torch.no_grad():
        wanted = decoder.model(torch.tensor([TOKENS])).logits[0, LENGTH - 1 : -1]
    for budget in (LENGTH - 10, None):  # the local tail comes on top
        settings = KvBudget(budget, chunk, 4, 10, positions=positions)
        found = read(decoder, Random(seed=1), settings)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert decoder.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_eviction_is_a_mask_over_the_whole_text(decoders, family):
    decoder = decoders(family)
    heads = heads_for(decoder)

    def scores_of(block: int, group: int, held: list[int], _watched: Any, qkv: Tensor) -> list[float]:
        return heads.score(block, qkv[held])[:, group].tolist()

    settings = KvBudget(12, 16, 4, 10)
    found = read(decoder, Retaining(), settings, heads)
    wanted = reference(decoder, scores_of, settings, False)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, read(decoder, Recent(), KvBudget(None, 16, 0, 10)), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_means_over_neighbours_read_together_and_the_first_tokens_stay(decoders, family):
    decoder, chunk, body = decoders(family), 16, LENGTH - 10
    heads = heads_for(decoder)

    def scores_of(block: int, group: int, held: list[int], _watched: Any, qkv: Tensor) -> list[float]:
        raw, found = heads.score(block, qkv)[:, group].tolist(), []
        for place in held:
            start = place // chunk * chunk
            near = [p for p in range(start, min(start + chunk, body)) if abs(p - place) <= 2]
            found.append(math.inf if place < 3 else sum(raw[p] for p in near) / len(near))
        return found

    settings = KvBudget(12, chunk, 4, 10)
    found = read(decoder, Retaining(pool=5, sinks=3), settings, heads)
    torch.testing.assert_close(found, reference(decoder, scores_of, settings, False), atol=1e-4, rtol=1e-4)
    for other in (Retaining(), Retaining(pool=5), Retaining(sinks=3)):
        assert not torch.allclose(found, read(decoder, other, settings, heads), atol=1e-2)


def test_eviction_goes_on_while_decoding(decoders):
    decoder = decoders("llama")
    heads = heads_for(decoder)

    def scores_of(block: int, group: int, held: list[int], _watched: Any, qkv: Tensor) -> list[float]:
        return heads.score(block, qkv[held])[:, group].tolist()

    settings = KvBudget(8, 16, 2, 5, evict_decoding=True)
    found = read(decoder, Retaining(), settings, heads)
    torch.testing.assert_close(found, reference(decoder, scores_of, settings, True), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, read(decoder, Retaining(), KvBudget(8, 16, 2, 5), heads), atol=1e-2)
    cache = KVCache(decoder, Retaining(), settings, LENGTH, NEW, heads=heads)
    cache.read_prompt(TOKENS[:LENGTH])
    for token in TOKENS[LENGTH:]:
        cache.read_on([token])
        assert cache.held == 13


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_snapkv_is_what_a_chunk_s_last_queries_attend_to(decoders, family):
    decoder = decoders(family)
    window, kernel = 3, 5
    sizes = [(layer.self_attn.sliding_window if family == "gemma3_text" else None) for layer in decoder.blocks]

    def scores_of(block: int, group: int, held: list[int], watched: Any, _qkv: Tensor) -> list[float]:
        q, k, scaling = watched
        newest, per = range(held[-1] - window + 1, held[-1] + 1), q.shape[0] // k.shape[0]
        total = [0.0] * (len(held) - window)
        for head in range(group * per, (group + 1) * per):
            mean = [0.0] * len(held)
            for t in newest:
                limit = sizes[block] or 10**9
                logits = [
                    float(q[head, t] @ k[group, s]) * scaling if s <= t and t - s < limit else -math.inf for s in held
                ]
                norm = sum(math.exp(x) for x in logits)
                mean = [m + math.exp(x) / norm / window for m, x in zip(mean, logits, strict=True)]
            for i in range(len(total)):
                near = mean[max(0, i - kernel // 2) : min(len(total), i + kernel // 2 + 1)]
                total[i] += sum(near) / kernel / per
        return [*total, *[math.inf] * window]

    settings = KvBudget(12, 16, 4, 10)
    found = read(decoder, SnapKV(window=window, kernel=kernel), settings)
    torch.testing.assert_close(found, reference(decoder, scores_of, settings, False), atol=1e-4, rtol=1e-4)


def test_recent_and_random_as_masks(decoders):
    decoder = decoders("llama")
    settings = KvBudget(12, 16, 0, 10)
    recent = reference(decoder, lambda _b, _g, held, *_: [math.inf if p < SINKS else p for p in held], settings, False)
    torch.testing.assert_close(read(decoder, Recent(), settings), recent, atol=1e-4, rtol=1e-4)
    found = [read(decoder, Random(seed=seed), settings) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_contiguous_positions_are_those_of_keys_rotated_there_at_once(decoders, family):
    """One eviction, then one pass: keys of a first chunk, taken before their rotation, at 0, 1, 2, …"""
    decoder = decoders(family)
    body, budget = 40, 9
    settings = KvBudget(budget, body, 0, LENGTH - body, positions="contiguous")
    cache = KVCache(decoder, Random(seed=4), settings, LENGTH, NEW)
    cache.read_prompt(TOKENS[:LENGTH], 1)
    kept = [layer.positions[:, : layer.count].clone() for layer in cache.layers]
    values = [layer.values[:, : layer.count].clone() for layer in cache.layers]
    raw: dict[int, Tensor] = {}
    handles = []
    shape = AttentionShape.of(decoder.config)
    for number, block in enumerate(decoder.blocks):
        attention: Any = block.self_attn
        norm = getattr(attention, "k_norm", None)
        module = norm or getattr(attention, "k_proj", None) or attention.qkv_proj

        def take(_m: Any, _a: Any, out: Tensor, number: int = number, normed: bool = norm is not None) -> None:
            keys = out[0] if normed else out[0].unflatten(-1, (-1, shape.size))
            keys = keys.transpose(0, 1) if len(keys) == body else keys
            packed = keys.shape[0] > shape.kv_heads  # q, k and v in one
            raw[number] = keys[shape.heads : shape.heads + shape.kv_heads] if packed else keys

        handles.append(module.register_forward_hook(take))
    with torch.no_grad():
        decoder.model(torch.tensor([TOKENS[:body]]))
    for handle in handles:
        handle.remove()
    rotary = decoder.model.model.rotary_emb
    for number, layer in enumerate(cache.layers):
        kind = {"layer_type": decoder.config.layer_types[number]} if family == "gemma3_text" else {}
        cos, sin = (part[0] for part in rotary(torch.zeros(1), torch.arange(budget)[None], **kind))
        for group in range(shape.kv_heads):
            for place in range(budget):
                key = raw[number][group, kept[number][group, place]]
                size = cos.shape[-1]
                first, second = key[: size // 2], key[size // 2 : size]
                turned = key[:size] * cos[place] + torch.cat([-second, first]) * sin[place]
                wanted = torch.cat([turned, key[size:]])
                torch.testing.assert_close(layer.keys[group, place], wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(layer.values[:, : layer.count], values[number])
    logits = cache.read_prompt(TOKENS[:LENGTH])
    assert cache.held == budget + LENGTH - body and torch.isfinite(logits).all()


def test_contiguous_positions_carry_a_model_past_its_trained_length(decoders):
    decoder = decoders("llama")
    trained = decoder.config.max_position_embeddings
    prompt = (TOKENS * 20)[: trained + 50]
    with pytest.raises(UserError, match=f"trained for {trained} positions; .*contiguous"):
        KVCache(decoder, Random(seed=1), KvBudget(32, 16, 4, 10), len(prompt))
    cache = KVCache(decoder, Random(seed=1), KvBudget(32, 16, 4, 10, positions="contiguous"), len(prompt))
    assert torch.isfinite(cache.read_prompt(prompt)).all() and cache.most == 48
    with pytest.raises(UserError, match="trained for"):
        KVCache(decoder, Recent(), KvBudget(None, 16, 4, 10, positions="contiguous"), len(prompt))


def test_longrope_ends_where_its_frequencies_change(shaken):
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    decoder = Decoder(load_model(shaken("phi3", blocks=2, rope_parameters=rope, original_max_position_embeddings=32)))
    with pytest.raises(UserError, match="longrope"):
        KVCache(decoder, Recent(), KvBudget(None), 40)
    cache = KVCache(decoder, Recent(), KvBudget(None, 5), 32)
    with torch.no_grad():
        wanted = decoder.model(torch.tensor([TOKENS[:32]])).logits[0, -1]
    torch.testing.assert_close(cache.read_prompt(TOKENS[:32]), wanted, atol=1e-5, rtol=1e-5)


def test_labels_are_the_largest_logits_of_the_answer(decoders):
    decoder = decoders("llama")
    cache = KVCache(decoder, Recent(), KvBudget(None, 16), LENGTH, NEW)
    cache.read_prompt(TOKENS[:LENGTH])
    labels = answer_labels(cache, TOKENS[LENGTH:])
    watch: dict[int, Any] = {}
    never = [torch.full((2, LENGTH + NEW), 10**9)] * 2
    masked_pass(decoder, TOKENS, never, watch)
    for block, (q, k, scaling) in watch.items():
        for group in range(2):
            for position in range(LENGTH):
                wanted = max(
                    float(q[head, t] @ k[group, position]) * scaling
                    for head in (2 * group, 2 * group + 1)
                    for t in range(LENGTH, LENGTH + NEW)
                )
                assert float(labels[block][group, position]) == pytest.approx(wanted, abs=1e-4)
    settings = KvBudget(12, 16, 0, 10)
    kept = KVCache(decoder, Oracle(), settings, LENGTH, labels=labels)
    kept.read_prompt(TOKENS[:LENGTH], len(steps(LENGTH, settings)) - 1)
    one = labels[0][1, : LENGTH - 10]
    assert kept.layers[0].positions[1, :12].tolist() == sorted(one.argsort(descending=True)[:12].tolist())


def test_steps_set_the_tail_aside_and_protect_all_but_the_last_chunk():
    settings = KvBudget(20, 16, 5, 10)
    assert steps(45, settings) == [Step(0, 16, True, 5), Step(16, 32, True, 5), Step(32, 35, True), Step(35, 45, False)]
    assert steps(42, settings) == [Step(0, 16, True, 5), Step(16, 32, True), Step(32, 42, False)]
    assert steps(10, settings) == [Step(0, 10, False)] and steps(3, settings) == [Step(0, 3, False)]
    assert steps(17, KvBudget(20, 16, 5, 0)) == [Step(0, 16, True, 5), Step(16, 17, True)]
    assert [step.evicts for step in steps(40, KvBudget(None, 16))] == [False]


def test_choices_by_score():
    scores = np.array([[1.0, 5.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]], np.float32)
    assert best(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert best(scores, 3, protected=1).tolist() == [[1, 2, 4], [0, 1, 4]]
    assert best(scores, 4, 1).tolist() == [[1, 2, 3, 4], [0, 1, 2, 4]]
    assert worst(scores, 1).tolist() == [0, 3]


@pytest.mark.parametrize("budget", [1, 3])
def test_the_smallest_budgets_and_prompts(decoders, budget):
    decoder = decoders("llama")
    for length in (1, 2, 5, 9):
        cache = KVCache(decoder, Random(seed=1), KvBudget(budget, 2, 0, 3), length, 2)
        assert cache.read_prompt(TOKENS[:length]).shape == (decoder.vocab_size,)
        assert cache.held == (length if length <= 3 else min(length, budget + 3)) and cache.seen == length
    short = KVCache(decoder, Random(seed=1), KvBudget(budget, 2, 0, 3), 3)
    with torch.no_grad():
        wanted = decoder.model(torch.tensor([TOKENS[:3]])).logits[0, -1]
    torch.testing.assert_close(short.read_prompt(TOKENS[:3]), wanted, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_is_refused(decoders):
    with pytest.raises(UserError, match="no tokens"):
        KVCache(decoders("llama"), Recent(), KvBudget(None), 0).read_prompt([])
    with pytest.raises(UserError, match="budget of 10 has no room for 20 stabilizers"):
        KvBudget(10, 16, 20)
    with pytest.raises(UserError, match="budget of 0"):
        KvBudget(0, 16, 0)
    with pytest.raises(UserError, match="while decoding"):
        KvBudget(None, evict_decoding=True)
    with pytest.raises(ValueError, match="heads"):
        KVCache(decoders("llama"), make(KvBudget(4, 4, 0)), KvBudget(4, 4, 0), 8)


def test_a_copy_reads_on_as_if_the_text_had_been_read_anew(decoders):
    decoder = decoders("qwen3")
    other = [*TOKENS[:58], *TOKENS[:12]]
    for positions in ("true", "contiguous"):
        settings = KvBudget(12, 16, 4, 10, positions=positions)
        count = shared_steps([TOKENS, other], settings)
        assert count == 3  # of 16 tokens each: the fourth chunk is the last, and differs
        cache = KVCache(decoder, Random(seed=1), settings, len(other), 1)
        cache.read_prompt(TOKENS, count)
        found = [cache.copy().read_prompt(ids) for ids in (TOKENS, other)]
        for ids, logits in zip((TOKENS, other), found, strict=True):
            assert torch.equal(logits, KVCache(decoder, Random(seed=1), settings, len(ids), 1).read_prompt(ids))


def test_memory_is_flat_in_the_length_of_the_prompt(decoders):
    decoder = decoders("llama")
    sizes = []
    for length in (100, 300):
        cache = KVCache(decoder, Recent(), KvBudget(32, 16, 4, 10), length)
        cache.read_prompt((TOKENS * 5)[:length])
        assert cache.layers[0].keys.shape[1] == 48
        sizes.append(cache.bytes)
    assert sizes[0] == sizes[1] == 48 * 2 * 2 * 16 * 4 * 2  # entries, k and v, KV heads, size, float32, blocks

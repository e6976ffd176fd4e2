"""What retaining heads are given and what they are to say, against attention written out in full."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from compress.modeling import retaining_labels
from compress.modeling.attention import Heads, watched_attention
from compress.modeling.blocks import Decoder, drop_blocks
from compress.modeling.families import FAMILIES
from compress.modeling.random import random_model
from compress.modeling.retaining_labels import BlockLabels, attention_labels, detrended, label_row
from compress.modeling.shape import AttentionShape
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

IDS = torch.randint(3, 400, (70,), generator=torch.Generator().manual_seed(5)).tolist()
PROMPT = 59
WINDOW = 16  # the answer's last query sees no prompt position before 54, its first none before 44
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "phi3": {"sliding_window": WINDOW},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
CASES = [(family, kv_heads, {}) for family in FAMILIES for kv_heads in (2, 4)]
CASES += [(family, 2, options) for family, options in WINDOWED.items()]
CASES += [("gemma3_text", 1, {"query_pre_attn_scalar": 77}), ("llama", 2, {"attention_bias": True})]


def shaken_decoder(family: str, **options: Any) -> Decoder:
    """A random model whose norms and biases, which are all one and zero at first, are random too."""
    model = random_model(family, vocab_size=400, **options)
    random = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=random)
    return Decoder(model)


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0]}-{c[1]}kv-{'-'.join(c[2]) or 'plain'}")
def decoder(request: Any) -> Decoder:
    family, kv_heads, options = request.param
    return shaken_decoder(family, kv_heads=kv_heads, **options)


def full_logits(decoder: Decoder) -> list[torch.Tensor]:
    """Every block's logits (heads, T, T) before the softmax, -inf where transformers' own mask hides a key."""
    found: list[torch.Tensor] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        group = query.shape[1] // key.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = query @ keys.transpose(-1, -2) * scaling + mask
        found.append(logits[0].masked_fill(mask[0] < 0, -torch.inf))
        return (logits.softmax(-1) @ values).transpose(1, 2), None

    name, before = "written_out", decoder.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[name] = attend
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    decoder.config._attn_implementation = name
    try:
        with torch.no_grad():
            decoder.hidden(input_ids=torch.tensor([IDS]), use_cache=False)
    finally:
        decoder.config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS[name], ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]
    return found


def test_labels_are_the_largest_logits_of_any_answer_query(decoder, monkeypatch):
    monkeypatch.setattr(retaining_labels, "QUERIES", 4)
    monkeypatch.setattr(retaining_labels, "KEYS", 13)
    logits, kv_heads = full_logits(decoder), AttentionShape.of(decoder.config).kv_heads
    found: list[BlockLabels] = []
    label_row(decoder, IDS, PROMPT, found.append)
    assert [seen.block for seen in found] == list(range(decoder.num_blocks))
    group = decoder.config.num_attention_heads // kv_heads
    firsts = []
    for seen, full in zip(found, logits, strict=True):
        expected = torch.full((PROMPT, kv_heads), -torch.inf)
        for k in range(PROMPT):
            for j in range(kv_heads):
                expected[k, j] = max(
                    full[h, p, k] for h in range(j * group, (j + 1) * group) for p in range(PROMPT, 70)
                )
        first = next(k for k in range(PROMPT) if torch.isfinite(expected[k]).all())
        expected[:first] = expected[first:].amin(0)
        assert seen.first == first
        torch.testing.assert_close(seen.labels, expected, rtol=1e-4, atol=1e-4)
        firsts.append(first)
    windowed = [getattr(block.self_attn, "sliding_window", None) for block in decoder.blocks]
    if decoder.config.model_type in ("mistral", "phi3"):
        windowed = [decoder.config.sliding_window] * 4
    assert firsts == [0 if window in (None, 64) else PROMPT - WINDOW + 1 for window in windowed]


def test_inputs_are_the_projections_before_norms_and_positions(decoder):
    """Of what each block's attention is given, by its own weights: q, k and v in this order, with their biases."""
    given: list[torch.Tensor] = []
    handles = [
        block.self_attn.register_forward_pre_hook(
            lambda _m, _a, options: given.append(options["hidden_states"]), with_kwargs=True
        )
        for block in decoder.blocks
    ]
    found: list[BlockLabels] = []
    label_row(decoder, IDS, PROMPT, found.append)
    for handle in handles:
        handle.remove()
    shape = AttentionShape.of(decoder.config)
    for seen, states in zip(found, given, strict=True):
        attention: Any = decoder.blocks[seen.block].self_attn
        names = ("qkv_proj",) if hasattr(attention, "qkv_proj") else ("q_proj", "k_proj", "v_proj")
        layers = [getattr(attention, name) for name in names]
        expected = torch.cat([torch.nn.functional.linear(states[0], x.weight, x.bias) for x in layers], -1)
        assert seen.inputs.shape == (PROMPT, shape.qkv)
        torch.testing.assert_close(seen.inputs, expected[:PROMPT], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_q_k_and_v_lie_where_attention_takes_them_from(family):
    """The first position is not rotated, so there attention is given the projections themselves."""
    decoder = shaken_decoder(family)
    shape, seen = AttentionShape.of(decoder.config), []

    def watch(given: Heads) -> None:
        parts = projected[given.block][0, 0].split(
            [n * shape.size for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
        )
        for part, states in zip(parts, (given.queries, given.keys), strict=False):
            torch.testing.assert_close(part, states[:, 0].flatten())
        seen.append(given.block)

    with torch.no_grad(), decoder.projections() as projected, watched_attention(decoder, watch):
        decoder.hidden(input_ids=torch.tensor([IDS]))
    assert seen == [0, 1, 2, 3]


def test_a_watched_model_says_what_it_said_and_is_left_as_it_was():
    decoder = shaken_decoder("qwen3")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        before = decoder.hidden(input_ids=ids)
        with decoder.projections(), watched_attention(decoder, lambda _: None):
            assert torch.equal(before, decoder.hidden(input_ids=ids))
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    assert all(not module._forward_hooks for module in decoder.model.modules())
    with pytest.raises(ZeroDivisionError):
        label_row(decoder, IDS, PROMPT, lambda _: 1 / 0)  # type: ignore[arg-type, return-value]
    assert not ALL_ATTENTION_FUNCTIONS._local_mapping
    decoder.config._attn_implementation = "eager"
    with pytest.raises(ValueError, match="sdpa"):
        label_row(decoder, IDS, PROMPT, lambda _: None)


def test_a_depth_has_the_labels_of_the_whole_models_first_blocks():
    model = shaken_decoder("llama").model
    whole: list[BlockLabels] = []
    label_row(Decoder(model), IDS, PROMPT, whole.append)
    drop_blocks(model, [2, 3])
    part: list[BlockLabels] = []
    label_row(Decoder(model), IDS, PROMPT, part.append)
    assert len(part) == 2
    for one, other in zip(part, whole, strict=False):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.inputs, other.inputs)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.numbers = max(self.numbers, value.numel())
        return out


def test_no_matrix_of_all_queries_and_keys_exists():
    ids = torch.randint(3, 400, (1500,), generator=torch.Generator().manual_seed(1)).tolist()
    decoder = shaken_decoder("llama", blocks=2, max_positions=2048)
    with Largest() as largest:
        label_row(decoder, ids, 1200, lambda _: None)
    assert largest.numbers < 1500 * 1500 / 2
    queries, keys = torch.randn(4, 700, 8), torch.randn(2, 9000, 8)
    with Largest() as largest:
        attention_labels(queries, keys, 1.0)
    assert largest.numbers <= 4 * retaining_labels.QUERIES * retaining_labels.KEYS


def test_one_blocks_inputs_are_held_at_a_time():
    held: list[weakref.ref] = []

    def visit(seen: BlockLabels) -> None:
        assert all(old() is None for old in held)
        held.append(weakref.ref(seen.inputs))

    label_row(shaken_decoder("llama"), IDS, PROMPT, visit)
    assert len(held) == 4


def test_edges():
    decoder = shaken_decoder("llama")
    for prompt in (0, 70):
        with pytest.raises(ValueError, match="no answer, or no prompt"):
            label_row(decoder, IDS, prompt, lambda _: None)
    found: list[BlockLabels] = []
    label_row(decoder, IDS[:2], 1, found.append)  # one token each
    assert [seen.labels.shape for seen in found] == [(1, 2)] * 4
    labels, first = attention_labels(torch.randn(2, 3, 4), torch.randn(2, 5, 4), 1.0, window=1)
    assert first == 5 and not labels.any()  # a window of the query itself sees nothing of the prompt
    half = attention_labels(torch.ones(2, 3, 4).bfloat16(), torch.ones(2, 5, 4).bfloat16(), 0.5)[0]
    assert half.dtype == torch.float32 and half.tolist() == [[2.0, 2.0]] * 5


def test_what_comes_of_distance_alone_is_taken_out():
    """Against NumPy's fit of a cubic; what stands out at any distance still does."""
    random = np.random.default_rng(3)
    logs = np.log(np.arange(500, 0, -1) + 1.0)
    trend = np.stack([-4 * logs, 0.3 * logs**3 - logs**2 + 5], 1)
    labels = trend + random.normal(size=(500, 2))
    labels[[3, 240, 490]] += 6
    found = detrended(torch.from_numpy(labels).float())
    assert found.dtype == torch.float32
    expected = [column - np.polyval(np.polyfit(logs, column, 3), logs) for column in labels.T]
    np.testing.assert_allclose(found.numpy(), np.stack(expected, 1), atol=1e-3)
    assert sorted(found.topk(3, 0).indices[:, 0].tolist()) == [3, 240, 490]
    assert 3 not in torch.from_numpy(labels).topk(100, 0).indices[:, 0]  # before, any hundred nearer ones hid it
    assert detrended(torch.from_numpy(trend).float()).abs().max() < 1e-3


@pytest.mark.parametrize("count", range(1, 7))
def test_a_few_tokens_have_a_trend_too(count):
    labels = torch.randn(count, 2, generator=torch.Generator().manual_seed(count))
    found = detrended(labels)
    assert found.shape == labels.shape and found.isfinite().all()
    assert found.square().sum() <= labels.square().sum()

"""Distances between block boundaries against hidden states stored row by row; the searches over them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compress.core.errors import UserError
from compress.data.chat import Encoded
from compress.data.packing import Batch, pack
from compress.modeling.blocks import Decoder
from compress.modeling.cuts import Cut
from compress.modeling.families import FAMILIES
from compress.modeling.load import load_model
from compress.prune.config import PruneConfig
from compress.prune.importance import Distances, boundaries, last_tokens, scan
from compress.prune.searches import choose
from compress.prune.study import Study

SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
OPTIONS: dict[str, dict[str, Any]] = {"gemma3_text": SLIDING, "mistral": {"sliding_window": 8}}
MODELS = [*((family, OPTIONS.get(family, {})) for family in FAMILIES), ("llama", {"kv_heads": 4})]  # the last is MHA
SIZES = [20, 1, 13, 29, 40, 2, 11, 300]  # tokens; the last row is longer than a packed sequence
LENGTH = 48


def rows(sizes: list[int] = SIZES) -> list[list[int]]:
    draw = random.Random(5)
    return [[draw.randrange(3, 300) for _ in range(size)] for size in sizes]


def packed(ids: list[list[int]], pad: int = 9) -> list[Batch]:
    return pack([Encoded(row, [True] * len(row)) for row in ids], LENGTH, 3, pad)


def reference(model: Any, ids: list[list[int]]) -> dict[str, dict[str, np.ndarray]]:
    """position → metric → (L+1, L+1) means over tokens: every row alone and unpadded, all states kept, float64."""
    layers, kept = model.model.layers, []
    angles: dict[str, list[np.ndarray]] = {"all": [], "last": []}
    cosines: dict[str, list[np.ndarray]] = {"all": [], "last": []}
    magnitudes: dict[str, list[np.ndarray]] = {"all": [], "last": []}
    hooks = [layers[0].register_forward_pre_hook(lambda _m, a, k: kept.append((*a, *k.values())[0]), with_kwargs=True)]
    hooks += [layer.register_forward_hook(lambda _m, _a, out: kept.append(out)) for layer in layers]
    for row in ids:
        kept.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([row[:LENGTH]]), use_cache=False)
        states = np.stack([state[0].double().numpy() for state in kept])  # (L+1, T, H)
        for t in range(states.shape[1]):
            at = states[:, t]
            norms = np.linalg.norm(at, axis=1)
            cosine = np.clip(at @ at.T / np.outer(norms, norms), -1, 1)
            magnitude = np.linalg.norm(at[None] - at[:, None], axis=2) / norms  # [a, b]: ‖h_b − h_a‖ / ‖h_b‖
            for position in ("all", "last"):
                if position == "all" or t == states.shape[1] - 1:
                    cosines[position].append(cosine)
                    angles[position].append(np.arccos(cosine) / np.pi)
                    magnitudes[position].append(magnitude)
    for hook in hooks:
        hook.remove()
    return {
        position: {
            "angular": np.mean(angles[position], 0),
            "influence": 1 - np.mean(cosines[position], 0),
            "magnitude": np.mean(magnitudes[position], 0),
        }
        for position in angles
    }


def assert_same(found: dict[str, Distances], expected: dict[str, dict[str, np.ndarray]], blocks: int) -> None:
    for position, metrics in expected.items():
        for metric, table in metrics.items():
            for length in range(1, blocks + 1):
                wanted = [table[first, first + length] for first in range(blocks - length + 1)]
                windows = found[position].windows(metric, length)
                np.testing.assert_allclose(windows, wanted, rtol=0, atol=2e-6, err_msg=f"{position} {metric} {length}")


@pytest.mark.parametrize(("family", "options"), MODELS)
def test_every_window_matches_stored_hidden_states(
    tiny: Callable[..., Path], family: str, options: dict[str, Any]
) -> None:
    model = load_model(tiny(family, **options))
    found = scan(model, packed(rows()))
    expected = reference(model, rows())
    assert_same(found, expected, 4)
    spread = [np.ptp(expected["all"][metric].diagonal(1)) for metric in ("angular", "influence", "magnitude")]
    assert min(spread) > 1e-3  # blocks differ, so that a shifted table would be seen
    assert found["all"].tokens == sum(min(size, LENGTH) for size in SIZES)
    assert found["last"].tokens == len(SIZES)


def test_padding_and_packing_change_nothing(tiny: Callable[..., Path]) -> None:
    model = load_model(tiny())
    ids = rows([30, 5, 31, 7, 1, 40])
    one, other = scan(model, packed(ids)), scan(model, packed(ids, pad=77))
    alone = scan(model, [pack([Encoded(row, [True] * len(row))], LENGTH, 1, 0)[0] for row in ids])
    assert any((batch.segment_ids < 0).any() for batch in packed(ids))
    for position in ("all", "last"):
        for metric in ("angular", "influence", "magnitude"):
            assert torch.equal(getattr(one[position], metric), getattr(other[position], metric))
            windows = [getattr(found[position], metric).triu(1) for found in (one, alone)]
            torch.testing.assert_close(*windows, rtol=0, atol=1e-6)
        assert one[position].tokens == alone[position].tokens


def test_more_tokens_than_are_compared_at_once(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny())
    whole = scan(model, packed(rows()))
    monkeypatch.setattr("compress.prune.importance.TOKENS_AT_ONCE", 7)
    parts = scan(model, packed(rows()))
    for position in ("all", "last"):
        for metric in ("angular", "influence", "magnitude"):
            found, wanted = (getattr(distances[position], metric).triu(1) for distances in (parts, whole))
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)
        assert parts[position].tokens == whole[position].tokens


def test_a_model_of_one_block(tiny: Callable[..., Path]) -> None:
    model = load_model(tiny(blocks=1))
    found = scan(model, packed(rows([9, 4])))
    assert_same(found, reference(model, rows([9, 4])), 1)
    assert found["all"].windows("angular", 1)[0] > 0.05
    study = Study(model, packed(rows([9, 4])))
    assert choose(study, PruneConfig(blocks=0), 0, range(0, 0)) == ()
    with pytest.raises(UserError, match=r"prune\.blocks is 1, but only 0 blocks can be removed; lower"):
        choose(study, PruneConfig(blocks=1), 1, range(0, 0))


def test_progress_counts_real_tokens_and_batches_are_read_once(tiny: Callable[..., Path]) -> None:
    seen: list[int] = []
    scan(load_model(tiny()), iter(packed(rows())), lambda n=1, note="": seen.append(n))
    assert seen == [batch.tokens for batch in packed(rows())]


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_are_removed_even_after_an_error(tiny: Callable[..., Path]) -> None:
    model = load_model(tiny())
    assert hooks(model) == 0
    with boundaries(Decoder(model)) as states:
        assert hooks(model) == 5
        model(torch.tensor([[5, 6, 7]]))
        model(torch.tensor([[5, 6]]))  # a second pass starts over
        assert [state.shape for state in states] == [(1, 2, 64)] * 5
        torch.testing.assert_close(states[0], model.model.embed_tokens(torch.tensor([[5, 6]])))
    assert hooks(model) == 0
    scan(model, packed(rows([4])))
    assert hooks(model) == 0
    with pytest.raises(IndexError):
        scan(model, packed([[5, 100_000]]))
    assert hooks(model) == 0


def test_last_tokens() -> None:
    segments = torch.tensor([[0, 0, 1, 2, 2, -1, -1], [0, 0, 0, 0, 0, 0, 1], [0, -1, -1, -1, -1, -1, -1]])
    assert last_tokens(segments).nonzero().tolist() == [[0, 1], [0, 2], [0, 4], [1, 5], [1, 6], [2, 0]]


def distances(values: dict[int, list[float]], blocks: int) -> Distances:
    """Angular distances from `values[window length][first block]`; influence is their negative, magnitude how far
    they are from 0.35."""
    table = torch.full((blocks + 1, blocks + 1), 99.0, dtype=torch.float64)
    for length, row in values.items():
        for first, value in enumerate(row):
            table[first, first + length] = value
    return Distances(table, -table, (table - 0.35).abs(), 1)


SINGLE = [0.5, 0.3, 0.2, 0.3, 0.2, 0.1]
DOUBLE = [0.7, 0.4, 0.6, 0.4, 0.1]
Chosen = Callable[[str, str, int, range], Cut]


@pytest.fixture
def chosen(tiny: Callable[..., Path]) -> Chosen:
    """chosen(search, importance, count, candidates) of a study that has found the distances above."""
    study = Study(load_model(tiny(blocks=6)), [])
    vars(study)["distances"] = {"all": distances({1: SINGLE, 2: DOUBLE}, 6)}

    def search(kind: str, importance: str, count: int, candidates: range) -> Cut:
        config = PruneConfig.model_validate({"blocks": count, "search": kind, "importance": importance})
        return choose(study, config, count, candidates)

    return search


def test_the_closest_window_is_chosen_and_the_first_of_equals(chosen: Chosen) -> None:
    assert chosen("window", "angular", 2, range(0, 6)) == (4, 5)
    assert chosen("window", "angular", 2, range(0, 5)) == (1, 2)  # 3-4 is as good
    assert chosen("window", "angular", 2, range(2, 5)) == (3, 4)
    assert chosen("window", "influence", 2, range(0, 6)) == (0, 1)
    assert chosen("window", "magnitude", 2, range(0, 6)) == (1, 2)
    assert chosen("window", "angular", 1, range(1, 5)) == (2,)


def test_the_lowest_blocks_are_chosen_in_order_and_the_first_of_equals(chosen: Chosen) -> None:
    assert chosen("lowest", "angular", 3, range(0, 6)) == (2, 4, 5)
    assert chosen("lowest", "angular", 3, range(1, 5)) == (1, 2, 4)  # 1 before 3, which is as good
    assert chosen("lowest", "influence", 2, range(0, 6)) == (0, 1)
    assert chosen("lowest", "magnitude", 2, range(0, 6)) == (1, 3)
    assert chosen("lowest", "angular", 4, range(1, 5)) == (1, 2, 3, 4)


@pytest.mark.parametrize("search", ["window", "lowest"])
def test_none_or_too_many(chosen: Chosen, search: str) -> None:
    assert chosen(search, "angular", 0, range(1, 5)) == ()
    with pytest.raises(UserError, match=r"prune\.blocks is 5, but only 4 blocks can be removed \(blocks 1 to 4\)"):
        chosen(search, "angular", 5, range(1, 5))

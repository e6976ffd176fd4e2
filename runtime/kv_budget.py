"""A KV cache of fixed size: how it is asked for, and which entries go (Locret, arXiv 2410.01805). Numpy alone.

Entries are those of one block: n of them for each of G KV heads, in the order of the text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..core.errors import UserError
from ..core.suggest import did_you_mean
from .generator import KvPolicy, KvPositions

HEADS_SETTINGS = ("chunk", "stabilizers", "local", "pool", "sinks")  # how a bundle's heads were meant to be used
FOLDER, SETTINGS = "retaining", "settings.json"  # of a bundle with retaining heads
POLICIES, POSITIONS = get_args(KvPolicy), get_args(KvPositions)
SINKS = 4  # first tokens that `recent` keeps


@dataclass(frozen=True)
class KvBudget:
    """How a long text is read and what is held of it, per block and KV head. `UserError` for what cannot be."""

    budget: int  # entries held before the local tail
    chunk: int = 256  # tokens read between evictions
    stabilizers: int = 64  # newest entries that stay after every chunk but the last
    local: int = 100  # last tokens of a prompt, read after all evictions
    policy: KvPolicy = "retaining"
    evict_decoding: bool = False  # then budget + local entries are held at most; else every new one stays
    positions: KvPositions = "true"  # contiguous: what is held is rotated anew to 0, 1, 2, …
    pool: int = 1  # of retaining heads' scores, the mean over so many neighbours read together; odd
    sinks: int = 0  # with retaining heads, first tokens of a text that stay whatever their score

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            there = f"{', '.join(POLICIES)}{did_you_mean(self.policy, POLICIES)}"
            raise UserError(f"there is no KV policy {self.policy!r}; there are: {there}")
        if self.positions not in POSITIONS:
            there = f"{', '.join(POSITIONS)}{did_you_mean(self.positions, POSITIONS)}"
            raise UserError(f"there are no KV positions {self.positions!r}; there are: {there}")
        if self.chunk < 1 or self.local < 0 or self.stabilizers < 0:
            raise UserError("a KV budget needs a chunk of 1 token or more, and no negative numbers")
        if self.budget < max(1, self.stabilizers):
            raise UserError(
                f"a KV budget of {self.budget} has no room for {self.stabilizers} stabilizers, which are part of it: "
                "raise the budget or lower the stabilizers (--kv-stabilizers)"
            )
        if self.evict_decoding and self.local < 1:
            raise UserError("eviction while decoding needs a local tail of 1 token or more (--kv-local)")

    @property
    def reach(self) -> int:
        """Entries held at most while a prompt is read."""
        return self.budget + max(self.chunk, self.local)


def choose_budget(bundle: Path, budget: int, **values: Any) -> KvBudget:
    """A budget for a bundle; what is None of `values` is as its heads were made for, else as by default.

    `UserError` where the policy needs heads and the bundle has none.
    """
    file = bundle / FOLDER / SETTINGS
    given = {key: value for key, value in values.items() if value is not None}
    if not file.is_file():
        if given.get("policy", "retaining") == "retaining":
            raise UserError(
                f"{bundle} has no retaining heads, so nothing says what to keep: train them with a recipe's `retain` "
                "section, or choose --kv-policy recent or random"
            )
        return KvBudget(budget, **given)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        made_for = {key: int(found[key]) for key in HEADS_SETTINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the retaining heads' settings in {file}: {error}") from error
    return replace(KvBudget(budget, stabilizers=0), **(made_for | given))


def best(scores: np.ndarray, budget: int, protected: int = 0) -> np.ndarray:
    """Indices (G, budget), ascending, of the greatest of scores (G, n), n ≥ budget, the last `protected` among them; of
    equal ones the first."""
    ranks = -scores
    if protected:
        ranks[:, ranks.shape[1] - protected :] = -np.inf
    return np.sort(np.argsort(ranks, axis=1, kind="stable")[:, :budget], axis=1)


def worst(scores: np.ndarray) -> np.ndarray:
    """Index (G,) of the smallest of scores (G, n); of equal ones the last."""
    return scores.shape[1] - 1 - scores[:, ::-1].argmin(axis=1)


def pooled(scores: np.ndarray, kernel: int) -> np.ndarray:
    """Means of scores (G, T) of tokens in a row over the `kernel` around each (an odd number), or those there are."""
    count, reach = scores.shape[1], kernel // 2
    sums = np.zeros((len(scores), count + 1))
    np.cumsum(scores, axis=1, dtype=np.float64, out=sums[:, 1:])
    first = np.maximum(np.arange(count) - reach, 0)
    end = np.minimum(np.arange(count) + reach + 1, count)
    return ((sums[:, end] - sums[:, first]) / (end - first)).astype(np.float32)


def recent_scores(heads: int, places: np.ndarray) -> np.ndarray:
    """(G, T) for tokens at places (T,) of the text: the newest stay, and the first few (StreamingLLM, 2309.17453)."""
    row = np.where(places < SINKS, np.inf, places).astype(np.float32)
    return np.broadcast_to(row, (heads, len(places)))


def random_scores(block: int, heads: int, places: np.ndarray) -> np.ndarray:
    """(G, T) in [0, 1), the same for a block, head and place however a text is cut into chunks (SplitMix64)."""
    keys = (block * 257 + np.arange(heads)[:, None]) * 2**24 + places
    z = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def check_windows(config: dict[str, Any]) -> None:
    """`UserError` for a model (its config.json) whose attention slides a window.

    The kernel counts a window in entries held, which are no longer the text's tokens once some were evicted.
    """
    window, family = config.get("sliding_window"), config.get("model_type")
    kinds = config.get("layer_types") or ["sliding_attention"] * (family in ("mistral", "phi3"))
    if window and window < config["max_position_embeddings"] and "sliding_attention" in kinds:
        raise UserError(
            f"a KV budget cannot be kept for a model whose attention slides a window of {window} tokens: ONNX Runtime "
            "counts it in entries held, not in tokens of the text; run it without --kv-budget"
        )


def rotary_frequencies(config: dict[str, Any], head_size: int) -> np.ndarray:
    """Radians (r/2,) float64 by which a position turns each pair of a head's dimensions, by a model's config.json.

    `UserError` for scalings other than linear and llama3: contiguous positions would need more than a turn.
    """
    rope = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    rope = rope.get("full_attention", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    size = int(head_size * rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0))
    found = rope["rope_theta"] ** -(np.arange(0, size, 2) / size)
    if kind == "default":
        return found
    if kind == "linear":
        return found / rope["factor"]
    if kind == "llama3":
        # Slow turns are `factor` times slower, fast ones as they are, a blend between.
        turns = rope["original_max_position_embeddings"] * found / (2 * np.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        blend = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - blend) * found / rope["factor"] + blend * found
    raise UserError(f"contiguous KV positions do not work with rope scaling {kind!r}: use --kv-positions true")


def turn(keys: np.ndarray, by: np.ndarray, frequencies: np.ndarray) -> None:
    """Turn rotated keys (G, n, D) on by so many positions, (G, n) or what fits it, in place."""
    half, least = len(frequencies), by.min()
    angles = np.arange(least, by.max() + 1)[:, None] * frequencies  # few turns are made by many keys
    cos, sin = (function(angles).astype(np.float32)[by - least] for function in (np.cos, np.sin))
    first, second = keys[..., :half].copy(), keys[..., half : 2 * half]
    keys[..., :half] = first * cos - second * sin
    keys[..., half : 2 * half] = second * cos + first * sin

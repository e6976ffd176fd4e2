"""Rotary positions of keys that a cache holds: how fast they turn, and turning them on. Numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.errors import UserError


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

"""Rotary positions of keys that a cache holds: how fast they turn, and turning them on. Numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.errors import UserError
from ..modeling.shape import llama3_slowdown, rope_settings, rotated_size, wavelengths


def rotary_frequencies(config: dict[str, Any]) -> np.ndarray:
    """Radians (r/2,) float64 by which a position turns each pair of a head's dimensions, by a model's config.json.

    `UserError` for scalings other than linear and llama3: contiguous positions would need more than a turn.
    """
    rope, size = rope_settings(config), rotated_size(config)
    kind, frequencies = rope["rope_type"], 2 * np.pi / wavelengths(rope["rope_theta"], size)
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "llama3":
        return frequencies / llama3_slowdown(rope, size)
    raise UserError(f"contiguous KV positions do not work with rope scaling {kind!r}: use --kv-positions true")


def turn(keys: np.ndarray, by: np.ndarray, frequencies: np.ndarray) -> None:
    """Turn rotated keys (G, n, D) on by so many positions, (G, n) or what fits it, in place."""
    half, least = len(frequencies), by.min()
    angles = np.arange(least, by.max() + 1)[:, None] * frequencies  # few turns are made by many keys
    cos, sin = (function(angles).astype(np.float32)[by - least] for function in (np.cos, np.sin))
    first, second = keys[..., :half].copy(), keys[..., half : 2 * half]
    keys[..., :half] = first * cos - second * sin
    keys[..., half : 2 * half] = second * cos + first * sin

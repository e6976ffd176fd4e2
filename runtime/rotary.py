"""Rotary positions of cached keys: their frequencies, and rotating keys further. Numpy only."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core.errors import UserError
from ..modeling.shape import llama3_slowdown, rope_settings, rotated_size, wavelengths


def rotary_frequencies(config: dict[str, Any]) -> np.ndarray:
    """Radians (r/2,) float64 per position for each rotated pair of a head's dimensions, from a model's config.json.

    `UserError` for scalings other than linear and llama3, under which moving a key is more than a rotation.
    """
    rope, size = rope_settings(config), rotated_size(config)
    scaling, frequencies = rope["rope_type"], 2 * np.pi / wavelengths(rope["rope_theta"], size)
    if scaling == "default":
        return frequencies
    if scaling == "linear":
        return frequencies / rope["factor"]
    if scaling == "llama3":
        return frequencies / llama3_slowdown(rope, size)
    raise UserError(f"contiguous KV positions do not work with rope scaling {scaling!r}: use --kv-positions true")


def turn(keys: np.ndarray, by: np.ndarray, frequencies: np.ndarray) -> None:
    """Rotate keys (G, n, D) further, in place, by a number of positions, (G, n) or broadcastable to it."""
    half, least = len(frequencies), by.min()
    angles = np.arange(least, by.max() + 1)[:, None] * frequencies  # many keys share few distinct angles
    cos, sin = (function(angles).astype(np.float32)[by - least] for function in (np.cos, np.sin))
    first, second = keys[..., :half].copy(), keys[..., half : 2 * half]
    keys[..., :half] = first * cos - second * sin
    keys[..., half : 2 * half] = second * cos + first * sin

"""Converting between transformers' and llama.cpp's layout: names, row order and rotary factors.

Shared by the GGUF writer (`export`) and reader (`modeling.gguf`), so that each is the inverse of the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from .families import Family, family_of
from .shape import AttentionShape, llama3_slowdown, rope_settings, wavelengths
from .types import ModelConfig

Array = NDArray[np.float32]
FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
TOLERANCE = 1e-5  # relative error allowed for recomputed rotary factors


def name_map(family: Family, blocks: int) -> gguf.TensorNameMap:
    """The map from transformers' weight names to llama.cpp's."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[family.gguf.architecture], blocks)


def tensor_names(family: Family, blocks: int, names: Sequence[str]) -> dict[str, str | None]:
    """transformers' name of each weight → llama.cpp's; None if llama.cpp has none."""
    known = name_map(family, blocks)
    return {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}


def part_of(name: str) -> str:
    """A tensor's part of its block by llama.cpp's name, such as attn_q; empty outside the blocks."""
    parts = name.split(".")
    return parts[2] if parts[0] == "blk" and len(parts) > 2 else ""


def to_gguf(name: str, values: Array, config: ModelConfig, depth: int) -> Array:
    """A weight as stored in a GGUF file, under llama.cpp's name, for a model of `depth` blocks."""
    family = family_of(config)
    if family.gguf.adjacent_pairs and part_of(name) in ("attn_q", "attn_k"):
        return interleave(values, _heads(name, config))
    if family.norm_offset and name.endswith("_norm.weight"):  # the file has the whole factor
        values = values + np.float32(family.norm_offset)
    if family.gguf.query_scale and part_of(name) == "attn_q_norm":
        values = values * np.float32(query_scale(config, depth))
    return values


def from_gguf(name: str, values: Array, config: ModelConfig) -> Array:
    """The inverse of `to_gguf` for a model of all its blocks, whose query scale is llama.cpp's own."""
    family = family_of(config)
    if family.gguf.adjacent_pairs and part_of(name) in ("attn_q", "attn_k"):
        return deinterleave(values, _heads(name, config))
    if family.norm_offset and name.endswith("_norm.weight"):
        return values - np.float32(family.norm_offset)
    return values


def _heads(name: str, config: ModelConfig) -> int:
    shape = AttentionShape.of(config)
    return shape.heads if part_of(name) == "attn_q" else shape.kv_heads


def interleave(values: Array, heads: int) -> Array:
    """llama.cpp's llama rotates adjacent pairs, transformers the two halves of a head: reorder the output rows."""
    rows = values.shape[0]
    halves = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def deinterleave(values: Array, heads: int) -> Array:
    """The inverse of `interleave`."""
    rows = values.shape[0]
    pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def own_query_scalar(hidden: int, heads: int, size: int, blocks: int) -> float:
    """The number whose square root llama.cpp divides Gemma-3's queries by: the head size, or for 62 blocks the hidden
    size per head."""
    return hidden / heads if blocks == 62 else size


def query_scale(config: ModelConfig, depth: int) -> float:
    """The difference between llama.cpp's scale of attention and the model's own, which goes into the query norm, so
    that a pruned model keeps the scale it was trained with."""
    shape = AttentionShape.of(config)
    own = own_query_scalar(config.hidden_size, shape.heads, shape.size, depth)
    return math.sqrt(own / config.query_pre_attn_scalar)


def rope_tensors(config: ModelConfig) -> dict[str, Array]:
    """Tensors that llama.cpp reads rotary factors from, by name; most models have none."""
    rope = rope_settings(config)
    if rope["rope_type"] == "llama3":
        return {FACTORS: llama3_factors(rope, AttentionShape.of(config).size)}
    if rope["rope_type"] == "longrope":
        return {
            name: np.asarray(rope[key], dtype=np.float32)
            for name, key in ((LONG_FACTORS, "long_factor"), (SHORT_FACTORS, "short_factor"))
        }
    return {}


def llama3_factors(rope: dict[str, Any], size: int) -> Array:
    """How much slower each pair of dimensions rotates, as stored in GGUF files."""
    return llama3_slowdown(rope, size).astype(np.float32)


def llama3_parameters(factors: Array, theta: float, size: int) -> dict[str, Any] | None:
    """Parameters with which `llama3_factors` gives these factors; None where there are none.

    The file has the factors alone. Between the fast and the slow pairs the blend is a line in 1 / wavelength, through
    at least two points of which the parameters follow, but for a common scale: `low_freq_factor` is taken to be 1, as
    in every published model. With fewer points many parameters give the same factors, and one set of them is taken.
    """
    wide = factors.astype(np.float64)
    factor, turns = float(wide.max()), 1 / wavelengths(theta, size)
    if not math.isclose(factor, round(factor, 4), rel_tol=1e-6) or factor <= 1:
        return None
    factor = round(factor, 4)
    blend = (1 / wide - 1 / factor) / (1 - 1 / factor)
    between = (blend > 1e-6) & (blend < 1 - 1e-6)
    # Boundaries of the two ends, in turns per token: below `slow` the blend is 0, above `fast` it is 1.
    slow = turns[blend <= 1e-6].max(initial=0.0)
    fast = turns[blend >= 1 - 1e-6].min(initial=np.inf)
    candidates = []
    if between.sum() >= 2:
        slope, start = np.polyfit(turns[between], blend[between], 1)
        if start < 0:
            candidates.append((slope / -start, 1 - 1 / start))
    # With fewer points: 4 is what every published model has; the nearer to 1, the more certainly the ends are kept.
    for high in (4.0, 2.0, 8.0, 1.5, 1.1, 1.01):
        if between.sum() == 1:
            part, turn = blend[between][0], turns[between][0]
            context = round((1 + (high - 1) * part) / turn)
            candidates.append((context, 1 + (context * turn - 1) / part))
        elif not between.any() and slow * high < fast:
            # Any context from high / fast to 1 / slow gives these factors.
            least = high / fast if np.isfinite(fast) else 0.0
            candidates.append((math.sqrt(max(least, 1e-9) / slow) if least and slow else least or 1 / slow, high))
    for context, high in candidates:
        parameters = {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": round(float(high), 6),
            "original_max_position_embeddings": max(1, round(context)),
        }
        if np.allclose(llama3_factors(parameters, size), factors, rtol=TOLERANCE, atol=0):
            return parameters
    return None

"""A decoder's shape and rotary settings, read from its configuration: transformers' object, or a config.json's values.

Both forms of rotary settings are read: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` before
it. Needs numpy alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .families import family_of
from .types import ConfigLike


def setting(config: ConfigLike, name: str, default: object = None) -> Any:
    """A configuration's value; `default` if it has none."""
    return config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)


@dataclass(frozen=True)
class AttentionShape:
    """The heads of a model's attention, the same in all its blocks."""

    heads: int
    kv_heads: int
    size: int  # of a head

    @classmethod
    def of(cls, config: ConfigLike) -> AttentionShape:
        heads = setting(config, "num_attention_heads")
        kv_heads = setting(config, "num_key_value_heads") or heads
        return cls(heads, kv_heads, setting(config, "head_dim") or setting(config, "hidden_size") // heads)

    @property
    def qkv(self) -> int:
        """Width of q, k and v, concatenated."""
        return (self.heads + 2 * self.kv_heads) * self.size


def sliding_blocks(config: ConfigLike) -> list[bool]:
    """For each block, whether its attention slides a window of `sliding_window` tokens."""
    windows, kinds = family_of(config).windows, setting(config, "layer_types")
    blocks = setting(config, "num_hidden_layers")
    if windows == "none" or not setting(config, "sliding_window"):
        return [False] * blocks
    return [kind == "sliding_attention" for kind in kinds] if kinds else [windows == "all"] * blocks


def rope_kinds(config: ConfigLike) -> list[dict[str, Any]]:
    """A model's sets of rotary parameters: one, or one per kind of block."""
    rope = setting(config, "rope_parameters")
    if not rope:
        rope = {"rope_theta": setting(config, "rope_theta", 10000.0)} | (setting(config, "rope_scaling") or {})
        part = setting(config, "partial_rotary_factor")
        rope |= {"partial_rotary_factor": part} if part else {}
    nested = [each for each in rope.values() if isinstance(each, dict)]
    return [_named(each) for each in nested or [rope]]


def rope_settings(config: ConfigLike, kind: str = "full_attention") -> dict[str, Any]:
    """A model's rotary parameters; with several kinds of blocks, those of one kind."""
    nested = (setting(config, "rope_parameters") or {}).get(kind)
    return _named(nested) if nested else rope_kinds(config)[0]


def _named(rope: dict[str, Any]) -> dict[str, Any]:
    return rope | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}


def rotated_size(config: ConfigLike) -> int:
    """How many dimensions of a head are rotated: all, in most families."""
    return int(AttentionShape.of(config).size * rope_settings(config).get("partial_rotary_factor", 1.0))


def by_length(config: ConfigLike) -> bool:
    """Whether rotary frequencies depend on the length of the text."""
    return any(rope["rope_type"] == "longrope" for rope in rope_kinds(config))


def scaled(config: ConfigLike) -> bool:
    """Whether rotary positions are scaled, in any kind of block."""
    return any(rope["rope_type"] != "default" for rope in rope_kinds(config))


def original_context(config: ConfigLike) -> int:
    """The context that the model had before its rotary positions were scaled, or all of it.

    If the configuration does not name it, transformers' scalings start from `max_position_embeddings`, except the
    linear one, whose `max_position_embeddings` is the stretched context.
    """
    rope = next((rope for rope in rope_kinds(config) if rope["rope_type"] != "default"), {})
    named = rope.get("original_max_position_embeddings") or setting(config, "original_max_position_embeddings")
    stretched = rope["factor"] if rope.get("rope_type") == "linear" else 1.0
    return int(named or setting(config, "max_position_embeddings") / stretched)


def llama3_slowdown(rope: dict[str, Any], size: int) -> NDArray[np.float64]:
    """How much slower each pair of dimensions rotates under Llama 3's scaling, (size / 2,): 1 for fast ones, `factor`
    for slow ones, a blend between."""
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = np.clip((context / wavelengths(rope["rope_theta"], size) - low) / (high - low), 0, 1)
    return 1 / ((1 - blend) / factor + blend)


def wavelengths(theta: float, size: int) -> NDArray[np.float64]:
    """Wavelength of each pair of dimensions in tokens, (size / 2,)."""
    return 2 * math.pi * theta ** (np.arange(0, size, 2) / size)

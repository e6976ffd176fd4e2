"""A decoder's shape from its configuration. No torch."""

from __future__ import annotations

from typing import Any

from ..core.errors import UserError
from ..core.geometry import Geometry
from .shape import AttentionShape

NEEDED = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")


def geometry_of(config: dict[str, Any]) -> Geometry:
    """The shape in a config.json; `UserError` for a missing or invalid number."""
    for key in (*NEEDED, *OPTIONAL):
        value = config.get(key)
        if not (type(value) is int and value > 0) and not (value is None and key in OPTIONAL):
            raise UserError(f"the model's config.json: {key} must be a whole number above 0 (it is {value!r})")
    attention = AttentionShape.of(config)
    return Geometry(
        config["num_hidden_layers"],
        config["hidden_size"],
        config["intermediate_size"],
        attention.heads,
        attention.kv_heads,
        attention.size,
        config["vocab_size"],
        bool(config.get("tie_word_embeddings", False)),
        config.get("max_position_embeddings") or 1 << 30,
    )

"""What parts of the model's own code hold at once. No torch."""

from __future__ import annotations

from ..core.geometry import Geometry

LABEL_QUERIES, LABEL_KEYS = 128, 1024  # whose logits exist at once where retaining heads get their labels


def labelling_bytes(shape: Geometry) -> int:
    """Of the logits that exist at once, and of their scaled copy, where retaining heads get their labels."""
    return 2 * shape.heads * LABEL_QUERIES * LABEL_KEYS * 4

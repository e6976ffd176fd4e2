"""Peak memory of parts of the modeling code. No torch."""

from __future__ import annotations

from ..core.geometry import Geometry

LABEL_QUERIES, LABEL_KEYS = 128, 1024  # whose logits exist at once where retaining heads get their labels


def labelling_bytes(shape: Geometry) -> int:
    """Bytes of the logits held at once, and their scaled copy, while labels for retaining heads are computed."""
    return 2 * shape.heads * LABEL_QUERIES * LABEL_KEYS * 4

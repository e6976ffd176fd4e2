"""The operations, and the bytes read, that running a model takes. No torch.

Counted are matrix products (2 operations per weight and token) and attention (4 × heads × head size per pair of
tokens). Decoding reads all weights at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .geometry import Geometry


@dataclass(frozen=True)
class Work:
    """Operations, and the bytes read in steps limited by memory bandwidth; on the device and on the host CPU."""

    flops: float = 0.0
    read: float = 0.0
    double: float = 0.0  # the part of it in float64
    host_flops: float = 0.0
    host_double: float = 0.0
    host_read: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

    @property
    def total(self) -> float:
        """All operations."""
        return self.flops + self.double + self.host_flops + self.host_double

    def beside(self) -> Work:
        """The same work, all on the host CPU."""
        flops, double = self.flops + self.host_flops, self.double + self.host_double
        return Work(host_flops=flops, host_double=double, host_read=self.read + self.host_read)


def forward(shape: Geometry, blocks: float, tokens: float, context: float, heads: float | None = None) -> float:
    """Operations of a forward pass over `tokens` tokens that attend to `context` others on average.

    `heads` is the number of positions whose logits are computed (default: all).
    """
    weights = blocks * shape.block_products
    attention = 4 * blocks * shape.heads * shape.head_size * context
    logits = 2 * shape.vocab * shape.hidden * (tokens if heads is None else heads)
    return tokens * (2 * weights + attention) + logits


def decoding(
    shape: Geometry, blocks: int, rows: int, together: float, prompt: int, new: int, weights: float, size: int
) -> Work:
    """Generating `new` tokens after `prompt` tokens, for `rows` rows, `together` at once.

    Every step reads the weights (bytes) and each row's keys and values, at `size` bytes per number.
    """
    flops = forward(shape, blocks, rows * prompt, prompt / 2, rows)
    flops += forward(shape, blocks, rows * new, prompt + new / 2)
    cache = rows * new * (prompt + new / 2) * shape.kv_bytes(1, size, blocks)
    return Work(flops, max(1.0, rows / together) * new * weights + cache)


def batches(rows: int, batch: int) -> float:
    """The average number of rows per batch, as the last one may be smaller."""
    return rows / math.ceil(rows / batch)

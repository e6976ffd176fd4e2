"""Operations and bytes read, and how many of both running a model takes. No torch.

Counted are the matrix products (2 operations per weight and token) and attention (4 × heads × head size per pair of
tokens). Decoding has to read all weights for every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .geometry import Geometry


@dataclass(frozen=True)
class Work:
    """Operations, and bytes read again for steps too small to keep the processor busy; on the device, and on the host's
    processors."""

    flops: float = 0.0
    read: float = 0.0
    double: float = 0.0  # of it in float64
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
        """The same work, all of it on the host's processors."""
        flops, double = self.flops + self.host_flops, self.double + self.host_double
        return Work(host_flops=flops, host_double=double, host_read=self.read + self.host_read)


def forward(shape: Geometry, blocks: float, tokens: float, context: float, heads: float | None = None) -> float:
    """Operations of a forward pass over `tokens` tokens that see `context` others on average.

    `heads`: positions whose logits are computed; all of them if not given.
    """
    weights = blocks * shape.block_products
    attention = 4 * blocks * shape.heads * shape.head_size * context
    logits = 2 * shape.vocab * shape.hidden * (tokens if heads is None else heads)
    return tokens * (2 * weights + attention) + logits


def decoding(
    shape: Geometry, blocks: int, rows: int, together: float, prompt: int, new: int, weights: float, size: int
) -> Work:
    """Writing `new` tokens after `prompt` tokens, for `rows` rows, `together` at once.

    Every step reads the weights (bytes) and, of each row, the keys and values of `size` bytes a number.
    """
    flops = forward(shape, blocks, rows * prompt, prompt / 2, rows)
    flops += forward(shape, blocks, rows * new, prompt + new / 2)
    cache = rows * new * (prompt + new / 2) * shape.kv_bytes(1, size, blocks)
    return Work(flops, max(1.0, rows / together) * new * weights + cache)


def batches(rows: int, batch: int) -> float:
    """How many rows are together on average where the last batch may be smaller."""
    return rows / math.ceil(rows / batch)

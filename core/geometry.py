"""A decoder's shape, and the numbers of weights and cache entries that follow from it. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """A decoder's shape."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    positions: int = 1 << 30  # trained context length; no limit if the configuration has none

    @property
    def block_parameters(self) -> int:
        """Weights of one block."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def block_products(self) -> int:
        """Weights of one block in matrix products: all but the norms."""
        return self.block_parameters - 2 * self.hidden

    def parameters(self, blocks: int) -> int:
        """Weights of the model with `blocks` blocks."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return blocks * self.block_parameters + embeddings + self.hidden

    def kv_bytes(self, tokens: int, size: int, blocks: int | None = None) -> int:
        """Bytes of one token's keys and values, at `size` bytes per number, in `blocks` blocks (all if None)."""
        return 2 * (self.blocks if blocks is None else blocks) * self.kv_heads * self.head_size * tokens * size

    @property
    def qkv(self) -> int:
        """Width of a token's q, k and v, concatenated."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def state(self) -> int:
        """The most numbers held for one token inside a block: its stream, and the MLP's activations."""
        return 4 * self.hidden + 3 * self.intermediate

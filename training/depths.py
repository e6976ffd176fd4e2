"""Assigns response tokens to depths, with weights.

The deepest learns from every token, as in ordinary training. With `sample: k` each token also goes to k - 1 of the
other depths. Sampling per token instead of per step costs the same and trains every depth in every step. The shares are
equal to within one token, and the weights make up for what is left out: loss and gradient are unbiased estimates of
those of all depths at all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainingConfig


@dataclass(frozen=True)
class Drawn:
    """For P passes through the head over N tokens: the depth that each token is scored at, and its weight; (P, N)."""

    depth: Tensor  # int64, index into the depths
    weight: Tensor  # float32

    def to(self, device: str | torch.device) -> Drawn:
        """The same on another device."""
        return Drawn(self.depth.to(device), self.weight.to(device))

    def take(self, states: Tensor) -> Tensor:
        """The assigned hidden states (P, N, H) out of those of all depths (D, N, H)."""
        return states[self.depth, torch.arange(states.shape[1], device=states.device)]

    def sums(self, values: Tensor, depths: int) -> Tensor:
        """Sums per depth of C values per pass and token (C, P, N), and the number of tokens as last column: (D, C + 1),
        float64 on the CPU."""
        ones = torch.ones_like(values[:1])
        flat = torch.cat([values, ones]).flatten(1).double().cpu()
        return torch.zeros(depths, len(flat), dtype=torch.float64).index_add_(0, self.depth.flatten().cpu(), flat.T)


@dataclass(frozen=True)
class Depths:
    """The depths that are trained: numbers of blocks, ascending, and loss weights that sum to one."""

    blocks: tuple[int, ...]
    weights: tuple[float, ...]
    passes: int  # depths per token

    @classmethod
    def of(cls, config: TrainingConfig, blocks: int) -> Depths:
        """The depths that a section asks for, in a model of `blocks` blocks."""
        weights = config.depth_weights(blocks)
        return cls(tuple(weights), tuple(weights.values()), config.passes)

    def every(self, tokens: int) -> Drawn:
        """All depths at every token."""
        depth = torch.arange(len(self.blocks))[:, None].expand(-1, tokens)
        return Drawn(depth, torch.tensor(self.weights)[depth])

    def draw(self, tokens: int, seed: int) -> Drawn:
        """A random assignment of tokens to depths; the deepest is the first pass."""
        others = len(self.blocks) - 1
        if self.passes == others + 1:
            return self.every(tokens)
        random = torch.Generator().manual_seed(seed)
        # Shuffled tokens are dealt out to shuffled depths.
        turn = torch.randperm(tokens, generator=random)
        rounds = torch.arange(self.passes - 1)[:, None]
        order = torch.randperm(others, generator=random)
        depth = torch.cat([torch.full((1, tokens), others), order[(turn + rounds) % others]])
        share = (self.passes - 1) / others
        scale = torch.tensor([*(weight / share for weight in self.weights[:-1]), self.weights[-1]])
        return Drawn(depth, scale[depth])

    def mean(self, figures: Tensor) -> Tensor:
        """The weighted mean over depths of values (D, C)."""
        return torch.tensor(self.weights, dtype=figures.dtype) @ figures

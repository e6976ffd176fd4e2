"""Which depths learn from which response tokens, and what each of them counts for.

The deepest learns from every token, as in a plain training. With `sample: k` each token is given to k - 1 of the
others. Drawing for every token, and not once for a step, costs the same and lets every depth learn in every step. The
shares are even to one token, and what was left out is made up for by weight, so that the expected loss and gradient are
those of all depths at all tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainingConfig


@dataclass(frozen=True)
class Drawn:
    """For each of P passes through the head: the depth at which N tokens are seen, and what each counts for; (P, N)."""

    depth: Tensor  # long, index into the depths
    weight: Tensor  # float32

    def to(self, device: str | torch.device) -> Drawn:
        """The same on another device."""
        return Drawn(self.depth.to(device), self.weight.to(device))

    def take(self, states: Tensor) -> Tensor:
        """(P, N, H) of the depths' hidden states (D, N, H)."""
        return states[self.depth, torch.arange(states.shape[1], device=states.device)]

    def sums(self, values: Tensor, depths: int) -> Tensor:
        """(D, C + 1), float64 on the CPU: the sums of C figures per pass and token (C, P, N) at each depth, and the
        number of tokens."""
        ones = torch.ones_like(values[:1])
        flat = torch.cat([values, ones]).flatten(1).double().cpu()
        return torch.zeros(depths, len(flat), dtype=torch.float64).index_add_(0, self.depth.flatten().cpu(), flat.T)


@dataclass(frozen=True)
class Depths:
    """The depths of a training: the numbers of blocks, ascending, and their weights, which sum to one."""

    blocks: tuple[int, ...]
    weights: tuple[float, ...]
    passes: int  # depths that learn from each token

    @classmethod
    def of(cls, config: TrainingConfig, blocks: int) -> Depths:
        """What a section asks for, of a model with so many blocks."""
        weights = config.depth_weights(blocks)
        return cls(tuple(weights), tuple(weights.values()), config.passes)

    def every(self, tokens: int) -> Drawn:
        """Every depth at every token."""
        depth = torch.arange(len(self.blocks))[:, None].expand(-1, tokens)
        return Drawn(depth, torch.tensor(self.weights)[depth])

    def draw(self, tokens: int, seed: int) -> Drawn:
        """The depths that learn from each token, the deepest in the first pass."""
        others = len(self.blocks) - 1
        if self.passes == others + 1:
            return self.every(tokens)
        random = torch.Generator().manual_seed(seed)
        # The tokens in a random order are dealt to the depths in a random order.
        turn = torch.randperm(tokens, generator=random)
        rounds = torch.arange(self.passes - 1)[:, None]
        order = torch.randperm(others, generator=random)
        depth = torch.cat([torch.full((1, tokens), others), order[(turn + rounds) % others]])
        share = (self.passes - 1) / others
        scale = torch.tensor([*(weight / share for weight in self.weights[:-1]), self.weights[-1]])
        return Drawn(depth, scale[depth])

    def mean(self, figures: Tensor) -> Tensor:
        """The weighted mean over depths of figures (D, C)."""
        return torch.tensor(self.weights, dtype=figures.dtype) @ figures

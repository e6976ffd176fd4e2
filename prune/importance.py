"""Importance of blocks from one forward pass, as distances between the hidden states around them.

Block influence (ShortGPT, arXiv 2403.03853) is 1 − cos of a block's input and output; angular distance (arXiv
2403.17887) is arccos of that cosine over π, across a window of blocks. Both follow from the cosines between the hidden
states at all block boundaries; relative magnitude also needs their norms. One pass therefore serves all three, for
every window length. Nothing is stored per token: memory is one batch's hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.stage import Advance
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.types import CausalModel

TOKENS_AT_ONCE = 256  # for pairwise cosines; keeps the stacked copy of the hidden states within the CPU's caches


@dataclass(frozen=True)
class Distances:
    """Mean distances between block boundaries: entry [a, b], a ≤ b, spans the blocks a … b−1. Float64, (L+1, L+1)."""

    angular: Tensor
    influence: Tensor
    magnitude: Tensor  # ‖h_b − h_a‖ / ‖h_b‖
    tokens: int

    def windows(self, metric: str, length: int) -> list[float]:
        """The distance across `length` adjacent blocks, by the number of the first: L − length + 1 values."""
        return getattr(self, metric).diagonal(length).tolist()


@contextmanager
def boundaries(decoder: Decoder) -> Iterator[list[Tensor]]:
    """A list that each forward pass fills with the hidden states at the L+1 block boundaries, (B, T, H) each.

    The last entry is the last block's output before the final norm.
    """
    states: list[Tensor] = []

    def before_first(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[:] = [args[0] if args else kwargs["hidden_states"]]

    def after(_module: object, _args: object, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [decoder.blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [block.register_forward_hook(after) for block in decoder.blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def scan(model: CausalModel, batches: Iterable[Batch], advance: Advance | None = None) -> dict[str, Distances]:
    """Distances over all tokens ("all") and over the last token of each row ("last"); padding is ignored."""
    decoder = Decoder(model)
    size = decoder.num_blocks + 1
    sums = {name: _Sums(size, model.device) for name in ("all", "last")}
    with boundaries(decoder) as states:
        for batch in batches:
            batch = batch.to(model.device)
            decoder.hidden(**batch.model_inputs())
            real, last = batch.segment_ids >= 0, last_tokens(batch.segment_ids)
            flat = [state.flatten(0, 1) for state in states]
            keep = real.flatten().nonzero().squeeze(1)
            for index in keep.split(TOKENS_AT_ONCE):
                cosines, lengths = pairwise_cosines(torch.stack([state[index] for state in flat], dim=1))
                sums["all"].add(cosines, lengths)
                chosen = last.flatten()[index]
                if chosen.any():
                    sums["last"].add(cosines[chosen], lengths[chosen])
            states.clear()
            if advance is not None:
                advance(int(real.sum()))
    return {name: total.mean() for name, total in sums.items()}


def last_tokens(segment_ids: Tensor) -> Tensor:
    """True at each row's last token; (B, T) bool from segment ids, where −1 is padding."""
    following = torch.nn.functional.pad(segment_ids[:, 1:], (0, 1), value=-1)
    return (segment_ids >= 0) & (following != segment_ids)


def pairwise_cosines(states: Tensor) -> tuple[Tensor, Tensor]:
    """(N, S, H) hidden states of N tokens at S boundaries → (N, S, S) cosines and (N, S) lengths, in float32."""
    states = states.float()
    lengths = states.norm(dim=-1)
    states = states / lengths.clamp_min(1e-12)[..., None]
    return (states @ states.transpose(1, 2)).clamp_(-1, 1), lengths


class _Sums:
    def __init__(self, size: int, device: torch.device):
        self.cosine = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.angle = torch.zeros_like(self.cosine)
        self.magnitude = torch.zeros_like(self.cosine)
        self.tokens = 0

    def add(self, cosines: Tensor, lengths: Tensor) -> None:
        self.cosine += cosines.sum(0, dtype=torch.float64)
        self.angle += cosines.arccos().sum(0, dtype=torch.float64)
        # ‖b − a‖² / ‖b‖² = q² − 2q·cos + 1 with q = ‖a‖ / ‖b‖
        shorter = lengths[:, :, None] / lengths[:, None, :].clamp_min(1e-12)
        self.magnitude += (shorter * (shorter - 2 * cosines) + 1).clamp_min_(0).sqrt_().sum(0, dtype=torch.float64)
        self.tokens += len(cosines)

    def mean(self) -> Distances:
        count = max(self.tokens, 1)
        angular, influence = self.angle / (math.pi * count), 1 - self.cosine / count
        return Distances(angular.cpu(), influence.cpu(), (self.magnitude / count).cpu(), self.tokens)

"""The residual stream around a gap: the data that heals are fitted on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.stage import Advance
from ..data.packing import Batch
from ..modeling.blocks import Decoder, replaced
from ..records.importance import Healing
from .least_squares import Fit, Sums

Values = dict[nn.Parameter, Tensor]


@dataclass(frozen=True)
class Tokens:
    """States at a gap for the N tokens of one packed row (padding excluded), (N, H) each except `inner`."""

    held: bool  # held out of the fit, for selection
    inner: Tensor  # (N, intermediate): the input of `down_proj` in the block before the gap
    mlp: Tensor  # that block's MLP output
    residual: Tensor  # the stream it is added to
    target: Tensor  # the unpruned model's stream after the gap, scaled as the stream before it is


@dataclass
class Gap:
    """One gap of a model whose earlier gaps are already healed."""

    decoder: Decoder
    first: int
    last: int
    upstream: list[int]  # dropped blocks before it
    downstream: list[int]  # kept blocks after it
    original: Values  # the unpruned model's values of the parameters that healing earlier gaps changed
    scale: float  # of the stream before it
    batches: list[Batch]
    held_out: float
    advance: Advance

    @property
    def block(self) -> int:
        """The kept block before the gap."""
        return self.first - 1

    @property
    def identity(self) -> Tensor:
        """The identity map after the MLP, float64: (H, H), or (H,) where only a scale per channel can be fused."""
        ones = torch.ones(self.decoder.hidden_size, dtype=torch.float64, device=self.decoder.model.device)
        return ones.diag() if self.decoder.can_fuse_after_mlp else ones

    def sums(self) -> list[Sums]:
        """Empty sums for a map after the MLP: of the fit rows, and of the held-out rows."""
        size, full = self.decoder.hidden_size, self.decoder.can_fuse_after_mlp
        return [Sums.empty(size, size, self.decoder.model.device, diagonal=not full) for _ in range(2)]

    def rescaled(self, scale: float) -> Values:
        """Values that make the blocks after the gap add 1/scale as much, so that the stream may be `scale` times
        smaller."""
        values: Values = {}
        for block in self.downstream:
            values |= self.decoder.rescaled(block, 1 / scale)
        return values

    def record(self, fit: Fit, scale: float = 1.0) -> Healing:
        """The record of a gap that was healed by least squares."""
        return Healing(self.block, (self.first, self.last), fit.ridge, fit.errors, fit.unhealed, fit.tokens, scale)

    def rows(self) -> Iterator[Tokens]:
        """All packed rows in order, every k-th held out; one pass through the blocks up to the gap's end.

        Raises `UserError` where there are fewer than two.
        """
        count = sum(len(batch.input_ids) for batch in self.batches)
        if count < 2:
            raise UserError("healing needs at least two packed calibration rows; raise prune.calibration.tokens")
        every, number = min(max(2, round(1 / self.held_out)), count), 0
        for batch in self.batches:
            batch = batch.to(self.decoder.model.device)
            seen, residual, target = self._states(batch)
            for row, segments in enumerate(batch.segment_ids):
                real = segments >= 0
                parts = (part[row][real] for part in (seen["inner"], seen["mlp"], residual, target))
                yield Tokens(number % every == every - 1, *parts)
                number += 1
            self.advance(batch.tokens)

    def _states(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        decoder, positions = self.decoder, batch.position_ids
        start = decoder.embed(batch.input_ids)
        kept = [block for block in range(self.block) if block not in set(self.upstream)]
        with decoder.mlp_addition(self.block) as seen:
            out = decoder.run(decoder.run(start, kept, positions), [self.block], positions)
        seen = dict(seen)
        if self.upstream:  # after a healed gap the block's input differs from the unpruned model's
            with replaced(self.original):
                target = decoder.run(start, range(self.last + 1), positions)
        else:
            target = decoder.run(out, range(self.first, self.last + 1), positions)
        return seen, out - seen["mlp"], target / self.scale

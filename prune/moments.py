"""Statistics for the linear heals of all gaps, gathered in one pass (heals/linear.py describes the map itself).

For a gap after block i the map depends only on Σ uᵀu and Σ uᵀ(h − r): u is the output of block i's MLP, r the residual
stream it is added to, h the stream after the gap's last block. All of these are the unpruned model's, so one pass
serves every gap of up to `longest` blocks. The sums do not grow with the number of tokens: (longest + 1) · L · H²
float32 (of products in float64), or · H where only a scale per channel can be fused. The ridge is selected per gap on
some held-out tokens, whose hidden states are kept. Sums and maps are held in host memory (15 GB for an 8B model and 6
blocks); a GPU computes the products, and holds a map only while it is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.stage import Advance
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from .cost import EVERY, HELD


@dataclass
class _States:
    """Hidden states of N tokens around every block, (N, H) each."""

    mlp: list[Tensor]  # the MLP's output
    after: list[Tensor]  # the stream after it was added

    def residual(self, block: int) -> Tensor:
        """The stream that the output of `block`'s MLP is added to."""
        return self.after[block] - self.mlp[block]


class Moments:
    """Linear heal maps of the unpruned model for gaps of up to `longest` blocks, from one pass."""

    def __init__(
        self,
        decoder: Decoder,
        batches: Sequence[Batch],
        longest: int,
        ridges: Sequence[float],
        toward: str,
        advance: Advance,
    ):
        self.decoder, self.longest, self.ridges, self.toward = decoder, longest, list(ridges), toward
        self._full = decoder.can_fuse_after_mlp
        self._maps: dict[tuple[int, int], Tensor] = {}
        count, size = decoder.num_blocks, decoder.hidden_size
        shape = (size, size) if self._full else (size,)
        self._uu = [torch.zeros(shape) for _ in range(count)]
        self._ud = {
            (i, j): torch.zeros(shape) for i in range(count) for j in range(i + 1, min(i + longest, count - 1) + 1)
        }
        self._held = self._gather(batches, advance)

    def map(self, first: int, last: int) -> Tensor:
        """T, (H, H) or (H,), float32, after the MLP of block `first` − 1 for the gap `first` … `last`; in host
        memory."""
        if (first, last) not in self._maps:
            block, device = first - 1, self.decoder.model.device
            u, d = self._held.mlp[block], self._held.after[last] - self._held.residual(block)
            u, d = u.to(device), d.to(device)
            maps = [self._solve(block, last, ridge) for ridge in self.ridges]
            errors = [float((apply_map(u, map) - d).square().sum()) for map in maps]
            self._maps[first, last] = maps[errors.index(min(errors))].cpu()
        return self._maps[first, last]

    def _solve(self, block: int, last: int, ridge: float) -> Tensor:
        device = self.decoder.model.device
        uu, ud = self._uu[block].to(device).double(), self._ud[block, last].to(device).double()
        alpha = ridge * float(uu.diagonal().mean() if self._full else uu.mean())
        if self._full:
            eye = torch.eye(len(uu), dtype=uu.dtype, device=uu.device)
            right = ud + alpha * eye if self.toward == "identity" else ud
            solution, failed = torch.linalg.solve_ex(uu + alpha * eye, right)
        else:
            right = ud + alpha if self.toward == "identity" else ud
            solution, failed = right / (uu + alpha), (uu + alpha == 0).any()
        if failed:
            raise UserError(
                f"scoring healed cuts: there is no map for the blocks {block + 1} to {last} with the ridge {ridge:g}; "
                "give prune.heal.ridge larger values, or raise prune.calibration.tokens"
            )
        return solution.float()

    @torch.no_grad()
    def _gather(self, batches: Sequence[Batch], advance: Advance) -> _States:
        rows = sum(len(batch.input_ids) for batch in batches)
        if rows < 2:
            raise UserError("scoring healed cuts needs two packed calibration rows; raise prune.calibration.tokens")
        every, row, kept = min(EVERY, rows), 0, []
        for batch in batches:
            batch = batch.to(self.decoder.model.device)
            states = self._states(batch)
            numbers = torch.arange(row, row + len(batch.input_ids), device=batch.input_ids.device)
            row += len(numbers)
            held = (numbers % every == every - 1)[:, None].expand_as(batch.segment_ids)
            real = batch.segment_ids >= 0
            self._add(states, (real & ~held).flatten().nonzero()[:, 0])
            index = (real & held).flatten().nonzero()[: HELD - sum(len(part.mlp[0]) for part in kept), 0]
            mlp, after = ([state[index].cpu() for state in part] for part in (states.mlp, states.after))
            kept.append(_States(mlp, after))
            del states  # before the next batch's
            advance(batch.tokens)
        parts = ([part.mlp for part in kept], [part.after for part in kept])
        return _States(*([torch.cat(block).float() for block in zip(*part, strict=True)] for part in parts))

    def _states(self, batch: Batch) -> _States:
        """The states at every position of a batch, from one forward pass."""
        decoder, states = self.decoder, _States([], [])
        hidden = decoder.embed(batch.input_ids)
        for block in range(decoder.num_blocks):
            with decoder.mlp_addition(block) as seen:
                hidden = decoder.run(hidden, [block], batch.position_ids)
            states.mlp.append(seen["mlp"].flatten(0, 1))
            states.after.append(hidden.flatten(0, 1))
        return states

    def _add(self, states: _States, index: Tensor) -> None:
        """Add a batch's positions `index` to the sums."""
        for block, mlp in enumerate(states.mlp):
            u, residual = mlp[index].double(), states.residual(block)[index]
            self._uu[block] += (u.T @ u if self._full else u.square().sum(0)).cpu()
            for last in range(block + 1, min(block + self.longest, self.decoder.num_blocks - 1) + 1):
                d = (states.after[last][index] - residual).double()  # the output that the MLP would need to have
                self._ud[block, last] += (u.T @ d if self._full else (u * d).sum(0)).cpu()


def apply_map(mlp: Tensor, map: Tensor) -> Tensor:
    """Apply a full map (H, H) or a scale per channel (H,) to an MLP's output (..., H)."""
    map = map.to(mlp.device)
    return mlp * map if map.ndim == 1 else mlp @ map.to(mlp.dtype)

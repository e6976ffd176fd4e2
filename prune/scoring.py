"""Scores cuts (sets of removed blocks) by the quality of the model without them, many cuts at once.

A cut's score is the mean over the tokens of packed rows of KL(unpruned ‖ cut), or of the next token's negative
log-likelihood. Both have the form `logsumexp(W·h) − e·h + c`, where h is the cut model's last hidden state and W the
head. e and c are constants per token: for KL the expected head row under the unpruned model's distribution and that
distribution's negative entropy, for the likelihood the next token's head row and 0. A score therefore costs one matrix
product, and the unpruned model's logits need not be stored.

Two things make this cheaper than a forward pass per cut: the blocks before the first new gap run once for all cuts
(their hidden states are held for one batch at a time), and a cut that is clearly worse than its competitors is dropped
before it has seen all rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.stage import Advance
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.cuts import Cut, gaps
from ..modeling.linear import linear
from .cost import CHUNK
from .moments import Moments, apply_map

Measure = Literal["kl", "perplexity"]
SURE = 3.5  # a cut that trails by this many standard errors is dropped early
ROWS = 6  # packed rows that every cut sees before any is dropped
TOKENS_TOGETHER = 8192  # tokens per forward pass of a block on a GPU, over several cuts; batching gains nothing on CPUs


@dataclass(frozen=True)
class Score:
    """A cut's score in nats per token, and whether it is the mean over all rows."""

    mean: float
    complete: bool = True

    @property
    def perplexity(self) -> float:
        """exp of the mean; meaningful for negative log-likelihoods."""
        return math.exp(min(self.mean, 700.0))


@dataclass
class _Running:
    """One cut's forward pass over one batch."""

    hidden: Tensor  # (B, T, H)
    at: int  # the next block to run
    removed: frozenset[int]
    maps: dict[int, Tensor] = field(default_factory=dict)  # block → the map applied to its MLP's output


@dataclass
class _Target:
    """A batch with its per-token constants e and c (see the module's docstring)."""

    batch: Batch
    rows: Tensor  # (N,) row indices of the positions that have a next token
    columns: Tensor  # (N,) column indices of the same
    expected: Tensor  # (N, H): e
    constant: Tensor  # (N,): c


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row and column indices of the positions whose next token belongs to the same segment of the packed row."""
    segments = batch.segment_ids
    same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] >= 0)
    rows, columns = same.nonzero(as_tuple=True)
    return rows, columns


class Scorer:
    """Scores cuts of one model on one set of packed rows.

    With `moments`, cuts are scored healed: each gap is bridged by the linear map fitted to the unpruned model's
    statistics. `passes` is the cost so far, in forward passes of the unpruned model over all rows.
    """

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], measure: Measure, moments: Moments | None = None):
        if decoder.softcap is not None:
            raise UserError(f"blocks cannot be scored by {measure} for a model that caps its logits; use influence")
        self.decoder, self.measure, self.moments = decoder, measure, moments
        self.batches = [batch for batch in batches if len(next_tokens(batch)[0])]
        if not self.batches:
            raise UserError("there is nothing to score blocks on: no calibration row has two tokens; raise its tokens")
        self._targets: list[_Target] | None = None
        self.spent = 0  # rows × blocks
        device = decoder.model.device
        size = max(batch.input_ids.numel() for batch in self.batches)
        self.together = 1 if device.type == "cpu" else max(1, TOKENS_TOGETHER // size)

    @property
    def rows(self) -> int:
        return sum(len(batch.input_ids) for batch in self.batches)

    @property
    def passes(self) -> float:
        return self.spent / (self.rows * self.decoder.num_blocks)

    @torch.no_grad()
    def prepare(self) -> list[_Target]:
        """The targets of all batches, computed once; KL takes one forward pass of the unpruned model."""
        if self._targets is None:
            self._targets = [self._target(batch.to(self.decoder.model.device)) for batch in self.batches]
        return self._targets

    @torch.no_grad()
    def score(
        self, cuts: Sequence[Cut], parent: Cut = (), keep: int | None = None, advance: Advance | None = None
    ) -> dict[Cut, Score]:
        """Scores of cuts that all contain `parent`, so that its hidden states serve all of them.

        With `keep`, cuts that are very unlikely to be among the `keep` best are dropped early; their scores are means
        over the rows seen until then.
        """
        seen: dict[Cut, list[Tensor]] = {cut: [] for cut in cuts}  # per batch (rows, 2): sum of losses, tokens
        finished: dict[Cut, Score] = {}
        for number, target in enumerate(self.prepare()):
            sums = self._batch(list(seen), parent, target)
            for cut, values in sums.items():
                seen[cut].append(values)
            if keep is not None and number < len(self.batches) - 1:
                for cut in behind(seen, keep):
                    finished[cut] = Score(_mean(seen.pop(cut)), complete=False)
                    if advance is not None:
                        advance()
        finished |= {cut: Score(_mean(values)) for cut, values in seen.items()}
        if advance is not None:
            advance(len(seen))
        return {cut: finished[cut] for cut in cuts}

    def _batch(self, cuts: Sequence[Cut], parent: Cut, target: _Target) -> dict[Cut, Tensor]:
        """For each cut, a batch's (rows, 2): sum of the losses and number of tokens per row."""
        starts = self._starts(cuts, parent, target.batch)
        self._run(list(starts.values()), target.batch)
        count = len(target.batch.input_ids)
        losses = torch.zeros(len(cuts), count, dtype=torch.float64, device=target.rows.device)
        for part in range(0, len(target.rows), CHUNK):
            chunk = slice(part, part + CHUNK)
            rows, columns = target.rows[chunk], target.columns[chunk]
            for number, cut in enumerate(cuts):
                hidden = self.decoder.norm(starts[cut].hidden[rows, columns])
                loss = self._loss(hidden, target.expected[chunk], target.constant[chunk])
                losses[number].index_add_(0, rows, loss.double())
        tokens = torch.bincount(target.rows, minlength=count).double()
        return {cut: torch.stack([losses[number], tokens], dim=1).cpu() for number, cut in enumerate(cuts)}

    def _loss(self, hidden: Tensor, expected: Tensor, constant: Tensor) -> Tensor:
        logits = self.decoder.head(hidden).float()
        return logits.logsumexp(-1) - (hidden.float() * expected).sum(-1) + constant

    def _starts(self, cuts: Sequence[Cut], parent: Cut, batch: Batch) -> dict[Cut, _Running]:
        """Where each cut departs from its parent: the hidden states at that point and the next block to run."""
        plans = {cut: self._plan(cut, parent) for cut in cuts}
        before, added = self._trunk(parent, {gap[0] for gap, _ in plans.values()}, batch)
        starts = {}
        for cut, (gap, maps) in plans.items():
            hidden = before[gap[0]]
            block = gap[0] - 1
            if block in maps and block in added:  # `before` may hold the parent's map, so start from the parts
                residual, mlp = added[block]
                hidden = residual + apply_map(mlp, maps[block])
            starts[cut] = _Running(hidden, gap[1] + 1, frozenset(cut), {b: m for b, m in maps.items() if b > gap[1]})
        return starts

    def _plan(self, cut: Cut, parent: Cut) -> tuple[tuple[int, int], dict[int, Tensor]]:
        """The first gap that the parent lacks, and the maps that heal all gaps."""
        if not set(parent) <= set(cut):
            raise ValueError(f"{cut} does not extend {parent}")
        old = gaps(parent)
        new = [gap for gap in gaps(cut) if gap not in old]
        return new[0] if new else (0, -1), self._maps(cut)  # no new gap: start at the first block

    def _maps(self, cut: Cut) -> dict[int, Tensor]:
        if self.moments is None:
            return {}
        return {first - 1: self.moments.map(first, last) for first, last in gaps(cut) if first > 0}

    def _trunk(
        self, parent: Cut, departures: Collection[int], batch: Batch
    ) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
        """The parent's hidden states before each block of `departures`, and the two terms that the block ahead of it
        adds up: the residual stream and its MLP's output."""
        maps, removed = self._maps(parent), frozenset(parent)
        hidden = self.decoder.embed(batch.input_ids)
        before, added = {0: hidden}, {}
        for block in range(max(departures)):
            if block not in removed:
                hidden, residual, mlp = self._block(hidden, block, batch.position_ids, maps.get(block))
                if block + 1 in departures and self.moments is not None:
                    added[block] = (residual, mlp)
            if block + 1 in departures:
                before[block + 1] = hidden
        return before, added

    def _run(self, running: Sequence[_Running], batch: Batch) -> None:
        """Run every cut through to the last block, several cuts per forward pass where that is faster."""
        for block in range(self.decoder.num_blocks):
            active = [r for r in running if r.at <= block and block not in r.removed]
            for part in range(0, len(active), self.together):
                group = active[part : part + self.together]
                positions = batch.position_ids.repeat(len(group), 1)
                stacked = torch.cat([r.hidden for r in group])
                if any(block in r.maps for r in group):
                    _, residual, mlp = self._block(stacked, block, positions, None)
                    parts = zip(residual.chunk(len(group)), mlp.chunk(len(group)), strict=True)
                    out = [
                        r + (apply_map(m, run.maps[block]) if block in run.maps else m)
                        for run, (r, m) in zip(group, parts, strict=True)
                    ]
                else:
                    self.spent += len(stacked)
                    out = self.decoder.run(stacked, [block], positions).chunk(len(group))
                for run, hidden in zip(group, out, strict=True):
                    run.hidden, run.at = hidden, block + 1

    def _block(
        self, hidden: Tensor, block: int, positions: Tensor, map: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A block's output with `map` applied to its MLP's output, the residual stream before the MLP, and the MLP's
        unmapped output."""
        self.spent += len(hidden)
        with self.decoder.mlp_addition(block) as seen:
            out = self.decoder.run(hidden, [block], positions)
        mlp = seen["mlp"]
        residual = out - mlp
        return (out if map is None else residual + apply_map(mlp, map)), residual, mlp

    def _target(self, batch: Batch) -> _Target:
        rows, columns = next_tokens(batch)
        weight = self.decoder.head_weight
        if self.measure == "perplexity":
            return _Target(batch, rows, columns, *self._of_text(batch.input_ids[rows, columns + 1]))
        hidden = self.decoder.hidden(**batch.model_inputs())[rows, columns]
        self.spent += len(batch.input_ids) * self.decoder.num_blocks
        expected, constant = [], []
        for part in hidden.split(CHUNK):
            logs = self.decoder.head(part).float().log_softmax(-1)
            probabilities = logs.exp()
            expected.append(linear(probabilities.to(weight.dtype), weight.t()))
            constant.append((probabilities * logs).sum(-1))
        return _Target(batch, rows, columns, torch.cat(expected).float(), torch.cat(constant))

    def _of_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.head_weight[tokens].float(), torch.zeros(len(tokens), device=tokens.device)


def behind(seen: dict[Cut, list[Tensor]], keep: int) -> list[Cut]:
    """Cuts that are significantly worse than the `keep`-th best in a paired comparison over rows."""
    if len(seen) <= keep:
        return []
    values = {cut: torch.cat(parts) for cut, parts in seen.items()}
    ranked = sorted(values, key=lambda cut: (_mean(seen[cut]), cut))
    limit = values[ranked[keep - 1]]
    rows = len(limit)
    if rows < ROWS:
        return []
    tokens = limit[:, 1].mean()
    worse = []
    for cut in ranked[keep:]:
        difference = (values[cut][:, 0] - limit[:, 0]) / tokens
        if float(difference.mean()) > SURE * float(difference.std()) / rows**0.5:
            worse.append(cut)
    return worse


def _mean(parts: Sequence[Tensor]) -> float:
    total = torch.cat(list(parts)).sum(0)
    return float(total[0] / total[1])

"""How good the model is without some of its blocks: many cuts at once, sharing what they have in common.

A cut is scored on packed rows by the mean, over tokens, of KL(unpruned ‖ cut) or of the negative log-likelihood of the
next token. Both are `logsumexp(W·h) − e·h + c` with h the cut model's last hidden state, W the head, and e and c per
token fixed by the unpruned model (the expected head row, minus its entropy) or by the text (the next token's head row,
0): they cost one matrix product, and no logits of the unpruned model are kept.

What is saved against a forward pass per cut: blocks before the first change are run once for all cuts (their hidden
states are kept for one batch at a time), and cuts that are clearly worse than those they compete with are given
up before the rows end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.stage import Advance
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.linear import linear
from .cost import CHUNK
from .cuts import Cut, gaps
from .moments import Moments, apply_map

Measure = Literal["kl", "perplexity"]
SURE = 3.5  # standard errors by which a cut must be behind to be given up early
ROWS = 6  # packed rows seen before any cut is given up
TOKENS_TOGETHER = 8192  # of several cuts in one forward pass of a block, on a GPU; a CPU gains nothing from more


@dataclass(frozen=True)
class Score:
    """A cut's figures on the scoring rows: nats per token, and whether all rows were seen."""

    mean: float
    complete: bool = True

    @property
    def perplexity(self) -> float:
        """Of a negative log-likelihood."""
        return math.exp(min(self.mean, 700.0))


@dataclass
class _Running:
    """One cut on its way through the blocks of one batch."""

    hidden: Tensor  # (B, T, H)
    at: int  # the next block it has not seen
    removed: frozenset[int]
    maps: dict[int, Tensor] = field(default_factory=dict)  # behind which blocks' MLPs which map is


@dataclass
class _Target:
    """What a batch is scored against."""

    batch: Batch
    rows: Tensor  # (N,) of the positions that predict something
    columns: Tensor
    expected: Tensor  # (N, H)
    constant: Tensor  # (N,)


def next_tokens(batch: Batch) -> tuple[Tensor, Tensor]:
    """Rows and columns of the positions whose next token is of the same packed row."""
    segments = batch.segment_ids
    same = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] >= 0)
    rows, columns = same.nonzero(as_tuple=True)
    return rows, columns


class Scorer:
    """Scores cuts of one model on one set of packed rows.

    With `moments`, gaps are scored as they would be healed: by the linear map that the unpruned model's statistics
    give. `passes` counts what was spent, in forward passes of the unpruned model over all rows.
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
        """What the batches are scored against, found once: for KL one forward pass."""
        if self._targets is None:
            self._targets = [self._target(batch.to(self.decoder.model.device)) for batch in self.batches]
        return self._targets

    @torch.no_grad()
    def score(
        self, cuts: Sequence[Cut], parent: Cut = (), keep: int | None = None, advance: Advance | None = None
    ) -> dict[Cut, Score]:
        """Scores of cuts that each contain `parent`, whose hidden states they share.

        With `keep`, cuts that will hardly be among the `keep` best are given up early; their scores are means
        over the rows they saw.
        """
        seen: dict[Cut, list[Tensor]] = {cut: [] for cut in cuts}  # (rows, 2) sums and tokens of each batch
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
        """Each cut's (rows, 2) sums over a batch's tokens: losses, and how many."""
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
        """Where each cut leaves what it shares with the parent: the hidden states there, and the next block."""
        plans = {cut: self._plan(cut, parent) for cut in cuts}
        first = {cut: plan[0] for cut, plan in plans.items()}
        wanted = {gap[0] for gap in first.values()}
        before, added = self._trunk(parent, wanted, batch)
        starts = {}
        for cut, (gap, maps) in plans.items():
            hidden = before[gap[0]]
            block = gap[0] - 1
            if block in maps and block in added:  # the parent's own map, if any, is in `before`; start without it
                residual, mlp = added[block]
                hidden = residual + apply_map(mlp, maps[block])
            starts[cut] = _Running(hidden, gap[1] + 1, frozenset(cut), {b: m for b, m in maps.items() if b > gap[1]})
        return starts

    def _plan(self, cut: Cut, parent: Cut) -> tuple[tuple[int, int], dict[int, Tensor]]:
        """The first gap that the parent does not have, and the maps behind all gaps."""
        if not set(parent) <= set(cut):
            raise ValueError(f"{cut} does not extend {parent}")
        old = gaps(parent)
        new = [gap for gap in gaps(cut) if gap not in old]
        return new[0] if new else (0, -1), self._maps(cut)  # nothing new: from the first block on

    def _maps(self, cut: Cut) -> dict[int, Tensor]:
        if self.moments is None:
            return {}
        return {first - 1: self.moments.map(first, last) for first, last in gaps(cut) if first > 0}

    def _trunk(
        self, parent: Cut, wanted: Iterable[int], batch: Batch
    ) -> tuple[dict[int, Tensor], dict[int, tuple[Tensor, Tensor]]]:
        """The parent's hidden states before some blocks, and what the block before each was made of: the residual
        stream and its MLP's own addition to it."""
        wanted = set(wanted)
        maps, removed = self._maps(parent), frozenset(parent)
        hidden = self.decoder.embed(batch.input_ids)
        before, added = {0: hidden}, {}
        for block in range(max(wanted)):
            if block not in removed:
                hidden, residual, mlp = self._block(hidden, block, batch.position_ids, maps.get(block))
                if block + 1 in wanted and self.moments is not None:
                    added[block] = (residual, mlp)
            if block + 1 in wanted:
                before[block + 1] = hidden
        return before, added

    def _run(self, running: Sequence[_Running], batch: Batch) -> None:
        """Take every cut to the last block; several share a forward pass where that is faster."""
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
        """A block's output with its MLP's addition mapped, the residual stream before that, and the addition."""
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
            chances = logs.exp()
            expected.append(linear(chances.to(weight.dtype), weight.t()))
            constant.append((chances * logs).sum(-1))
        return _Target(batch, rows, columns, torch.cat(expected).float(), torch.cat(constant))

    def _of_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.decoder.head_weight[tokens].float(), torch.zeros(len(tokens), device=tokens.device)


def behind(seen: dict[Cut, list[Tensor]], keep: int) -> list[Cut]:
    """Cuts that are worse than the `keep`-th best by more than chance would make them, row against row."""
    if len(seen) <= keep:
        return []
    values = {cut: torch.cat(parts) for cut, parts in seen.items()}
    ranked = sorted(values, key=lambda cut: (_mean(seen[cut]), cut))
    limit = values[ranked[keep - 1]]
    rows = len(limit)
    if rows < ROWS:
        return []
    tokens = limit[:, 1].mean()
    found = []
    for cut in ranked[keep:]:
        difference = (values[cut][:, 0] - limit[:, 0]) / tokens
        if float(difference.mean()) > SURE * float(difference.std()) / rows**0.5:
            found.append(cut)
    return found


def _mean(parts: Sequence[Tensor]) -> float:
    total = torch.cat(list(parts)).sum(0)
    return float(total[0] / total[1])

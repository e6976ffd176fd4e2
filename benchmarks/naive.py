"""Greedy search as one would write it first: each candidate's pruned model is run whole, on all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from compress.data.packing import Batch
from compress.modeling.blocks import Decoder, without_blocks
from compress.modeling.cuts import Cut, cut, gaps
from compress.prune.cost import CHUNK
from compress.prune.moments import Moments, apply_map
from compress.prune.scoring import Measure, next_tokens
from torch import Tensor
from torch.nn import functional


class Naive:
    """Mean KL(unpruned ‖ cut) or negative log-likelihood in nats per token, from whole logits."""

    def __init__(self, decoder: Decoder, batches: Sequence[Batch], measure: Measure, moments: Moments | None):
        self.decoder, self.batches, self.measure, self.moments = decoder, list(batches), measure, moments
        self._unpruned: list[Tensor] = []  # log-probabilities of each batch, (N, V)

    @torch.no_grad()
    def search(self, count: int, candidates: Sequence[int]) -> tuple[Cut, float]:
        """The cut after `count` rounds, and its score."""
        if self.measure == "kl":
            self._unpruned = [torch.cat(list(self._log_probabilities(batch))) for batch in self.batches]
        best: Cut = ()
        scores: dict[Cut, float] = {}
        for _ in range(count):
            children = [cut([*best, block]) for block in candidates if block not in best]
            scores = {child: self.score(child) for child in children}
            best = min(scores, key=lambda child: (scores[child], child))
        return best, scores[best]

    @torch.no_grad()
    def score(self, dropped: Cut) -> float:
        """One pass of the model without these blocks over all rows."""
        total, tokens = 0.0, 0
        with self._healed(dropped), without_blocks(self.decoder.model, dropped):
            for number, batch in enumerate(self.batches):
                rows, columns = next_tokens(batch)
                targets = batch.input_ids[rows, columns + 1]
                for part, logs in enumerate(self._log_probabilities(batch)):
                    chunk = slice(part * CHUNK, part * CHUNK + len(logs))
                    if self.measure == "kl":
                        unpruned = self._unpruned[number][chunk]
                        total += float(functional.kl_div(logs, unpruned, reduction="sum", log_target=True))
                    else:
                        total += float(functional.nll_loss(logs, targets[chunk], reduction="sum"))
                tokens += len(rows)
        return total / tokens

    def _log_probabilities(self, batch: Batch) -> Iterator[Tensor]:
        """Of the tokens that predict another, CHUNK at a time: (CHUNK, V)."""
        hidden = self.decoder.hidden(**batch.model_inputs())[next_tokens(batch)]
        for part in hidden.split(CHUNK):
            yield self.decoder.head(part).float().log_softmax(-1)

    @contextmanager
    def _healed(self, dropped: Cut) -> Iterator[None]:
        """With moments, what the MLP before each gap adds goes through the gap's map, by a hook on its last module."""
        handles = []
        if self.moments is not None:
            handles = [self._map_after(a - 1, self.moments.map(a, b)) for a, b in gaps(dropped) if a > 0]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _map_after(self, block: int, map: Tensor) -> torch.utils.hooks.RemovableHandle:
        decoder = self.decoder
        module: Any = decoder.down_proj(block)
        if not decoder.can_fuse_after_mlp:  # the family normalises what the MLP adds
            module = decoder.blocks[block].post_feedforward_layernorm
        return module.register_forward_hook(lambda _module, _inputs, output: apply_map(output, map))

"""Labels for retaining heads (Locret, arXiv 2410.01805): how much an answer attends to each key of its prompt.

The label of prompt position k and KV head j is the largest logit, before the softmax, that any answer position and any
query head of j's group has for k. They are computed in chunks, without a matrix of all queries by all keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Heads, watched_attention
from .blocks import Decoder
from .cost import LABEL_KEYS as KEYS
from .cost import LABEL_QUERIES as QUERIES


@dataclass(frozen=True)
class BlockLabels:
    """One block's part of a row: its head's inputs and labels for the N prompt positions."""

    block: int
    inputs: Tensor  # (N, I): q, k and v, concatenated, in the model's precision
    labels: Tensor  # (N, G) float32
    first: int  # first position that the answer sees; more than 0 only where attention slides a window


def attention_labels(queries: Tensor, keys: Tensor, scaling: float, window: int | None = None) -> tuple[Tensor, int]:
    """Labels (N, G), float32, of N keys (G, N, d), from the queries (heads, M, d) of the M positions after them; and
    the first position visible to any of them.

    With a window, a query sees only the `window` newest positions, its own among them. A label counts only queries that
    see the key. Keys that no query sees get their head's lowest label: the answer does not need them.
    """
    groups, count, size = keys.shape
    answers = queries.shape[1]
    grouped = queries.float().reshape(groups, -1, answers, size)
    labels = torch.full((count, groups), -torch.inf, device=keys.device)
    for start in range(0, count, KEYS):
        part = keys[:, None, start : start + KEYS].float().transpose(-1, -2)  # (G, 1, d, K)
        positions = torch.arange(start, start + part.shape[-1], device=keys.device)
        for begin in range(0, answers, QUERIES):
            logits = (grouped[:, :, begin : begin + QUERIES] @ part) * scaling  # (G, group, M, K)
            if window is not None:
                own = torch.arange(count + begin, count + begin + logits.shape[2], device=keys.device)
                logits = logits.masked_fill(own[:, None] - positions >= window, -torch.inf)
            best = logits.amax((1, 2)).T
            labels[start : start + KEYS] = torch.maximum(labels[start : start + KEYS], best)
    first = 0 if window is None else min(count, max(0, count - window + 1))
    if first:
        lowest = labels[first:].amin(0) if first < count else labels.new_zeros(groups)
        labels[:first] = lowest
    return labels, first


def detrended(labels: Tensor) -> Tensor:
    """Labels (N, G) with the effect of distance removed: per head, the least-squares cubic in the logarithm of the
    distance to the answer is subtracted.

    Rotary positions give nearer keys larger logits, whatever their content. A head does not see a token's position, so
    for it that is noise; and when keys compete for the cache, the answer may be far from all of them.
    """
    count = len(labels)
    distance = torch.arange(count, 0, -1, dtype=torch.float64, device=labels.device)
    steps = (distance + 1).log() / math.log(count + 1)
    basis = torch.stack([steps**power for power in range(4)], 1)
    ridge = 1e-9 * count * torch.eye(4, dtype=torch.float64, device=labels.device)  # for rows of fewer than four tokens
    fitted = basis @ torch.linalg.solve(basis.T @ basis + ridge, basis.T @ labels.double())
    return (labels - fitted).to(labels.dtype)


@torch.no_grad()
def label_row(decoder: Decoder, ids: Sequence[int], prompt: int, visit: Callable[[BlockLabels], None]) -> None:
    """Run a model over a row, whose first `prompt` tokens are the prompt and the rest the answer, and hand each
    block's inputs and labels to `visit`, in the blocks' order, during the forward pass.

    One pass over the whole row: a block's inputs are held only until `visit` returns, so memory is that of a
    forward pass without logits and without a KV cache. `visit` runs without gradients unless it enables them.
    """
    if not 0 < prompt < len(ids):
        raise ValueError(f"a row of {len(ids)} tokens with {prompt} of them prompt has no answer, or no prompt")
    device = decoder.embedding.weight.device

    with decoder.projections() as projected:

        def watch(seen: Heads) -> None:
            inputs = projected.pop(seen.block)[0, :prompt]
            labels, first = attention_labels(seen.queries[:, prompt:], seen.keys[:, :prompt], seen.scaling, seen.window)
            visit(BlockLabels(seen.block, inputs, labels, first))

        with watched_attention(decoder, watch):
            decoder.hidden(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)

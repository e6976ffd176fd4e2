"""What a bounded KV cache keeps: policies to be set side by side at equal budget.

All are asked in the same cache, after each chunk, so none sees the question before it has to choose: SnapKV here is
SnapKV as a cache of fixed size can run it, with each chunk's end as its observation window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ..modeling.blocks import Decoder
from ..modeling.retaining import RetainingHeads, RetainingSettings
from .kv_cache import KVCache, Policy, View, visible

Name = Literal["full", "retaining", "recent", "snapkv", "random", "oracle"]
SINKS = 4  # first tokens that `recent` keeps
WINDOW, KERNEL = 64, 5  # SnapKV's observation window and pooling, in tokens


def pooled(scores: Tensor, kernel: int) -> Tensor:
    """Means of scores (G, T) of tokens in a row over the `kernel` around each (an odd number), or those there are."""
    return nn.functional.avg_pool1d(scores, kernel, 1, kernel // 2, count_include_pad=False)


def _appended(view: View, new: Tensor) -> Tensor:
    return torch.cat([view.scores, new.to(view.scores)], 1)


class Full:
    """All the same: of a cache without a budget, which evicts nothing."""

    needs_projections = False

    def score(self, view: View) -> Tensor:
        return _appended(view, torch.zeros_like(view.new))


class Retaining:
    """Trained heads (Locret, arXiv 2410.01805): means over `pool` neighbouring tokens of those read together; the first
    `sinks` tokens stay. A score, once given, stays."""

    needs_projections = True

    def __init__(self, heads: RetainingHeads, pool: int = 1, sinks: int = 0):
        self.heads, self.pool, self.sinks = heads, pool, sinks

    def score(self, view: View) -> Tensor:
        assert view.projections is not None
        scores = pooled(self.heads.score(view.heads.block, view.projections).T, self.pool)
        return _appended(view, torch.where(view.new < self.sinks, torch.inf, scores))


class Recent:
    """The first tokens and the newest (StreamingLLM, arXiv 2309.17453)."""

    needs_projections = False

    def score(self, view: View) -> Tensor:
        return _appended(view, torch.where(view.new < SINKS, torch.inf, view.new.float()))


class Random:
    """A number per block, KV head and token, the same for a seed however the text is cut into chunks."""

    needs_projections = False

    def __init__(self, seed: int):
        self.seed = seed

    def score(self, view: View) -> Tensor:
        new = view.new.cpu().numpy()
        head = np.arange(len(new))[:, None]
        key = ((self.seed * 4099 + view.heads.block) * 257 + head) * 2**24 + new
        return _appended(view, torch.from_numpy(_uniform(key)))


def _uniform(keys: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) from whole numbers: SplitMix64's mixing."""
    z = keys.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


class SnapKV:
    """How much the last `window` queries of a chunk attend to each entry, pooled over neighbours (arXiv 2404.14469).

    All entries are scored anew after each chunk; the window's own stay. As in the paper nothing is observed while
    decoding: what is written then is kept, the prompt's entries go by their last scores. With one chunk and no local
    tail this is SnapKV as published.
    """

    needs_projections = False

    def __init__(self, window: int = WINDOW, kernel: int = KERNEL):
        self.window, self.kernel = window, kernel

    def score(self, view: View) -> Tensor:
        if view.decoding:
            return _appended(view, torch.full(view.new.shape, torch.inf, device=view.new.device))
        queries = view.heads.queries[:, -self.window :]
        observed, count = queries.shape[1], view.keys.shape[1]
        grouped = queries.reshape(len(view.keys), -1, observed, queries.shape[-1])
        logits = (grouped @ view.keys[:, None].transpose(-1, -2)).float() * view.heads.scaling  # (G, group, W, n)
        seen = visible(view.new[0, -observed:], view.positions, view.heads.window)
        attention = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        scores = torch.full((len(view.keys), count), torch.inf, device=logits.device)
        if count > observed:
            # Where the kernel reaches over an end, the missing neighbours count as zero.
            mean = attention[..., : count - observed].mean(2)
            near = nn.functional.avg_pool1d(mean, self.kernel, 1, self.kernel // 2)
            scores[:, : count - observed] = near.mean(1)
        return scores


class Oracle:
    """The labels that retaining heads are trained to predict; what has none (the tail) stays."""

    needs_projections = False

    def __init__(self, labels: Sequence[Tensor]):
        self.labels = labels  # per block (G, N)

    def score(self, view: View) -> Tensor:
        labels = self.labels[view.heads.block]
        found = labels.gather(1, view.new.clamp_max(labels.shape[1] - 1))
        return _appended(view, torch.where(view.new < labels.shape[1], found, torch.inf))


class Observer:
    """In a full cache: each key's largest logit, before the softmax, over the queries that are read meanwhile."""

    needs_projections = False

    def __init__(self, blocks: int, prompt: int):
        self.prompt = prompt  # its keys are observed
        self.labels: list[Tensor | None] = [None] * blocks

    def score(self, view: View) -> Tensor:
        keys, places = view.keys[:, : self.prompt], view.positions[:, : self.prompt]
        queries = view.heads.queries.reshape(len(keys), -1, *view.heads.queries.shape[1:])
        logits = (queries @ keys[:, None].transpose(-1, -2)).float() * view.heads.scaling  # (G, group, T, N)
        seen = visible(view.new[0], places, view.heads.window)
        largest = logits.masked_fill(~seen[:, None], -torch.inf).amax((1, 2))
        before = self.labels[view.heads.block]
        self.labels[view.heads.block] = largest if before is None else torch.maximum(before, largest)
        return _appended(view, torch.zeros_like(view.new))


def answer_labels(cache: KVCache, answer: Sequence[int]) -> list[Tensor]:
    """Labels (G, N) per block of the N prompt tokens that a full cache has read, from the true answer, which is read
    after them. Keys that no token of the answer sees (sliding windows) get -inf."""
    if cache.held != cache.seen or not answer:
        raise ValueError("labels need a cache that has evicted nothing, and an answer")
    observer = Observer(len(cache.layers), cache.seen)
    cache.policy = observer
    cache.read_on(answer)
    return [labels for labels in observer.labels if labels is not None]


def make_policy(
    name: Name, decoder: Decoder, heads: RetainingHeads | None, seed: int, meant: RetainingSettings | None = None
) -> Policy:
    """A policy by its name, but for `oracle`, which needs an answer's labels; heads are used as they were meant.
    `ValueError` for `retaining` without heads."""
    if name == "retaining":
        if heads is None:
            raise ValueError("the policy `retaining` needs heads")
        meant = meant or RetainingSettings()
        return Retaining(heads.to(decoder.embedding.weight.device), meant.pool, meant.sinks)
    simple: dict[str, Any] = {"full": Full, "recent": Recent, "snapkv": SnapKV}
    if name == "random":
        return Random(seed)
    if name not in simple:
        raise ValueError(f"{name} is made with labels")
    return simple[name]()

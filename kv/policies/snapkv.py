"""Keeps what a chunk's last tokens attend to (SnapKV, arXiv 2404.14469)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from ..policy import Floats, Policy, View


class SnapKV(Policy):
    """The attention of a chunk's last `window` tokens to each entry, averaged over `kernel` neighbours.

    All entries are rescored after each chunk; the window's own entries stay. As in the paper, decoding is not observed:
    generated tokens are kept, and the prompt's entries are evicted by their last scores. With one chunk and no local
    tail this is SnapKV as published.
    """

    kind: Literal["snapkv"] = "snapkv"
    needs: ClassVar = frozenset({"attention"})
    window: int = 64
    kernel: int = 5

    def score(self, view: View) -> Floats:
        count = len(view.places)
        if view.decoding:
            return np.full((view.heads, count), np.inf, np.float32)
        assert view.attention is not None
        attention, observed = view.attention(self.window), min(self.window, count)
        scores = np.full((view.heads, attention.shape[-1]), np.inf, np.float32)
        older = attention.shape[-1] - observed
        if older:
            reach = self.kernel // 2
            # Beyond the ends, missing neighbours count as zero.
            padded = np.pad(attention[..., :older].mean(1), ((0, 0), (reach, reach)))
            scores[:, :older] = sum(padded[:, i : i + older] for i in range(self.kernel)) / self.kernel
        return scores

"""Speculative decoding: a cheap model drafts a few tokens, the full depth verifies them in one pass.

A draft is accepted as long as it matches what the full depth itself would have written: each token is sampled from the
full depth's logits exactly as without a draft, and compared. So the text is that of the full depth alone, greedy or
sampled with a seed. Passes of different lengths round the same way in these graphs (`onnx_cut`), so the equality is
exact to the bit where ONNX Runtime's matrix kernels treat each row separately, as they do on x86-64 with AVX-512.
A depth of the same model drafts with blocks that the full depth needs anyway: they are not run again to verify.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .block_chain import CachedText
from .generator import Request, RequestWork


@dataclass
class DraftModel:
    """Another model of the same vocabulary, with its own text."""

    text: CachedText
    depth: int

    def propose(self, tokens: list[int], count: int) -> list[int]:
        """The most likely continuation of `tokens`."""
        count = min(count, self.text.chain.context - len(tokens))
        if count < 1:
            return []
        self.text.add(tokens[self.text.keep(tokens) :])
        proposed: list[int] = []
        for _ in range(count):
            proposed.append(int(np.argmax(self.text.logits(self.depth)[0])))
            if len(proposed) < count:
                self.text.add(proposed[-1:])
        return proposed


def write_verified(
    text: CachedText,
    request: Request,
    limit: int,
    draw: Callable[[np.ndarray], int],
    draft: DraftModel | None,
    work: RequestWork,
) -> Iterator[int]:
    """Up to `limit` tokens after `text`; drafts come from `draft`, or from the text's own `request.draft_depth`."""
    token = draw(text.logits(request.depth)[0])
    written = 1
    work.depths[request.depth] += 1
    yield token
    while written < limit:
        text.add([token])
        length = len(text.tokens)
        # The full depth yields one token more than it accepts.
        count = min(request.draft_tokens, limit - written - 1, text.chain.context - length)
        drafted = _draft(text, request.draft_depth, draft, count)
        rows = text.logits(request.depth, len(drafted) + 1)
        work.drafted += len(drafted)
        for i, row in enumerate(rows):
            token = draw(row)
            hit = i < len(drafted) and token == drafted[i]
            work.accepted += hit
            if not hit:
                text.cut(length + i)  # before the token is yielded: the reader may never resume
            written += 1
            work.depths[request.depth] += 1
            yield token
            if not hit:
                break


def _draft(text: CachedText, depth: int | None, draft: DraftModel | None, count: int) -> list[int]:
    """Likely next tokens, which are appended to `text`."""
    if draft is not None:
        proposed = draft.propose(text.tokens, count)
        text.add(proposed)
        return proposed
    assert depth is not None
    proposed = []
    for _ in range(count):
        proposed.append(int(np.argmax(text.logits(depth)[0])))
        text.add(proposed[-1:])
    return proposed

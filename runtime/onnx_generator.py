"""Generating text with ONNX Runtime: at any depth, with early exit, or with a shallow draft."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..core.errors import UserError
from ..core.place import ANYWHERE, Place
from ..kv.policies import make
from ..kv.policy import check_needs
from ..kv.settings import KvBudget
from .block_chain import BlockChain, CachedText
from .bounded_text import BoundedText
from .early_exit import choose_at_first_confident
from .engine import pick
from .generator import Generator, Request, RequestWork, Tokens
from .speculative import DraftModel, write_verified


class OnnxGenerator(Generator):
    """`folder`'s ONNX model at the ascending `depths`, whose last is the greatest that is loaded.

    All depths share the weights and the tokens read so far. `draft`, another generator of the same vocabulary, drafts
    for requests without a draft depth. `place` is the hardware. One request at a time: the next one's first token waits
    until this one is read to the end, or its iterator is closed.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        depths: Sequence[int],
        threads: int = 0,
        draft: OnnxGenerator | None = None,
        place: Place = ANYWHERE,
    ):
        self._chain = BlockChain(folder, depths, threads, place=place)
        self.depths, self.context, self.device = self._chain.depths, self._chain.context, self._chain.device
        self._text = CachedText(self._chain)
        self._lock = threading.Lock()
        self._draft = draft
        if draft is not None and draft._chain.vocabulary != self._chain.vocabulary:
            raise UserError(
                f"the draft model has {draft._chain.vocabulary} tokens and the model {self._chain.vocabulary}: "
                "a draft needs the same vocabulary"
            )

    def generate(self, request: Request, work: RequestWork) -> Tokens:
        self.check(request)
        with self._lock:
            text, room = self._text, self.context - len(request.ids) + 1
            work.reused = text.keep(request.ids)
            text.add(request.ids[work.reused :])
            for token in self._write(text, request, min(request.max_tokens, room), work):
                if token in request.stop:
                    work.finish = "stop"
                    return
                yield token

    def _write(self, text: CachedText, request: Request, limit: int, work: RequestWork) -> Iterator[int]:
        random = np.random.default_rng(request.seed)

        def draw(logits: np.ndarray) -> int:
            return pick(logits, request.temperature, request.top_p, random)

        if request.draft_depth is not None:
            return write_verified(text, request, limit, draw, None, work)
        if self._draft is not None and not request.exits:
            return write_verified(text, request, limit, draw, self._draft.as_draft(), work)
        return _write_singly(text, request, limit, draw, work)

    def as_draft(self) -> DraftModel:
        """This generator's deepest model, to propose tokens for another."""
        return DraftModel(self._text, self.depths[-1])

    def close(self) -> None:
        self._chain.close()
        if self._draft is not None:
            self._draft.close()


def _write_singly(
    text: CachedText, request: Request, limit: int, draw: Callable[[np.ndarray], int], work: RequestWork
) -> Iterator[int]:
    for made in range(limit):
        depth, logits = choose_at_first_confident(text, request.exits, request.depth)
        token = draw(logits)
        work.depths[depth] += 1
        yield token
        if made + 1 < limit:
            text.add([token])


class BoundedGenerator(Generator):
    """As `OnnxGenerator`, with a cache of fixed size: memory does not depend on the length of the text.

    A request that extends the previous text continues from it; any other request, or depth, is read from the start. No
    drafts, no early exits.
    """

    runtime = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        depths: Sequence[int],
        settings: KvBudget,
        threads: int = 0,
        place: Place = ANYWHERE,
    ):
        policy = make(settings)
        check_needs(policy, {"heads"}, "ONNX Runtime")
        self._chain = BlockChain(folder, depths, threads, "heads" in policy.needs, place)
        self.device = self._chain.device
        self._text = BoundedText(self._chain, settings)
        self._lock = threading.Lock()
        self.depths = self._chain.depths
        self.context = self._chain.context if settings.positions == "true" else 2**31

    def check(self, request: Request) -> None:
        super().check(request)
        if request.draft_depth is not None or request.exits:
            raise UserError(
                "a KV budget cannot be combined with drafts or early exit: evicted cache entries cannot be restored"
            )

    def generate(self, request: Request, work: RequestWork) -> Tokens:
        self.check(request)
        random = np.random.default_rng(request.seed)
        with self._lock:
            text = self._text
            work.reused = text.begin(request.ids, request.depth)
            logits = text.read_prompt(request.ids[work.reused :])
            limit = min(request.max_tokens, text.left() + 1)
            for made in range(limit):
                token = pick(logits, request.temperature, request.top_p, random)
                work.depths[request.depth] += 1
                if token in request.stop:
                    work.finish = "stop"
                    return
                yield token
                if made + 1 < limit:
                    logits = text.read_token(token)

    def close(self) -> None:
        self._chain.close()

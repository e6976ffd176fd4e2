"""A text of any length whose cache has a fixed size: what it held is evicted as it is read on (`kv_budget`).

Read at one depth, by a chain's parts: a chunk goes through all of them, then every block evicts for itself, each KV
head its own entries. What comes before the newest tokens cannot be had again, so another text is begun anew, and there
are no drafts and no early exits, which take tokens back or read them late.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from ..core.errors import UserError
from .block_chain import BlockChain, bind_array
from .kv_budget import (
    KvBudget,
    best,
    check_windows,
    pooled,
    random_scores,
    recent_scores,
    rotary_frequencies,
    turn,
    worst,
)
from .onnx_engine import PREFILL_CHUNK


class BoundedText:
    """Tokens that a chain has read at one depth, and the entries that are held of them.

    Every block and KV head holds the first `held` places of its buffers. Raises `UserError` for models whose attention
    slides a window, and with contiguous positions for some rope scalings.
    """

    def __init__(self, chain: BlockChain, settings: KvBudget):
        config = json.loads((chain.folder / "config.json").read_text(encoding="utf-8"))
        check_windows(config)
        self.chain, self.settings = chain, settings
        self.frequencies = None
        if settings.positions == "contiguous":
            self.frequencies = rotary_frequencies(config, chain.kv_shape[1])
        self.depth = 0
        self.tokens: list[int] = []
        self.held = 0
        self.room = 0
        self.keys: list[np.ndarray] = []  # per block, (1, G, room, D) float32
        self.values: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []  # per block, (G, room) float32
        self._bindings = [session.io_binding() for session in chain.sessions]

    def begin(self, ids: Sequence[int], depth: int) -> int:
        """Make ready for a text at a depth: gone on with if it extends the one before, else begun anew. How many of
        its tokens have been read."""
        read = len(self.tokens)
        if depth == self.depth and read < len(ids) and list(ids[:read]) == self.tokens:
            return read
        if depth != self.depth:
            self.depth, self.room = depth, 0
            self._grow(self.settings.reach + 1)  # one for the row that onnx_cut adds
        self.tokens, self.held = [], 0
        return 0

    def left(self) -> int:
        """How many tokens more there are positions for."""
        if self.settings.positions == "contiguous":
            return 2**31 if self.settings.evict_decoding else self.chain.context - self.held
        return self.chain.context - len(self.tokens)

    def read_prompt(self, ids: Sequence[int]) -> np.ndarray:
        """Read a prompt, or what comes after the text so far; logits (V,) after it. `UserError` past the context."""
        self._check(len(ids))
        settings = self.settings
        body = max(0, len(ids) - settings.local)
        if self.held + len(ids) - body > settings.budget + settings.local:
            # Answers were written since the last eviction: short turns alone must not let the cache grow.
            self._evict(settings.stabilizers if body else 0)
        states = None
        for start in range(0, body, settings.chunk):
            end = min(start + settings.chunk, body)
            states = self._read(ids[start:end])
            self._evict(settings.stabilizers if end < body else 0)
        if body < len(ids):
            states = self._read(ids[body:])
        if states is None:
            raise ValueError("there is nothing to read")
        return self._logits(states)

    def read_token(self, token: int) -> np.ndarray:
        """Read one token that was written; logits (V,) after it."""
        if self.settings.evict_decoding and self.held >= self.settings.budget + self.settings.local:
            self._drop_one()
        return self._logits(self._read([token]))

    def _check(self, new: int) -> None:
        length, context, settings = len(self.tokens) + new, self.chain.context, self.settings
        if settings.positions == "true" and length > context:
            raise UserError(
                f"a text of {length} tokens is longer than the model's context of {context}: shorten it, or give "
                "--kv-positions contiguous"
            )
        if settings.positions == "contiguous" and min(length, max(settings.reach, self.held)) > context:
            raise UserError(
                f"a KV budget of {settings.budget} holds up to {settings.reach} entries at a time, more than the "
                f"model's context of {context}: lower --kv-budget or --kv-chunk"
            )

    def _logits(self, states: np.ndarray) -> np.ndarray:
        return self.chain.run_head(self._bindings[-1], states[:, -1:])[0]

    def _read(self, ids: Sequence[int]) -> np.ndarray:
        """Hidden states (1, T, H) of the last tokens of `ids`, after all of them went through the depth's parts."""
        states = None
        if self.held + len(ids) + 1 > self.room:
            self._grow(self.held + len(ids) + 1 + self.settings.chunk)
        for start in range(0, len(ids), PREFILL_CHUNK):
            states = self._pass(ids[start : start + PREFILL_CHUNK])
        assert states is not None
        if self.settings.policy == "retaining":
            self._finish_scores(len(ids))
        return states

    def _finish_scores(self, count: int) -> None:
        """Pool what the heads say of the newest tokens, which were read together; the text's first ones stay."""
        sinks = max(0, self.settings.sinks - (len(self.tokens) - count))  # among these
        if sinks or (count > 1 and self.settings.pool > 1):
            for scores in self.scores:
                new = scores[:, self.held - count : self.held]
                new[:] = pooled(new, self.settings.pool)
                new[:, :sinks] = np.inf

    def _pass(self, ids: Sequence[int]) -> np.ndarray:
        chain, count, held = self.chain, len(ids), self.held
        first = held if self.frequencies is not None else len(self.tokens)
        # All arrays bound here must live until the run is over.
        mask = np.ones((1, held + count + 1), np.int64)
        positions = np.arange(first, first + count + 1, dtype=np.int64)[None]
        tokens = np.asarray([ids], np.int64)
        zeros = np.zeros((1, count, chain.hidden), np.float32)
        states = zeros
        retaining = self.settings.policy == "retaining"
        for number, part in enumerate(chain.parts[: chain.depths.index(self.depth) + 1]):
            binding = self._bindings[number]
            residual, addition = np.empty_like(zeros), np.empty_like(zeros)
            scores = [np.empty((1, count, chain.kv_shape[0]), np.float32) for _ in range(part.first, part.last)]
            bind_array(binding.bind_input, "attention_mask", mask)
            bind_array(binding.bind_input, "position_ids", positions)
            if part.start is None:
                bind_array(binding.bind_input, "input_ids", tokens)
            else:
                bind_array(binding.bind_input, part.start.residual, states)
                bind_array(binding.bind_input, part.start.addition, zeros)
            assert part.end is not None
            bind_array(binding.bind_output, part.end.residual, residual)
            bind_array(binding.bind_output, part.end.addition, addition)
            if retaining:
                for block, array in zip(range(part.first, part.last), scores, strict=True):
                    bind_array(binding.bind_output, f"retaining_scores.{block}", array)
            chain.sessions[number].run_with_iobinding(binding)
            states = residual + addition
            for block, array in zip(range(part.first, part.last), scores, strict=True):
                self.scores[block][:, held : held + count] = array[0].T if retaining else self._made_up(block, count)
        self.tokens += [int(i) for i in ids]
        self.held += count
        return states

    def _made_up(self, block: int, count: int) -> np.ndarray:
        """Scores (G, T) of the next tokens by a policy that needs no heads."""
        places = np.arange(len(self.tokens), len(self.tokens) + count)
        heads = self.chain.kv_shape[0]
        return recent_scores(heads, places) if self.settings.policy == "recent" else random_scores(block, heads, places)

    def _evict(self, protected: int) -> None:
        """Keep the budget's best entries of every block and head."""
        budget = self.settings.budget
        if self.held <= budget:
            return
        for block in range(self.depth):
            kept = best(self.scores[block][:, : self.held], budget, protected)
            for head, index in enumerate(kept):
                for buffer in (self.keys[block][0], self.values[block][0], self.scores[block]):
                    buffer[head, :budget] = buffer[head, index]
            if self.frequencies is not None:
                turn(self.keys[block][0, :, :budget], np.arange(budget) - kept, self.frequencies)
        self.held = budget

    def _drop_one(self) -> None:
        """Let the worst entry of every block and head go, the `local` newest left out."""
        end = self.held
        for block in range(self.depth):
            for head, gone in enumerate(worst(self.scores[block][:, : end - self.settings.local])):
                for buffer in (self.keys[block][0], self.values[block][0], self.scores[block]):
                    buffer[head, gone : end - 1] = buffer[head, gone + 1 : end]  # numpy minds the overlap
                if self.frequencies is not None:
                    moved = self.keys[block][0, head : head + 1, gone : end - 1]
                    turn(moved, np.array([[-1]]), self.frequencies)
        self.held -= 1

    def _grow(self, room: int) -> None:
        """Make room for so many entries, and bind the buffers anew."""
        heads, size = self.chain.kv_shape
        shapes = {"keys": (1, heads, room, size), "values": (1, heads, room, size), "scores": (heads, room)}
        for name, shape in shapes.items():
            buffers = [np.zeros(shape, np.float32) for _ in range(self.depth)]
            for old, new in zip(getattr(self, name) if self.room else (), buffers, strict=False):
                if name == "scores":
                    new[:, : self.held] = old[:, : self.held]
                else:
                    new[:, :, : self.held] = old[:, :, : self.held]
            setattr(self, name, buffers)
        self.room = room
        for part, binding in zip(self.chain.parts, self._bindings, strict=False):
            for block in range(part.first, min(part.last, self.depth)):
                for name, cache in (("key", self.keys[block]), ("value", self.values[block])):
                    # One buffer for past and present: the kernel writes new entries into it and copies nothing.
                    bind_array(binding.bind_input, f"past_key_values.{block}.{name}", cache)
                    bind_array(binding.bind_output, f"present.{block}.{name}", cache)

"""A text of any length in a cache of fixed size, in ONNX Runtime; entries are evicted as the text is read (`kv`).

It is read at one depth by a chain's parts: a chunk goes through all of them, then every block evicts, each KV head its
own entries. Evicted entries cannot be restored, so a different text starts from an empty cache, and drafts and early
exits, which take tokens back or read them late, are not supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.files import read_json
from ..kv.eviction import best, entry_scores, worst
from ..kv.policies import make
from ..kv.policy import View
from ..kv.settings import KvBudget
from ..kv.steps import most_held, read_in_steps, steps
from ..modeling.shape import sliding_blocks
from .block_chain import BlockChain, bind_array
from .onnx_engine import PREFILL_CHUNK
from .rotary import rotary_frequencies, turn

ENDLESS = 2**31  # tokens; stands for a text of unlimited length


class BoundedText:
    """Tokens that a chain has read at one depth, and the entries held of them.

    Every block and KV head uses the first `held` places of its buffers. Raises `UserError` for models with sliding
    windows, and with contiguous positions for some rope scalings.
    """

    def __init__(self, chain: BlockChain, settings: KvBudget):
        if settings.budget is None:
            raise ValueError("a bounded text needs a budget")
        self.budget = settings.budget
        config = read_json(chain.folder / "config.json")
        check_windows(config)
        self.chain, self.settings, self.policy = chain, settings, make(settings)
        self.most = most_held(settings, ENDLESS)  # entries held at most while a prompt is read
        self.frequencies = None
        if settings.positions == "contiguous":
            check_renumbering(chain)
            self.frequencies = rotary_frequencies(config)
        self.depth = 0
        self.tokens: list[int] = []
        self.held = 0
        self.room = 0
        self.keys: list[np.ndarray] = []  # per block, (1, G, room, D) in the chain's type
        self.values: list[np.ndarray] = []
        self.scores: list[np.ndarray] = []  # per block, (G, room) float32
        self._bindings = [session.io_binding() for session in chain.sessions]

    def begin(self, ids: Sequence[int], depth: int) -> int:
        """Prepare for a text at a depth: continue if it extends the previous one, else start over. Returns how many of
        its tokens have been read."""
        read = len(self.tokens)
        if depth == self.depth and read < len(ids) and list(ids[:read]) == self.tokens:
            return read
        if depth != self.depth:
            self.depth, self.room = depth, 0
            self._grow(self.most + 1)  # one for the row that onnx_cut adds
        self.tokens, self.held = [], 0
        return 0

    def left(self) -> int:
        """How many more tokens there are positions for."""
        if self.settings.positions == "contiguous":
            return ENDLESS if self.settings.evict_decoding else self.chain.context - self.held
        return self.chain.context - len(self.tokens)

    def read_prompt(self, ids: Sequence[int]) -> np.ndarray:
        """Read a prompt, or what comes after the text so far; logits (V,) after it. `UserError` past the context."""
        self._check(len(ids))
        plan = steps(len(ids), self.settings, self.held)
        return self._logits(read_in_steps(ids, plan, self._read, self._evict))

    def read_token(self, token: int) -> np.ndarray:
        """Read one generated token; logits (V,) after it."""
        settings = self.settings
        if settings.evict_decoding and self.held >= self.budget + settings.local:
            self._drop_one()
        return self._logits(self._read([token], decoding=True))

    def _check(self, new: int) -> None:
        length, context, settings = len(self.tokens) + new, self.chain.context, self.settings
        if settings.positions == "true" and length > context:
            raise UserError(
                f"a text of {length} tokens is longer than the model's context of {context}: shorten it, or give "
                "--kv-positions contiguous"
            )
        if settings.positions == "contiguous" and min(length, max(self.most, self.held)) > context:
            raise UserError(
                f"a KV budget of {settings.budget} holds up to {self.most} entries at a time, more than the "
                f"model's context of {context}: lower --kv-budget or --kv-chunk"
            )

    def _logits(self, states: np.ndarray) -> np.ndarray:
        return self.chain.run_head(self._bindings[-1], states[:, -1:])[0]

    def _read(self, ids: Sequence[int], decoding: bool = False) -> np.ndarray:
        """Run `ids` through the depth's parts; hidden states (1, T, H) of their last tokens."""
        states = None
        if self.held + len(ids) + 1 > self.room:
            self._grow(self.held + len(ids) + 1 + self.settings.chunk)
        for start in range(0, len(ids), PREFILL_CHUNK):
            states = self._pass(ids[start : start + PREFILL_CHUNK])
        assert states is not None
        self._score(len(ids), decoding)
        return states

    def _score(self, count: int, decoding: bool) -> None:
        """Have the policy score the newest tokens, which were read together, from the heads' predictions."""
        places = np.arange(len(self.tokens) - count, len(self.tokens))
        for block, buffer in enumerate(self.scores):
            new = buffer[:, self.held - count : self.held]
            predicted = new if "heads" in self.policy.needs else None
            new[:] = entry_scores(self.policy, View(block, len(new), places, decoding, predicted))

    def _pass(self, ids: Sequence[int]) -> np.ndarray:
        chain, count, held = self.chain, len(ids), self.held
        first = held if self.frequencies is not None else len(self.tokens)
        # All arrays bound here must outlive the run.
        mask = np.ones((1, held + count + 1), np.int64)
        positions = np.arange(first, first + count + 1, dtype=np.int64)[None]
        tokens = np.asarray([ids], np.int64)
        zeros = np.zeros((1, count, chain.hidden), np.float32)
        states = zeros
        predicting = "heads" in self.policy.needs
        for number, part in enumerate(chain.parts[: chain.depths.index(self.depth) + 1]):
            binding = self._bindings[number]
            residual, addition = np.empty_like(zeros), np.empty_like(zeros)
            scores = [np.empty((1, count, chain.kv_shape[0]), np.float32) for _ in range(part.first, part.last)]
            if not chain.on_cpu:
                self._bind_cache(number)  # binding copied the cache to the device as it was then
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
            if predicting:
                for block, array in zip(range(part.first, part.last), scores, strict=True):
                    bind_array(binding.bind_output, f"retaining_scores.{block}", array)
            chain.sessions[number].run_with_iobinding(binding)
            states = residual + addition
            if predicting:
                for block, array in zip(range(part.first, part.last), scores, strict=True):
                    self.scores[block][:, held : held + count] = array[0].T
        self.tokens += [int(i) for i in ids]
        self.held += count
        return states

    def _evict(self, protected: int) -> None:
        """Keep the best entries of every block and head, as many as the budget allows."""
        budget = self.budget
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
        """Evict the worst entry of every block and head, except the `local` newest."""
        end = self.held
        for block in range(self.depth):
            for head, gone in enumerate(worst(self.scores[block][:, :end], self.settings.local)):
                for buffer in (self.keys[block][0], self.values[block][0], self.scores[block]):
                    buffer[head, gone : end - 1] = buffer[head, gone + 1 : end]  # numpy handles the overlap
                if self.frequencies is not None:
                    moved = self.keys[block][0, head : head + 1, gone : end - 1]
                    turn(moved, np.array([[-1]]), self.frequencies)
        self.held -= 1

    def _grow(self, room: int) -> None:
        """Make room for `room` entries, and rebind the buffers."""
        heads, size = self.chain.kv_shape
        cache, kind = (1, heads, room, size), self.chain.kv_type
        for name, shape, dtype in (
            ("keys", cache, kind),
            ("values", cache, kind),
            ("scores", (heads, room), np.float32),
        ):
            buffers = [np.zeros(shape, dtype) for _ in range(self.depth)]
            for old, new in zip(getattr(self, name) if self.room else (), buffers, strict=False):
                if name == "scores":
                    new[:, : self.held] = old[:, : self.held]
                else:
                    new[:, :, : self.held] = old[:, :, : self.held]
            setattr(self, name, buffers)
        self.room = room
        for number in range(len(self.chain.parts)):
            self._bind_cache(number)

    def _bind_cache(self, number: int) -> None:
        part, binding = self.chain.parts[number], self._bindings[number]
        for block in range(part.first, min(part.last, self.depth)):
            for name, cache in (("key", self.keys[block]), ("value", self.values[block])):
                # One buffer for past and present: the kernel writes new entries into it and copies nothing.
                bind_array(binding.bind_input, f"past_key_values.{block}.{name}", cache)
                bind_array(binding.bind_output, f"present.{block}.{name}", cache)


def check_renumbering(chain: BlockChain) -> None:
    """`UserError` for a cache of integers: contiguous positions turn keys at every eviction, and each turn would round
    them again."""
    if np.issubdtype(chain.kv_type, np.integer):
        raise UserError(
            f"{chain.folder} has an int8 cache, whose keys cannot be renumbered without rounding them each time: use "
            "--kv-positions true, or export with kv: float32"
        )


def check_windows(config: dict[str, Any]) -> None:
    """`UserError` for a model (its config.json) with sliding windows.

    The kernel counts the window in held entries, which no longer match the text's tokens after an eviction.
    """
    window = config.get("sliding_window")
    if any(sliding_blocks(config)) and window < config["max_position_embeddings"]:
        raise UserError(
            f"a KV budget does not work with this model's sliding window of {window} tokens, which ONNX Runtime "
            "counts in held entries instead of tokens; run it without --kv-budget"
        )

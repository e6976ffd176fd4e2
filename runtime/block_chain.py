"""An ONNX model run part by part (`onnx_cut`): all depths from one set of weights, in ONNX Runtime.

A text is read lazily. Each part keeps its output hidden states and how far it has read; parts that a depth skips lag
behind, and when a greater depth is requested, they read what they missed in one batch. So a block's keys and values are
always bit-identical to those of a full pass over the same tokens, whichever depths were requested before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.machine import threads_of
from ..core.place import ON_CPU, Place
from .generator import check_depth
from .onnx_cut import cut_model
from .onnx_engine import CACHE_TYPES, PREFILL_CHUNK, read_genai_config
from .providers import open_sessions

_SMALLEST_CACHE = 256  # tokens; doubled when full


class BlockChain:
    """The blocks between depths, and the head, each in a session of its own; holds no text.

    `folder` is an ONNX folder with the graph of the deepest model; `depths` ascend and end at the greatest depth
    wanted; blocks beyond it are not loaded. `threads` 0 is one per core. With `scores` the parts also output their
    blocks' retaining scores. `UserError` for missing or broken files, and for a device of `place` that does not run
    them.
    """

    def __init__(
        self,
        folder: Path,
        depths: Sequence[int],
        threads: int = 0,
        scores: bool = False,
        place: Place = ON_CPU,
    ):
        config = read_genai_config(folder)["model"]
        decoder = config["decoder"]
        self.folder = Path(folder)
        self.depths = tuple(depths)
        self.context = int(config["context_length"]) - 1  # onnx_cut's extra row takes a position
        self.hidden, self.vocabulary = int(decoder["hidden_size"]), int(config["vocab_size"])
        self.kv_shape = (int(decoder["num_key_value_heads"]), int(decoder["head_size"]))
        file = self.folder / decoder["filename"]
        *self.parts, self.head = cut_model(file, self.depths, int(decoder["num_hidden_layers"]), scores)
        opened = open_sessions(
            [part.model for part in (*self.parts, self.head)], lambda: self._options(file, threads), place, file
        )
        self.sessions, self.device, self.on_cpu = opened.sessions, opened.device, opened.on_cpu
        inputs = [{value.name: value.type for value in session.get_inputs()} for session in self.sessions]
        self.takes_positions = ["position_ids" in names for names in inputs]
        self.kv_type = CACHE_TYPES[inputs[0]["past_key_values.0.key"]]  # of the numbers in the cache

    @staticmethod
    def _options(file: Path, threads: int) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; nothing may reach the terminal
        options.intra_op_num_threads = threads_of(threads)
        # Each session has its own threads, which would keep spinning while the next session works.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        folder = str(file.parent.resolve())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return options

    def run_head(self, binding: Any, states: np.ndarray) -> np.ndarray:
        """Logits (T, V) float32 of hidden states (1, T, H) behind the last block, the final norm not yet applied."""
        count = states.shape[1]
        zeros = np.zeros((1, count, self.hidden), np.float32)
        logits = np.empty((1, count, self.vocabulary), np.float32)
        assert self.head.start is not None
        bind_array(binding.bind_input, self.head.start.residual, states)
        bind_array(binding.bind_input, self.head.start.addition, zeros)
        bind_array(binding.bind_output, "logits", logits)
        self.sessions[-1].run_with_iobinding(binding)
        return logits[0]

    def close(self) -> None:
        self.sessions = []


class CachedText:
    """Tokens that a chain has read, its keys and values, and the hidden states between its parts."""

    def __init__(self, chain: BlockChain):
        self.chain = chain
        self.tokens: list[int] = []
        self._read = [0] * len(chain.parts)  # tokens each part has read; never more than the part before
        self._bindings = [session.io_binding() for session in chain.sessions]
        self._caches: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        self._zeros = np.zeros((1, PREFILL_CHUNK, chain.hidden), np.float32)
        self._room = 0
        self._grow(_SMALLEST_CACHE)

    def keep(self, ids: Sequence[int]) -> int:
        """Forget everything after the prefix shared with `ids`, whose last token is always read again; returns the
        length kept."""
        most = min(len(self.tokens), len(ids) - 1)
        common = next((i for i in range(most) if self.tokens[i] != ids[i]), max(most, 0))
        self.cut(common)
        return common

    def cut(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        del self.tokens[length:]
        self._read = [min(read, length) for read in self._read]

    def add(self, ids: Sequence[int]) -> None:
        """Append these tokens; they are read when logits are requested. `UserError` past the context."""
        self.tokens += [int(i) for i in ids]
        if len(self.tokens) > self.chain.context:
            length = len(self.tokens)
            self.cut(length - len(ids))
            raise UserError(f"a text of {length} tokens is longer than the model's context of {self.chain.context}")
        if len(self.tokens) + 1 > self._room:  # one for the row that onnx_cut adds
            self._grow(len(self.tokens) + 1)

    def logits(self, depth: int, count: int = 1) -> np.ndarray:
        """Logits (count, V) float32 after each of the last `count` tokens, at a depth."""
        check_depth(depth, self.chain.depths)
        last = self.chain.depths.index(depth)
        length = len(self.tokens)
        while self._read[last] < length:
            for part in range(last + 1):
                self._run(part, self._read[part - 1] if part else length)
        return self.chain.run_head(self._bindings[-1], self._states[last][None, length - count : length])

    def _run(self, number: int, available: int) -> None:
        """Have a part read its unread tokens among the first `available`, at most a chunk."""
        part, binding, start = self.chain.parts[number], self._bindings[number], self._read[number]
        end = min(available, start + PREFILL_CHUNK)
        if end <= start:
            return
        # All arrays bound here must live until the run is over: only their addresses are handed on.
        mask = np.ones((1, end + 1), np.int64)
        positions = np.arange(start, end + 1, dtype=np.int64)[None]
        ids = np.asarray([self.tokens[start:end]], np.int64)
        residual, addition = (np.empty((1, end - start, self.chain.hidden), np.float32) for _ in range(2))
        bind_array(binding.bind_input, "attention_mask", mask)
        if self.chain.takes_positions[number]:
            bind_array(binding.bind_input, "position_ids", positions)
        if part.start is None:
            bind_array(binding.bind_input, "input_ids", ids)
        else:
            bind_array(binding.bind_input, part.start.residual, self._states[number - 1][None, start:end])
            bind_array(binding.bind_input, part.start.addition, self._zeros[:, : end - start])
        if not self.chain.on_cpu:
            self._bind_cache(number)  # binding copied the cache to the device as it was then
        assert part.end is not None
        bind_array(binding.bind_output, part.end.residual, residual)
        bind_array(binding.bind_output, part.end.addition, addition)
        self.chain.sessions[number].run_with_iobinding(binding)
        np.add(residual[0], addition[0], out=self._states[number][start:end])
        self._read[number] = end

    def _grow(self, wanted: int) -> None:
        """Make room for so many tokens, at least doubling the capacity, and rebind the caches."""
        room = min(max(wanted, 2 * self._room), max(wanted, self.chain.context + 1))
        heads, size = self.chain.kv_shape
        caches = [np.zeros((1, heads, room, size), self.chain.kv_type) for _ in range(2 * self.chain.depths[-1])]
        states = [np.zeros((room, self.chain.hidden), np.float32) for _ in self.chain.parts]
        for old, new in zip(self._caches, caches, strict=False):
            new[:, :, : self._room] = old
        for old, new in zip(self._states, states, strict=False):
            new[: self._room] = old
        self._caches, self._states, self._room = caches, states, room
        for number in range(len(self.chain.parts)):
            self._bind_cache(number)

    def _bind_cache(self, number: int) -> None:
        part, binding, caches = self.chain.parts[number], self._bindings[number], self._caches
        for block in range(part.first, part.last):
            for name, cache in (("key", caches[2 * block]), ("value", caches[2 * block + 1])):
                # One buffer for past and present: the kernel writes new entries into it and copies nothing.
                bind_array(binding.bind_input, f"past_key_values.{block}.{name}", cache)
                bind_array(binding.bind_output, f"present.{block}.{name}", cache)


def bind_array(bind: Any, name: str, array: np.ndarray) -> None:
    """Bind an array to an input or output; only its address is passed on, so it must live until the run ends."""
    bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

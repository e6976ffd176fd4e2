"""Generating text with llama.cpp and a KV cache of bounded size, from which a policy evicts tokens (`kv`).

For policies that need retaining heads, llama.cpp's evaluation callback supplies every block's queries, keys and values
as the projections output them; the heads score them here, in numpy. Tokens keep their positions in the text.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.gguf_header import read_header, split_files
from ..core.machine import cores
from ..core.place import Place
from ..kv.policies import make
from ..kv.policy import Floats, check_needs
from ..kv.settings import KvBudget
from ..kv.steps import most_held, read_in_steps, steps
from ..kv.tokens import HeldTokens
from .artifact_types import GGUF_CACHE
from .engine import pick
from .generator import Generator, Request, RequestWork, Tokens
from .llama_library import Cache, LlamaModel
from .llamacpp_server import check_kv_type

BATCH = 512  # maximum tokens per forward pass; a chunk may take several
_PARTS = {b"Qcur": 0, b"Kcur": 1, b"Vcur": 2, b"wqkv": 3}  # wqkv: Phi-3's, all three in one
# A projection's output is a product or, with a bias, a sum; norms and rotations of the same name come later.
_PROJECTIONS = ("MUL_MAT", "ADD")


class TokenScorer:
    """Retaining heads from a `heads.gguf` for a model's first `blocks` blocks; they score what llama.cpp computes.

    `header` is the model's. With `pairs_adjacent` its query and key rows are reordered so that the two of a rotated
    pair are adjacent; the heads were trained on transformers' order, so their columns are reordered to match.
    """

    def __init__(self, file: Path, header: Mapping[str, Any], blocks: int, pairs_adjacent: bool):
        name = header["general.architecture"]
        heads, groups = header[f"{name}.attention.head_count"], _kv_heads(header)
        size = header.get(f"{name}.attention.key_length", header[f"{name}.embedding_length"] // heads)
        order = _columns(heads, groups, size, pairs_adjacent)
        weights = read_heads(file)
        self._weights: list[tuple[Floats, Floats]] = []
        for block in range(blocks):
            w1, w2 = (weights.get(f"blk.{block}.retain_{layer}.weight") for layer in (1, 2))
            if w1 is None or w2 is None or w1.shape[1] != len(order) or w2.shape != (groups, w1.shape[0]):
                raise UserError(f"the retaining heads in {file} do not fit the model: see its block {block}")
            self._weights.append((np.ascontiguousarray(w1[:, order].T), np.ascontiguousarray(w2.T)))
        self._block, self._parts = 0, {}
        self._scores: list[Floats] = []

    @staticmethod
    def wanted(name: bytes, operation: str) -> bool:
        """Whether a tensor of llama.cpp's graph is the output of a block's projection."""
        return name[:4] in _PARTS and name[4:5] == b"-" and operation in _PROJECTIONS

    def observe(self, name: bytes, values: Floats) -> None:
        """Receive a block's projection; blocks come in order, and a sum with a bias after the product."""
        block = int(name[5:])
        if block != self._block:
            self._finish()
            self._block = block
        self._parts[_PARTS[name[:4]]] = values

    def _finish(self) -> None:
        if self._block != len(self._scores):
            raise RuntimeError(f"llama.cpp computed block {self._block} out of order")
        qkv = np.concatenate([self._parts[part] for part in sorted(self._parts)], axis=1)
        self._parts = {}
        w1, w2 = self._weights[self._block]
        hidden = qkv @ w1
        with np.errstate(over="ignore"):  # exp of a large number is inf, and x / inf is 0, as it should be
            hidden /= 1 + np.exp(-hidden)
        self._scores.append(hidden @ w2)

    def take(self) -> Floats:
        """Scores (tokens, blocks · KV heads) of the tokens read since the last call."""
        self._finish()
        scores, self._scores, self._block = self._scores, [], 0
        if len(scores) != len(self._weights):
            raise RuntimeError(f"llama.cpp computed {len(scores)} of {len(self._weights)} blocks")
        return np.concatenate(scores, axis=1)

    def forget(self) -> None:
        """Discard the remains of a failed read."""
        self._block, self._parts, self._scores = 0, {}, []


def read_heads(file: Path) -> dict[str, Floats]:
    """The tensors of a `heads.gguf` by name. `UserError` for anything else."""
    if read_header(file).get("general.architecture") != "compress-retain":
        raise UserError(f"{file} holds no retaining heads")
    from gguf import GGUFReader

    return {tensor.name: np.asarray(tensor.data, np.float32) for tensor in GGUFReader(file).tensors}


def _columns(heads: int, groups: int, size: int, pairs_adjacent: bool) -> NDArray[np.int64]:
    """For each row of llama.cpp's concatenated queries, keys and values, its index in the heads' order."""
    order = np.arange((heads + 2 * groups) * size)
    if pairs_adjacent:
        rotated = (heads + groups) * size
        halves = order[:rotated].reshape(heads + groups, 2, size // 2)
        order[:rotated] = halves.swapaxes(1, 2).reshape(-1)
    return order


def check_no_gpu(place: Place) -> None:
    """`UserError` for layers on a GPU: the library that has this cache is opened for the CPU."""
    if place.gpu_layers:
        raise UserError(
            f"--gpu-layers {place.gpu_layers}: llama.cpp with a bounded KV cache runs on the CPU: leave out "
            "--kv-budget or --gpu-layers"
        )


class LlamaCppKvGenerator(Generator):
    """`files` maps depths to GGUF files, of which one is open at a time. `heads` is the bundle's `heads.gguf`, read if
    the policy needs it. `kv_type` is the type of keys and values.

    The cache's memory depends on `limits` and the tokens to generate, not on the prompt. A text that extends the
    previous one continues from it; any other is read from the start, because dropped tokens cannot be restored.
    """

    runtime = "llama.cpp"

    def __init__(
        self, files: Mapping[int, Path], heads: Path, limits: KvBudget, threads: int = 0, kv_type: str = GGUF_CACHE
    ):
        if limits.positions != "true":
            raise UserError(
                f"llama.cpp supports a KV budget with true positions only, not {limits.positions}: use the onnx engine"
            )
        self._policy = make(limits)
        check_needs(self._policy, {"heads"}, "llama.cpp")
        self.depths = tuple(sorted(files))
        self._files, self._heads, self.limits = files, heads, limits
        self._threads, self._kv_type = threads or cores(), kv_type
        self._lock = threading.Lock()
        self._depth = self._kv_heads = 0  # of the open model
        self._model: LlamaModel | None = None
        self._scorer: TokenScorer | None = None
        self._cache: Cache | None = None
        self._text: LlamaCppText | None = None
        self._open(self.depths[-1])
        self.context = min(_longest_text(path) for path in files.values())

    def _open(self, depth: int) -> LlamaModel:
        if self._model is None or depth != self._depth:
            self.close()
            file = self._files[depth]
            split_files(file)  # raises for a missing part; llama.cpp finds the parts by itself
            header = read_header(file)
            check_kv_type(self._kv_type, header, file)
            model = self._model = LlamaModel(file)
            if "heads" in self._policy.needs:
                self._scorer = TokenScorer(self._heads, header, depth, model.pairs_adjacent)
            self._depth, self._kv_heads = depth, _kv_heads(header)
        return self._model

    def _begin(self, request: Request, cells: int) -> LlamaCppText:
        """The previous text if this one extends it, else an empty one."""
        text = self._text
        if text is not None and request.depth == self._depth and text.cells >= cells and text.begins(request.ids):
            return text
        self._text = None
        model, scorer = self._open(request.depth), self._scorer
        if scorer is not None:
            scorer.forget()
        if self._cache is not None and self._cache.cells < cells:
            self._cache.close()
            self._cache = None
        if self._cache is None:
            batch = min(BATCH, max(self.limits.chunk, self.limits.local))
            self._cache = Cache(model, cells, batch, self._threads, scorer, self._kv_type)
        self._cache.clear()
        held = HeldTokens(self._policy, self._depth, self._kv_heads)
        self._text = LlamaCppText(self._cache, scorer, held, self.limits)
        return self._text

    def cells(self, new: int) -> int:
        """The most tokens held at once of a text with up to `new` generated tokens per answer."""
        return min(self.context, most_held(self.limits, self.context, new))

    def check(self, request: Request) -> None:
        super().check(request)
        if request.exits or request.draft_depth is not None:
            raise UserError("llama.cpp with a bounded KV cache supports neither drafts nor early exit: leave them out")

    def generate(self, request: Request, work: RequestWork) -> Tokens:
        self.check(request)
        with self._lock:
            room = self.context - len(request.ids) + 1
            limit = min(request.max_tokens, room)
            text = self._begin(request, self.cells(limit))
            work.reused = len(text.tokens)
            random = np.random.default_rng(request.seed)
            logits = text.read_prompt([int(token) for token in request.ids[work.reused :]])
            for written in range(limit):
                token = pick(logits, request.temperature, request.top_p, random)
                if token in request.stop:
                    work.finish = "stop"
                    return
                work.depths[request.depth] += 1
                yield token
                if written + 1 < limit:
                    logits = text.read_one(token)

    def close(self) -> None:
        for part in (self._cache, self._model):
            if part is not None:
                part.close()
        self._cache = self._model = self._scorer = self._text = None


class LlamaCppText:
    """One text, and the cache of the tokens kept of it."""

    def __init__(self, cache: Cache, scorer: TokenScorer | None, held: HeldTokens, limits: KvBudget):
        if limits.budget is None:
            raise ValueError("a bounded text needs a budget")
        self._cache, self._scorer, self.held = cache, scorer, held
        self._limits, self._budget, self.cells = limits, limits.budget, cache.cells
        self.tokens: list[int] = []  # read so far
        self._whole = True  # no read was interrupted

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether `ids` extends this text."""
        read = len(self.tokens)
        return self._whole and read < len(ids) and list(ids[:read]) == self.tokens

    def read_prompt(self, ids: list[int]) -> Floats:
        """Read a prompt, or a continuation of the text so far, chunk by chunk and then its local tail. Returns the
        logits (V,) after it."""
        plan = steps(len(ids), self._limits, len(self.held))
        return read_in_steps(ids, plan, self._read, lambda protected: self._evict(self._budget, protected))

    def read_one(self, token: int) -> Floats:
        """Read a generated token; logits (V,) after it."""
        limits = self._limits
        if limits.evict_decoding:
            self._evict(self._budget + limits.local - 1, limits.local)
        return self._read([token], decoding=True)

    def _read(self, ids: Sequence[int], decoding: bool = False) -> Floats:
        logits: Floats = np.empty(0, np.float32)
        self._whole = False
        first, predicted = len(self.tokens), []
        for start in range(0, len(ids), self._cache.batch):
            piece = ids[start : start + self._cache.batch]
            logits = self._cache.decode(piece, len(self.tokens))
            if self._scorer is not None:
                predicted.append(self._scorer.take())
            self.tokens += piece
        self.held.read(range(first, len(self.tokens)), np.concatenate(predicted) if predicted else None, decoding)
        self._whole = True
        return logits

    def _evict(self, budget: int, newest: int) -> None:
        self._cache.drop(self.held.evict(budget, newest))


def _kv_heads(header: Mapping[str, Any]) -> int:
    name = header["general.architecture"]
    return header.get(f"{name}.attention.head_count_kv", header[f"{name}.attention.head_count"])


def _longest_text(file: Path) -> int:
    """The number of tokens for which llama.cpp rotates positions as the model does.

    For a model with two sets of rotary factors it chooses by the cache's size: here the set for short texts.
    """
    header = read_header(file)
    name = header.get("general.architecture")
    trained = header.get(f"{name}.context_length")
    if not isinstance(trained, int):
        raise UserError(f"{file} is not a language model: its header names no context length")
    if header.get(f"{name}.rope.scaling.type") == "longrope":
        trained = min(trained, header.get(f"{name}.rope.scaling.original_context_length", trained))
    return trained

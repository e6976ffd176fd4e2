"""Sizes of exported files, and the cost of predictions by stock llama.cpp and ONNX Runtime. No torch.

Both run on the CPU. llama.cpp is queried position by position: each costs one decoded token, batched over
several texts.
"""

from __future__ import annotations

from ..core.cost import PlannedFile
from ..core.geometry import Geometry
from ..core.work import Work, decoding, forward
from .artifact_sizes import bits_per_weight
from .artifact_types import CACHE_BYTES, GGUF_CACHE

SLOTS = 4  # texts that llama.cpp scores side by side
# Operations' worth of time per weight and type: choosing scales. From the default recipe's export on `cpu-2core`.
QUANTIZING = 13_000


def artifact_bytes(kind: str, parameters: int) -> float:
    """Expected size of an exported file of a type, or of the size that was asked for."""
    return parameters * bits_per_weight(kind, parameters) / 8


def kv_bytes_per_token(shape: Geometry, depth: int, cache: str) -> int:
    """Bytes of keys and values that each token of context takes at a depth, in a cache of this type. Blocks whose
    attention slides a window are counted as the others: both runtimes keep all of a text."""
    return round(shape.kv_bytes(1, 1, depth) * CACHE_BYTES[cache])


def held_as(kv_bytes: int, cache: str, kv_type: str) -> int:
    """Bytes of keys and values that take `kv_bytes` in a cache of one type, in one of another."""
    return round(kv_bytes * CACHE_BYTES[kv_type] / CACHE_BYTES[cache])


def cache_type(form: str, onnx_cache: str) -> str:
    """The type of an artifact's cache, where ONNX's is `onnx_cache`."""
    return onnx_cache if form == "onnx" else GGUF_CACHE


def scoring(shape: Geometry, file: PlannedFile, tokens: int, window: int) -> Work:
    """Cost of an artifact's predictions at `tokens` positions, in texts of `window` tokens."""
    steps = 1.0 if file.form == "onnx" else tokens / SLOTS
    weights = artifact_bytes(file.type, shape.parameters(file.blocks))
    return Work(forward(shape, file.blocks, tokens, window / 2), steps * weights).beside()


def writing(shape: Geometry, kind: str, depth: int, rows: int, prompt: int, new: int) -> Work:
    """Cost of generating texts of `new` tokens after `prompt` tokens, one by one; the cache is in half precision."""
    weights = artifact_bytes(kind, shape.parameters(depth))
    return decoding(shape, depth, rows, 1, prompt, new, weights, 2).beside()

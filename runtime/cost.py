"""Sizes of exported files, and the cost of predictions by stock llama.cpp and ONNX Runtime. No torch.

Both run on the CPU. llama.cpp is queried position by position: each costs one decoded token, batched over
several texts.
"""

from __future__ import annotations

from typing import NamedTuple

from ..core.geometry import Geometry
from ..core.work import Work, decoding, forward

SLOTS = 4  # texts that llama.cpp scores side by side


class Bits(NamedTuple):
    """Bits per weight of an exported file, scales and higher types for some tensors included."""

    typical: float
    most: float  # for the check of free disk


GGUF_BITS = {
    "F16": Bits(16, 16),
    "Q8_0": Bits(8.5, 8.5),
    "Q6_K": Bits(6.6, 8.5),
    "Q4_K_M": Bits(4.9, 6.5),
    "Q4_0": Bits(4.6, 6),
}
ONNX_BITS = {"int4": Bits(5.7, 7), "int8": Bits(9, 10), "fp32": Bits(32, 32)}
BITS = GGUF_BITS | ONNX_BITS


def artifact_bytes(kind: str, parameters: int) -> float:
    """Expected size of an exported file of a type."""
    return parameters * BITS[kind].typical / 8


def scoring(shape: Geometry, kind: str, depth: int, tokens: int, window: int) -> Work:
    """Cost of an artifact's predictions at `tokens` positions, in texts of `window` tokens."""
    steps = 1.0 if kind in ONNX_BITS else tokens / SLOTS
    weights = artifact_bytes(kind, shape.parameters(depth))
    return Work(forward(shape, depth, tokens, window / 2), steps * weights).beside()


def writing(shape: Geometry, kind: str, depth: int, rows: int, prompt: int, new: int) -> Work:
    """Cost of generating texts of `new` tokens after `prompt` tokens, one by one; the cache is in half precision."""
    weights = artifact_bytes(kind, shape.parameters(depth))
    return decoding(shape, depth, rows, 1, prompt, new, weights, 2).beside()

"""Block-wise integer weights for ONNX Runtime's MatMulNBits and GatherBlockQuantized, one quantizer per file.

A file here defines `QUANTIZER`; a precision in runtime/artifact_types.py names the files that its matrices use.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # weights, along the input dimension, that share a scale
CHUNK = 1 << 18  # weights worked on at once: small enough for the processor's cache


@dataclass(frozen=True)
class Quantized:
    """Weights (N, K) in blocks along K: weight ≈ scale · (value - zero point)."""

    values: np.ndarray  # (N, K / BLOCK, BLOCK · bits / 8) uint8, two 4-bit values to a byte, the first one low
    scales: np.ndarray  # (N, K / BLOCK) float32
    zero_points: np.ndarray | None  # (N, ceil(K / BLOCK · bits / 8)) uint8; None: 2^(bits - 1) everywhere
    bits: int

    def dequantize(self) -> np.ndarray:
        """The weights (N, K) float32 that the runtime computes with."""
        rows, blocks = self.scales.shape
        codes = unpack(self.values.reshape(rows, -1), self.bits).reshape(rows, blocks, BLOCK)
        zeros = np.full((rows, blocks), 1 << (self.bits - 1), np.float32)
        if self.zero_points is not None:
            zeros = unpack(self.zero_points, self.bits)[:, :blocks]
        return ((codes - zeros[..., None]) * self.scales[..., None]).reshape(rows, -1)


@dataclass(frozen=True)
class Quantizer:
    """How a matrix becomes integers."""

    # Takes weight (N, K) float, K a multiple of `BLOCK`, and the mean squared activation of each input (K,) float32
    # if known; a quantizer may leave the latter unused.
    quantize: Callable[[np.ndarray, np.ndarray | None], Quantized]
    bits: int  # of the integers it makes, 4 or 8
    row_error: float  # largest relative error of a row that verification accepts, as `tensors.LIMITS`


def quantizer(name: str) -> Quantizer:
    """The quantizer in the file of this name."""
    return importlib.import_module(f"{__name__}.{name}").QUANTIZER


def row_limits() -> dict[str, float]:
    """Largest relative error of a row that verification accepts, by type of a graph's matrices: int4, int8."""
    limits: dict[str, float] = {}
    for module in pkgutil.iter_modules(__path__):
        found = quantizer(module.name)
        kind = f"int{found.bits}"
        limits[kind] = max(limits.get(kind, 0.0), found.row_error)
    return limits


def chunks(weight: np.ndarray) -> list[Tensor]:
    """(rows, K / BLOCK, BLOCK) float32 pieces of weight (N, K)."""
    rows = max(1, CHUNK // weight.shape[1])
    # Writable, which torch wants though nothing is written; copied only where it must be.
    pieces = (np.require(weight[i : i + rows], np.float32, ["C", "W"]) for i in range(0, len(weight), rows))
    return [torch.from_numpy(piece).reshape(len(piece), -1, BLOCK) for piece in pieces]


def pack(codes: Tensor) -> np.ndarray:
    """(N, M) values 0–15 to (N, ceil(M / 2)) bytes, the first of each pair in the low half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous().numpy()


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """(N, M) bytes to the (N, M · 8 / bits) values they hold, float32; 4 or 8 bits."""
    if bits == 8:
        return packed.astype(np.float32)
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32)

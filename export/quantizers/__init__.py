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

BLOCK = 32  # weights, along the input dimension, that share a scale in all precisions
CHUNK = 1 << 18  # weights worked on at once: small enough for the processor's cache


@dataclass(frozen=True)
class Quantized:
    """Weights (N, K) in blocks along K: weight ≈ scale · (value - zero point)."""

    values: np.ndarray  # (N, blocks, bytes of a block) uint8, 8 / bits values to a byte, the first one lowest
    scales: np.ndarray  # (N, blocks) float32
    zero_points: np.ndarray | None  # (N, ceil(blocks · bits / 8)) uint8; None: 2^(bits - 1) everywhere
    bits: int

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        return self.values.shape[2] * 8 // self.bits

    @property
    def nbytes(self) -> int:
        parts = (self.values, self.scales, self.zero_points)
        return sum(part.nbytes for part in parts if part is not None)

    def dequantize(self) -> np.ndarray:
        """The weights (N, K) float32 that the runtime computes with."""
        rows, blocks = self.scales.shape
        codes = unpack(self.values.reshape(rows, -1), self.bits).reshape(rows, blocks, self.block)
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
    bits: int  # of the integers it makes: 2, 4 or 8
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


def chunks(weight: np.ndarray, block: int = BLOCK) -> list[Tensor]:
    """(rows, K / block, block) float32 pieces of weight (N, K)."""
    rows = max(1, CHUNK // weight.shape[1])
    # Writable, which torch wants though nothing is written; copied only where it must be.
    pieces = (np.require(weight[i : i + rows], np.float32, ["C", "W"]) for i in range(0, len(weight), rows))
    return [torch.from_numpy(piece).reshape(len(piece), -1, block) for piece in pieces]


def pack(codes: Tensor, bits: int = 4) -> np.ndarray:
    """(N, M) values of `bits` bits to (N, ceil(M · bits / 8)) bytes, the first values in the lowest bits."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    packed = codes[:, 0::each].clone()
    for place in range(1, each):
        packed |= codes[:, place::each] << (bits * place)
    return packed.contiguous().numpy()


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """(N, M) bytes to the (N, M · 8 / bits) values they hold, float32; 2, 4 or 8 bits."""
    parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(len(packed), -1).astype(np.float32)

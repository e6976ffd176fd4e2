"""The values that a quantized matrix's scales allow, and rounding other weights to the nearest of them.

Quantizing searches scales, which takes some hundred nanoseconds per weight; with the scales given, a weight is rounded
in two. Every layout comes down to the same: a value is lowest + step · level, with a lowest value and a step for each
group of weights. What a group's are is asked of the function that the files are read with: it gives the lowest value
for codes that are all zeros, and the highest for all ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from .quantizers import Quantized, unpack


@dataclass(frozen=True)
class Levels:
    """The values that the weights of a matrix (N, K), in groups along K, may have."""

    lowest: Tensor  # (N, G, 1)
    step: Tensor  # (N, G, 1); of either sign, 0 for a group of zeros
    top: float  # the highest level; the lowest is 0
    table: Tensor | None = None  # the levels, ascending; None: all whole numbers

    def nearest(self, weights: Tensor) -> Tensor:
        """Other weights (N, K) float32 at the nearest values; changes `weights`."""
        blocks = weights.view(*self.step.shape[:2], -1)
        blocks.sub_(self.lowest).mul_(torch.where(self.step == 0, 0, 1 / self.step))
        if self.table is None:
            blocks.round_().clamp_(0, self.top)
        else:
            blocks.copy_(self.table[torch.bucketize(blocks, (self.table[1:] + self.table[:-1]) / 2)])
        blocks.mul_(self.step).add_(self.lowest)
        return weights

    def to(self, device: torch.device) -> Levels:
        """The same on another device."""
        table = None if self.table is None else self.table.to(device)
        return Levels(self.lowest.to(device), self.step.to(device), self.top, table)


@dataclass(frozen=True)
class Layout:
    """A GGUF type's blocks: where the codes are, and what they stand for."""

    codes: slice  # bytes of a block that hold nothing else
    group: int  # weights that share a scale
    top: int  # the highest level
    zero: int | None  # the level that stands for zero; None: the blocks have minima
    ends: tuple[int, int] = (0, 0xFF)  # the byte of codes that are all at the lowest level, and at the highest


LAYOUTS = {
    Type.Q4_0: Layout(slice(2, 18), 32, 15, 8),
    Type.Q4_1: Layout(slice(4, 20), 32, 15, None),
    Type.Q5_0: Layout(slice(2, 22), 32, 31, 16),
    Type.Q5_1: Layout(slice(4, 24), 32, 31, None),
    Type.Q8_0: Layout(slice(2, 34), 32, 254, 127, (0x81, 0x7F)),
    Type.Q2_K: Layout(slice(16, 80), 16, 3, None),
    Type.Q3_K: Layout(slice(0, 96), 16, 7, 4),
    Type.Q4_K: Layout(slice(16, 144), 32, 15, None),
    Type.Q5_K: Layout(slice(16, 176), 32, 31, None),
    Type.Q6_K: Layout(slice(0, 192), 16, 63, 32),
    Type.IQ4_NL: Layout(slice(2, 18), 32, 240, 127),
    Type.IQ4_XS: Layout(slice(8, 136), 32, 240, 127),
}
UNEVEN = (Type.IQ4_NL, Type.IQ4_XS)  # whose sixteen levels are those of one table


def gguf_levels(data: NDArray[np.uint8], kind: Type) -> Levels:
    """Those of the rows (N, bytes of one) of a type in LAYOUTS."""
    layout = LAYOUTS[kind]
    lowest = _filled(data, kind, layout.ends[0])
    step = (_filled(data, kind, layout.ends[1]) - lowest) / layout.top if layout.zero is None else lowest / -layout.zero
    return Levels(lowest, step, layout.top, _table() if kind in UNEVEN else None)


def _filled(data: NDArray[np.uint8], kind: Type, byte: int) -> Tensor:
    """The value (N, G, 1) of each group whose codes are all this byte's."""
    layout, size = LAYOUTS[kind], gguf.GGML_QUANT_SIZES[kind][1]
    blocks = data.reshape(-1, size).copy()
    blocks[:, layout.codes] = byte
    values = gguf.dequantize(blocks.reshape(len(data), -1), kind)
    return torch.from_numpy(values.reshape(len(data), -1, layout.group)[..., :1].copy())


def _table() -> Tensor:
    """The levels of the uneven types, the lowest 0."""
    block = np.frombuffer(np.float16(1).tobytes() + bytes(16 * [0]), np.uint8)
    found = [float(_filled(block[None], Type.IQ4_NL, code * 0x11)) for code in range(16)]
    return torch.tensor(found) - found[0]


def nbits_levels(matrix: Quantized) -> Levels:
    """Those of a matrix of an ONNX graph."""
    scales = torch.from_numpy(matrix.scales)[..., None]
    if matrix.zero_points is None:
        zeros: Tensor | float = float(1 << (matrix.bits - 1))
    else:
        zeros = torch.from_numpy(unpack(matrix.zero_points, matrix.bits)[:, : scales.shape[1]])[..., None]
    return Levels(-zeros * scales, scales, (1 << matrix.bits) - 1)

"""The grids that a matrix of an ONNX file can be rounded to, and rounding to them.

A grid is a bit width, a number of weights that share a scale, and whether a block has a zero point of its own. ONNX
Runtime's CPU kernels compute with 2, 4 and 8 bits and blocks of 16 to 256; of 2 bits blocks of 16 and 256 go through a
slow path, some fifty times slower for one token, and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .quantizers import Quantized, chunks, pack

# Of a block's range: what outliers are clipped to. The wider the steps, the more it pays.
SHRINK = {
    2: (1.0, 0.9, 0.8, 0.72, 0.64, 0.56, 0.48, 0.4),
    4: (1.0, 0.94, 0.88, 0.82, 0.76, 0.70, 0.64, 0.58),
    8: (1.0,),
}
SCALE = 4  # bytes


@dataclass(frozen=True)
class Grid:
    """A bit width and its blocks; of 32 bits the weights stay as they are."""

    bits: int
    block: int  # weights, along the input dimension, that share a scale
    zeros: bool  # whether a block has a zero point; else the integers are symmetric

    @property
    def name(self) -> str:
        """int4/64; uint4/64 with zero points; float32."""
        return "float32" if self.bits == 32 else f"{'u' * self.zeros}int{self.bits}/{self.block}"

    def fits(self, columns: int) -> bool:
        return columns % self.block == 0

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row: integers, scales and zero points."""
        if self.bits == 32:
            return 4 * columns
        blocks = columns // self.block
        return columns * self.bits // 8 + SCALE * blocks + self.zeros * -(-blocks * self.bits // 8)

    def empty(self, rows: int, columns: int) -> Quantized:
        """A matrix of this form without content, which takes no memory until it is read."""
        blocks = columns // self.block
        zeros = np.zeros((rows, -(-blocks * self.bits // 8)), np.uint8) if self.zeros else None
        values = np.zeros((rows, blocks, self.block * self.bits // 8), np.uint8)
        return Quantized(values, np.zeros((rows, blocks), np.float32), zeros, self.bits)


FLOAT = Grid(32, 1, False)
GRIDS = (
    *(Grid(2, block, zeros) for block in (128, 64, 32) for zeros in (False, True)),
    *(Grid(bits, block, zeros) for bits in (4, 8) for block in (256, 128, 64, 32, 16) for zeros in (False, True)),
    FLOAT,
)


def round_to(grid: Grid, weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """The integers of weight (N, K) float; K must be a multiple of the grid's block.

    `importance` (K,) says how much the error of each input's weights counts (float32), all alike if None; 8 bits go by
    the range of a block alone.
    """
    inputs = torch.ones(weight.shape[1]) if importance is None else torch.from_numpy(importance).float()
    if inputs.shape != (weight.shape[1],):
        raise ValueError(f"importance of shape {tuple(inputs.shape)} does not fit weights of shape {weight.shape}")
    # An input that was never active in calibration still counts a little.
    inputs = inputs.clamp(min=float(inputs.mean()) * 1e-3 + 1e-30).reshape(-1, grid.block)
    found = [_rounded(grid, chunk, inputs) for chunk in chunks(weight, grid.block)]
    codes, zeros, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    values = pack(codes.flatten(1), grid.bits).reshape(*scales.shape, -1)
    return Quantized(values, scales.numpy(), pack(zeros, grid.bits) if grid.zeros else None, grid.bits)


def _rounded(grid: Grid, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n, B, block) uint8, zero points (n, B) uint8 and scales (n, B) of x (n, B, block)."""
    if grid.bits == 8 and not grid.zeros:
        scales = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        codes = (x / scales).round() + 128
        return codes.to(torch.uint8), torch.zeros_like(scales[..., 0], dtype=torch.uint8), scales[..., 0]
    return _search(grid, x, inputs)


def _search(grid: Grid, x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_rounded`, with the least error over clipped ranges and zero points.

    Large weights count more (as in llama.cpp's √(σ² + x²)). For codes q and zero point z the best scale is
    Σwx(q-z) / Σw(q-z)², and it reduces the error by (Σwx(q-z))² / Σw(q-z)²: the greatest is kept.
    """
    top = (1 << grid.bits) - 1
    squares = x.square()
    weights = inputs * (squares.mean(-1, keepdim=True) + squares).sqrt()
    weighted = weights * x
    best = torch.full_like(x[..., :1], -1)
    codes, zeros, scales = torch.zeros_like(x), torch.zeros_like(best), torch.zeros_like(best)
    for step, zero in _tries(grid, x, top):
        centred = (x / step + zero).round().clamp(0, top) - zero
        product = (weighted * centred).sum(-1, keepdim=True)
        norm = (weights * centred.square()).sum(-1, keepdim=True).clamp(min=1e-30)
        gain = product.square() / norm
        better = gain > best
        best = torch.where(better, gain, best)
        codes = torch.where(better, centred + zero, codes)
        zeros = torch.where(better, zero, zeros)
        scales = torch.where(better, product / norm, scales)
    return codes.to(torch.uint8), zeros[..., 0].to(torch.uint8), scales[..., 0]


def _tries(grid: Grid, x: Tensor, top: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Steps and zero points (n, B, 1) to try.

    Symmetric integers reach one step further below zero than above it, so that a step may be negative: then the
    largest weight of either sign is met.
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    middle = torch.full_like(low, (top + 1) // 2)
    for shrink in SHRINK[grid.bits]:
        if grid.zeros:
            step = ((high - low) * (shrink / top)).clamp(min=1e-12)
            at = (-low * shrink / step).round()
            for shift in (0, -1, 1) if grid.bits < 8 else (0,):
                yield step, (at + shift).clamp(0, top)
        else:
            step = (torch.maximum(high, -low) * (shrink / middle)).clamp(min=1e-12)
            yield step, middle
            yield -step, middle

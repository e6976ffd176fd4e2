"""Block-wise integer weights for ONNX Runtime's MatMulNBits and GatherBlockQuantized.

The builder's own 4-bit quantizers round to nearest. Here each block's scale and zero point are searched for the
least squared error, each weight's error weighted by how much its input matters: the same idea as llama.cpp's
importance matrix, in the same file format and size as round-to-nearest with zero points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # weights, along the input dimension, that share a scale
SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.70, 0.64, 0.58)  # of a block's range: what outliers are clipped to
CHUNK = 1 << 18  # weights worked on at once: small enough for the processor's cache


@dataclass(frozen=True)
class Quantized:
    """Weights (N, K) in blocks along K: weight ≈ scale · (value - zero point)."""

    values: np.ndarray  # (N, K / BLOCK, BLOCK · bits / 8) uint8, two 4-bit values to a byte, the first one low
    scales: np.ndarray  # (N, K / BLOCK) float32
    zero_points: np.ndarray | None  # (N, ceil(K / BLOCK · bits / 8)) uint8; None: 128 everywhere
    bits: int

    def dequantize(self) -> np.ndarray:
        """The weights (N, K) float32 that the runtime computes with."""
        rows, blocks = self.scales.shape
        if self.bits == 8:
            codes = self.values.astype(np.float32)
            zeros = np.full((rows, blocks), 128, np.float32)
        else:
            codes = _unpack(self.values.reshape(rows, -1)).reshape(rows, blocks, BLOCK)
            assert self.zero_points is not None
            zeros = _unpack(self.zero_points)[:, :blocks]
        return ((codes - zeros[..., None]) * self.scales[..., None]).reshape(rows, -1)


def quantize_int8(weight: np.ndarray) -> Quantized:
    """Symmetric 8-bit blocks of weight (N, K) float; K must be a multiple of `BLOCK`."""
    scales, codes = [], []
    for chunk in _chunks(weight):
        scale = (chunk.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        codes.append(((chunk / scale).round() + 128).to(torch.uint8))
        scales.append(scale[..., 0])
    return Quantized(torch.cat(codes).numpy(), torch.cat(scales).numpy(), None, 8)


def quantize_int4(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """4-bit blocks with zero points of weight (N, K) float; K must be a multiple of `BLOCK`.

    `importance` (K,) is the mean squared activation of each input (float32), all equal if None.
    """
    inputs = torch.ones(weight.shape[1]) if importance is None else torch.from_numpy(importance).float()
    if inputs.shape != (weight.shape[1],):
        raise ValueError(f"importance of shape {tuple(inputs.shape)} does not fit weights of shape {weight.shape}")
    # An input that was never active in calibration still counts a little.
    inputs = inputs.clamp(min=float(inputs.mean()) * 1e-3 + 1e-30).reshape(-1, BLOCK)
    found = [_search(chunk, inputs) for chunk in _chunks(weight)]
    codes, zeros, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    values = _pack(codes.flatten(1)).reshape(*scales.shape, BLOCK // 2)
    return Quantized(values, scales.numpy(), _pack(zeros), 4)


def _chunks(weight: np.ndarray) -> list[Tensor]:
    """(rows, K / BLOCK, BLOCK) float32 pieces of weight (N, K)."""
    rows = max(1, CHUNK // weight.shape[1])
    # Writable, which torch wants though nothing is written; copied only where it must be.
    pieces = (np.require(weight[i : i + rows], np.float32, ["C", "W"]) for i in range(0, len(weight), rows))
    return [torch.from_numpy(piece).reshape(len(piece), -1, BLOCK) for piece in pieces]


def _search(x: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (n, B, BLOCK) uint8, zero points (n, B) uint8 and scales (n, B) of x (n, B, BLOCK) with the least error.

    Large weights count more (as in llama.cpp's √(σ² + x²)). For codes q and zero point z the best scale is
    Σwx(q-z) / Σw(q-z)², and it reduces the error by (Σwx(q-z))² / Σw(q-z)²: the greatest is kept.
    """
    squares = x.square()
    weights = inputs * (squares.mean(-1, keepdim=True) + squares).sqrt()
    weighted = weights * x
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    best = torch.full_like(low, -1)
    codes, zeros, scales = torch.zeros_like(x), torch.zeros_like(low), torch.zeros_like(low)
    for shrink in SHRINK:
        step = ((high - low) * (shrink / 15)).clamp(min=1e-12)
        middle = (-low * shrink / step).round()
        for shift in (0, -1, 1):
            zero = (middle + shift).clamp(0, 15)
            centred = (x / step + zero).round().clamp(0, 15) - zero
            product = (weighted * centred).sum(-1, keepdim=True)
            norm = (weights * centred.square()).sum(-1, keepdim=True).clamp(min=1e-30)
            gain = product.square() / norm
            better = gain > best
            best = torch.where(better, gain, best)
            codes = torch.where(better, centred + zero, codes)
            zeros = torch.where(better, zero, zeros)
            scales = torch.where(better, product / norm, scales)
    return codes.to(torch.uint8), zeros[..., 0].to(torch.uint8), scales[..., 0]


def _pack(codes: Tensor) -> np.ndarray:
    """(N, M) values 0–15 to (N, ceil(M / 2)) bytes, the first of each pair in the low half."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, 0::2] | (codes[:, 1::2] << 4)).contiguous().numpy()


def _unpack(packed: np.ndarray) -> np.ndarray:
    """(N, M) bytes to (N, 2M) values 0–15, float32."""
    return np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1).astype(np.float32)

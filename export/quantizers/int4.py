"""4-bit blocks with zero points.

The builder's own 4-bit quantizers round to nearest. Here each block's scale and zero point are searched for the
least squared error, each weight's error weighted by how much its input matters: the same idea as llama.cpp's
importance matrix, in the same file format and size as round-to-nearest with zero points.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import BLOCK, Quantized, Quantizer, chunks, pack

SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76, 0.70, 0.64, 0.58)  # of a block's range: what outliers are clipped to


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """4-bit blocks with zero points of weight (N, K) float; K must be a multiple of `BLOCK`.

    `importance` (K,) is the mean squared activation of each input (float32), all equal if None.
    """
    inputs = torch.ones(weight.shape[1]) if importance is None else torch.from_numpy(importance).float()
    if inputs.shape != (weight.shape[1],):
        raise ValueError(f"importance of shape {tuple(inputs.shape)} does not fit weights of shape {weight.shape}")
    # An input that was never active in calibration still counts a little.
    inputs = inputs.clamp(min=float(inputs.mean()) * 1e-3 + 1e-30).reshape(-1, BLOCK)
    found = [_search(chunk, inputs) for chunk in chunks(weight)]
    codes, zeros, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    values = pack(codes.flatten(1)).reshape(*scales.shape, BLOCK // 2)
    return Quantized(values, scales.numpy(), pack(zeros), 4)


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


QUANTIZER = Quantizer(quantize, bits=4, row_error=0.3)

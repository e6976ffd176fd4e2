"""Symmetric 8-bit blocks."""

from __future__ import annotations

import numpy as np
import torch

from . import Quantized, Quantizer, chunks


def quantize(weight: np.ndarray, importance: np.ndarray | None = None) -> Quantized:
    """Symmetric 8-bit blocks of weight (N, K) float; K must be a multiple of `BLOCK`. `importance` changes nothing."""
    scales, codes = [], []
    for chunk in chunks(weight):
        scale = (chunk.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        codes.append(((chunk / scale).round() + 128).to(torch.uint8))
        scales.append(scale[..., 0])
    return Quantized(torch.cat(codes).numpy(), torch.cat(scales).numpy(), None, 8)


QUANTIZER = Quantizer(quantize, bits=8, row_error=0.025)

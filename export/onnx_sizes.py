"""What an unpruned model would weigh in every ONNX precision, from names and shapes alone: nothing is quantized."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np

from ..modeling.families import HEAD, block_number
from ..modeling.load import load_config
from ..modeling.shape import rotated_size
from ..modeling.weights import tensor_headers
from ..runtime.artifact_types import ONNX_TYPES
from .cost import DEPTH_ONNX
from .quantizers import BLOCK, quantizer


def onnx_sizes(checkpoint: Path) -> dict[str, int]:
    """The size in bytes of the ONNX folder of every precision, within a percent: how the builder names things in its
    graph, and where a file is padded, is known once it is written."""
    config = load_config(checkpoint)
    tables = 2 * config.max_position_embeddings * rotated_size(config) // 2 * 4  # of the rotary positions
    others = sum(file.stat().st_size for file in checkpoint.glob("tokenizer*.json"))
    others += tables + DEPTH_ONNX * config.num_hidden_layers
    tensors = {name: header.shape for name, header in tensor_headers(checkpoint).items()}
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    found = {}
    for precision in ONNX_TYPES:
        found[precision] = others + sum(_onnx_bytes(name, shape, precision) for name, shape in tensors.items())
    return found


def _onnx_bytes(name: str, shape: tuple[int, ...], precision: str) -> int:
    """Bytes of a weight in a precision's graph."""
    known = ONNX_TYPES[precision]
    quantized = known.head if block_number(name) is None else known.blocks
    if quantized is None or len(shape) != 2 or shape[1] % BLOCK:
        return 4 * math.prod(shape)
    return shape[0] * _row_bytes(quantized, shape[1])


@cache
def _row_bytes(name: str, columns: int) -> int:
    """Bytes of a row in a quantizer's form: of one that it makes."""
    row = quantizer(name).quantize(np.ones((1, columns), np.float32), None)
    return sum(part.nbytes for part in (row.values, row.scales, row.zero_points) if part is not None)

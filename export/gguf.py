"""GGUF straight from safetensors: one tensor at a time, at its final type.

Memory is bounded by the largest tensor. Metadata is what llama.cpp's converter writes for the family, with every
per-block value adjusted to the blocks that were kept.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from ..core.errors import UserError
from ..core.stage import Progress
from ..modeling.families import family_of
from ..modeling.gguf_layout import Array
from ..modeling.load import load_config
from ..modeling.shape import AttentionShape, original_context, rope_settings, rotated_size, sliding_blocks
from ..modeling.types import ModelConfig
from ..runtime.artifact_types import GGUF_TYPES
from .gguf_source import GgufSource
from .gguf_vocab import read_tokenizer, vocabulary_kind, write_vocabulary
from .mixes import FILE_TYPES, MixedModel, tensor_type
from .quantize import quantize, row_bytes

TYPES = tuple(FILE_TYPES)
ROPES = ("default", "linear", "yarn", "llama3", "longrope")  # that can be written; a family takes some of them


@dataclass(frozen=True)
class WrittenGguf:
    """The files written."""

    type: str
    bytes: int
    bits_per_weight: float  # of the tensors; the vocabulary is not counted
    fallbacks: int  # matrices whose rows did not fit the type the mix gives them
    tensor_types: dict[str, str] = field(repr=False)


class Tensor(NamedTuple):
    """A tensor as it will be written."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def packed(self) -> tuple[int, ...]:
        """Its shape in bytes."""
        return (*self.shape[:-1], row_bytes(self.kind, self.shape[-1]))


def check_gguf(checkpoint: Path) -> None:
    """Raise `UserError` for what llama.cpp would run wrongly: tokenizers, weights, and configuration settings that its
    graph for the family does not implement."""
    config = load_config(checkpoint)
    vocabulary_kind(read_tokenizer(checkpoint), checkpoint)
    problem = next(_unlike_llamacpp(config), None)
    if problem:
        raise UserError(f"{checkpoint}: {problem}")
    GgufSource(checkpoint, config)  # names a weight that has no place in a GGUF


def _unlike_llamacpp(config: ModelConfig) -> Iterator[str]:
    """Settings of a configuration that llama.cpp's graph for its family does not implement."""
    family, name = family_of(config), config.model_type
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation not in family.activations:
        yield f"its MLP uses {activation}, llama.cpp's {name} graph {family.activations[0]}"
    if getattr(config, "attn_logit_softcapping", None):
        yield "its attention is soft-capped (attn_logit_softcapping), llama.cpp's is not"
    if getattr(config, "use_bidirectional_attention", None):
        yield "its attention is bidirectional (use_bidirectional_attention), llama.cpp's is causal"
    if family.gguf.windows == "blocks" and rope_settings(config, "sliding_attention")["rope_type"] != "default":
        yield "its sliding-window blocks use rope scaling, llama.cpp scales full-attention blocks only"
    rope = rope_settings(config)
    kind, turned = rope["rope_type"], rope.get("partial_rotary_factor", 1.0)
    if turned != 1 and not family.partial_rotary:
        yield f"it rotates {turned:g} of each head (partial_rotary_factor), llama.cpp all of it"
    if kind not in ROPES:
        yield f"rope scaling {kind!r} is not one of llama.cpp's ({', '.join(ROPES)})"
    elif kind not in family.gguf.ropes:
        yield f"llama.cpp does not support rope scaling {kind!r} for {name}"
    if kind == "yarn":
        yield from _unlike_yarn(rope)


def _unlike_yarn(rope: dict[str, Any]) -> Iterator[str]:
    usual = 0.1 * math.log(rope["factor"]) + 1 if rope["factor"] > 1 else 1.0
    theirs = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": usual, "truncate": 1.0}
    for name in (*theirs, "mscale", "mscale_all_dim"):
        found, value = rope.get(name), theirs.get(name)
        if found is not None and (value is None or not math.isclose(float(found), value, rel_tol=1e-6)):
            yield f"its yarn scaling has {name} {found}, llama.cpp's {'none' if value is None else f'{value:g}'}"


class Conversion:
    """The conversion of a checkpoint into GGUF files of one type (one of TYPES).

    `imatrix` holds, by llama.cpp tensor name, mean squared input activations (columns,). With `types` every tensor has
    the type given there, and `qtype` is only what the metadata says. Raises `UserError` for unsupported models.
    """

    def __init__(
        self,
        checkpoint: Path,
        qtype: str,
        *,
        imatrix: Mapping[str, Array] | None = None,
        types: Mapping[str, GGMLQuantizationType] | None = None,
        name: str | None = None,
        threads: int = 0,
        progress: Progress | None = None,
    ):
        if qtype not in FILE_TYPES:
            raise UserError(f"GGUF type {qtype!r} is not one of {', '.join(TYPES)}")
        if GGUF_TYPES[qtype].needs_importance and imatrix is None:
            raise UserError(f"GGUF type {qtype} needs an importance matrix; give one, or choose a type with more bits")
        check_gguf(checkpoint)
        self.checkpoint, self.qtype, self.imatrix, self.threads = checkpoint, qtype, imatrix, threads
        self.types = types
        self.config = load_config(checkpoint)
        self.name = name or checkpoint.name
        self.progress = progress or Progress()
        if context_length(self.config) < self.config.max_position_embeddings:
            self.progress.note(
                f"llama.cpp has no sliding window for {self.config.model_type}: in the GGUF its context is limited to "
                f"the window's {context_length(self.config)} tokens"
            )
        self.source = GgufSource(checkpoint, self.config)
        self.heads_only = False  # leave out the tensors' values: files whose size is asked for
        self.tensors = [Tensor(n, shape, self._type(n, shape)) for n, shape in self.source.shapes.items()]

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(math.prod(tensor.packed) for tensor in self.tensors)

    def info(self, file: Path) -> WrittenGguf:
        """The summary of `file`, which holds all tensors."""
        weights = sum(math.prod(shape) for _, shape, _ in self.tensors)
        fitting = [(n, kind, self._type(n, (*s[:-1], 256))) for n, s, kind in self.tensors if len(s) > 1]
        fallbacks = sum(kind != wanted for _, kind, wanted in fitting)
        kinds = {tensor.name: tensor.kind.name for tensor in self.tensors}
        return WrittenGguf(self.qtype, file.stat().st_size, 8 * self.bytes / weights, fallbacks, kinds)

    def _type(self, name: str, shape: tuple[int, ...]) -> GGMLQuantizationType:
        if self.types is not None:
            return self.types[name]
        return tensor_type(name, shape, self.qtype, mixed_model(self.config, self.imatrix is not None))

    def writer(self) -> GGUFWriter:
        """A writer with only the architecture's name."""
        return GGUFWriter(None, family_of(self.config).gguf.architecture)

    def described(self, config: ModelConfig, name: str) -> GGUFWriter:
        """A writer with all metadata of the model with this configuration, vocabulary included."""
        writer = self.writer()
        _write_metadata(writer, config, self.qtype, safe_name(name, self.checkpoint))
        write_vocabulary(writer, self.checkpoint, config.vocab_size)
        return writer

    def write(
        self,
        path: Path,
        writer: GGUFWriter,
        tensors: Sequence[Tensor],
        depth: int | None = None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Write one file: the writer's metadata, then the tensors one by one, as a model of `depth` blocks has them."""
        for tensor in tensors:
            size = math.prod(tensor.packed)
            writer.add_tensor_info(tensor.name, tensor.packed, np.dtype(np.uint8), size, tensor.kind)
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in () if self.heads_only else tensors:
                writer.write_tensor_data(self.packed(tensor, depth))
                advance()
        finally:
            writer.close()

    def packed(self, tensor: Tensor, depth: int | None = None) -> NDArray[np.uint8]:
        """A tensor's bytes in its type, in the shape `tensor.packed`; as a model of `depth` blocks has it."""
        values = self.source.read(tensor.name, depth).reshape(-1, tensor.shape[-1])
        rows = quantize(values, tensor.kind, (self.imatrix or {}).get(tensor.name), self.threads)
        return rows.reshape(tensor.packed)

    @contextmanager
    def disk_errors(self, out: Path) -> Iterator[None]:
        """Turn a full disk into `UserError`."""
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(f"the disk is full: {out} needs {self.bytes:,} bytes") from error
            raise


def write_gguf(
    checkpoint: Path,
    out: Path,
    qtype: str,
    *,
    imatrix: Mapping[str, Array] | None = None,
    types: Mapping[str, GGMLQuantizationType] | None = None,
    name: str | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> WrittenGguf:
    """Write a checkpoint folder as the one file `out`; the arguments are those of `Conversion`.

    The file appears only when complete; the same checkpoint gives the same bytes. Raises `UserError` for unsupported
    models and full disks.
    """
    job = Conversion(checkpoint, qtype, imatrix=imatrix, types=types, name=name, threads=threads, progress=progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        with job.disk_errors(out), job.progress.bar(f"GGUF {qtype}", len(job.tensors)) as advance:
            job.write(partial, job.described(job.config, job.name), job.tensors, advance=advance)
            os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return job.info(out)


def mixed_model(config: ModelConfig, importance: bool) -> MixedModel:
    """What llama-quantize's rules see of a model."""
    blocks, heads = config.num_hidden_layers, AttentionShape.of(config)
    rule = family_of(config).gguf.is_70b
    big = blocks == 80 and (rule == "always" or (rule == "grouped" and heads.heads != heads.kv_heads))
    return MixedModel(blocks, config.tie_word_embeddings, importance, heads.heads // heads.kv_heads, big)


def context_length(config: ModelConfig) -> int:
    """The longest text for which llama.cpp computes the same as the checkpoint.

    Where it has no sliding windows, that is one window, within which full attention is the same.
    """
    if family_of(config).gguf.windows == "blocks" or not any(sliding_blocks(config)):
        return config.max_position_embeddings
    return min(config.sliding_window, config.max_position_embeddings)


def safe_name(name: str, checkpoint: Path) -> str:
    """A safe name for the model: llama.cpp strips spaces after special tokens of models *named* Phi-3.

    A Phi-3 tokenizer needs that whatever the model is called; no other tokenizer may get it.
    """
    tokenizer = read_tokenizer(checkpoint)
    strips = any(entry.get("rstrip") and entry["content"] == "</s>" for entry in tokenizer.get("added_tokens", []))
    named = re.search(r"phi-?3", name, re.IGNORECASE) is not None
    if strips:
        return name if named else f"{name} (Phi-3)"
    return re.sub(r"(?i)(phi)-?(?=3)", r"\1 ", name)


def _write_metadata(writer: GGUFWriter, config: ModelConfig, qtype: str, name: str) -> None:
    rope, shape = rope_settings(config), AttentionShape.of(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[qtype][0])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(shape.size)
    writer.add_value_length(shape.size)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(rotated_size(config))
    _write_scaling(writer, config, rope)
    family = family_of(config)
    if family.gguf.windows == "one":
        writer.add_sliding_window(config.sliding_window or 0)  # 0: full attention
    if family.gguf.windows == "blocks":
        _write_windows(writer, config)
    if family.softcap and config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_scaling(writer: GGUFWriter, config: ModelConfig, rope: dict[str, Any]) -> None:
    kind, always = rope["rope_type"], family_of(config).gguf.original_context
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if kind == "longrope":
        original = original_context(config)
        scale = rope.get("factor") or config.max_position_embeddings / original
        if not always:
            writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        attention = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or attention)
    if always:
        writer.add_rope_scaling_orig_ctx_len(original_context(config))


def _write_windows(writer: GGUFWriter, config: ModelConfig) -> None:
    slides = sliding_blocks(config)
    if any(slides):  # llama.cpp ends the process at a window that no block uses
        writer.add_sliding_window(config.sliding_window)
        # Said block by block: after blocks went, the pattern no longer repeats.
        writer.add_sliding_window_pattern(slides)
        writer.add_rope_freq_base_swa(rope_settings(config, "sliding_attention")["rope_theta"])

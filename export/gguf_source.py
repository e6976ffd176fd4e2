"""A checkpoint's tensors as llama.cpp names, orders and expects them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
Array = NDArray[np.float32]


class Source:
    """A checkpoint's tensors under llama.cpp's names and in the order of its files, transformed as it expects them."""

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
        self.shapes |= {name: values.shape for name, values in self.extra.items()}
        self.shapes = dict(sorted(self.shapes.items(), key=lambda item: file_order(item[0])))

    def _check_whole(self, checkpoint: Path) -> None:
        """Every block must have the tensors that any block has."""
        parts = dict.fromkeys(name.split(".", 2)[2] for name in self.files if name.startswith("blk."))
        wanted = [f"blk.{i}.{part}" for i in range(self.config.num_hidden_layers) for part in parts]
        wanted += ["token_embd.weight", "output_norm.weight"]
        wanted += [] if self.config.tie_word_embeddings else ["output.weight"]
        missing = [name for name in wanted if name not in self.files]
        if missing:
            raise UserError(f"{checkpoint} lacks {len(missing)} weights, {missing[0]} (llama.cpp's name) among them")

    def read(self, name: str, depth: int | None = None) -> Array:
        """One tensor in float32, with llama.cpp's conventions for a model of `depth` blocks (all, if not given)."""
        if name in self.extra:
            return self.extra[name]
        from safetensors import safe_open

        file, original = self.files[name]
        with safe_open(file, framework="pt") as weights:
            values: Array = weights.get_tensor(original).float().numpy()
        return self._adapt(name, values, depth or self.config.num_hidden_layers)

    def _adapt(self, name: str, values: Array, depth: int) -> Array:
        config = self.config
        if config.model_type in ("llama", "mistral"):
            if name.split(".")[2:3] == ["attn_q"]:
                return _interleave(values, config.num_attention_heads)
            if name.split(".")[2:3] == ["attn_k"]:
                return _interleave(values, config.num_key_value_heads)
        if config.model_type == "gemma3_text" and name.endswith("_norm.weight"):
            values = values + 1.0  # Gemma's norm multiplies by 1 + weight
            if name.endswith("attn_q_norm.weight"):
                values = values * np.float32(_query_scale(config, depth))
        return values


def _tensors(file: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in sorted(weights.keys())}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}") from error


def block_of(name: str) -> int | None:
    """The block that a tensor of llama.cpp's name belongs to; None for embedding, final norm, output and rope."""
    return int(name.split(".")[1]) if name.startswith("blk.") else None


def file_order(name: str) -> tuple[int, int, str]:
    """Rope factors, embedding, blocks in order, final norm, output."""
    block = block_of(name)
    if block is not None:
        return 2, block, name
    return (0 if name.startswith("rope_") else 1 if name.startswith("token_embd") else 3), 0, name


def differing_tensors(config: Any, depths: Sequence[int]) -> list[str]:
    """Tensors that are not the same at every depth: Gemma-3's query norms, where one depth is 62 (`_query_scale`)."""
    if config.model_type != "gemma3_text" or len({_query_scale(config, depth) for depth in depths}) == 1:
        return []
    return [f"blk.{block}.attn_q_norm.weight" for block in range(config.num_hidden_layers)]


def _interleave(values: Array, heads: int) -> Array:
    """llama.cpp's llama rotates adjacent pairs, transformers the two halves of a head: reorder the output rows."""
    rows = values.shape[0]
    halves = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _query_scale(config: Any, depth: int) -> float:
    """llama.cpp scales attention by the head size, or for 62 blocks by the width per head; the model says otherwise.

    The difference goes into the query norm, so that a pruned model keeps the scale it was trained with.
    """
    theirs = config.hidden_size / config.num_attention_heads if depth == 62 else config.head_dim
    return math.sqrt(theirs / config.query_pre_attn_scalar)


def rope_settings(config: Any) -> dict[str, Any]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    return rope.get("full_attention", rope)


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope_factors(config: Any) -> dict[str, Array]:
    rope = rope_settings(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, head_size(config))}
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

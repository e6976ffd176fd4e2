"""Keys and values in 8 bits: an ONNX graph whose cache is int8, a quarter of float32's memory.

GroupQueryAttention rounds new keys (after the rotation) and values to integers, stores those and multiplies by the
scales as it reads them; ONNX Runtime's CPU kernel takes a constant scale per block, KV head and dimension. It attends
to rounded keys and values even where it has just been given the exact ones, so a text's logits do not depend on how it
was cut into passes.

The scale is the largest magnitude seen on calibration rows ÷ 127. The rotary embedding turns pairs of dimensions, the
slow ones by little within a short row, so both dimensions of a pair take the largest length of the pair: it is the
same at every position, and bounds both. Beyond the scale the kernel clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..core.errors import UserError
from ..runtime.onnx_engine import PREFILL_CHUNK, OnnxEngine

if TYPE_CHECKING:
    import onnx_ir as ir

HIGHEST = 127  # the kernel rounds to -128 … 127
LEAST = 1e-6  # a scale that divides by nothing, for a dimension that is always zero
_SCALE_INPUTS = {"k": 12, "v": 13}  # of GroupQueryAttention


@dataclass(frozen=True)
class CacheScales:
    """What one step of an integer is worth, (blocks, KV heads × head size) float32 each."""

    keys: np.ndarray
    values: np.ndarray

    def save(self, file: Path) -> None:
        from safetensors.numpy import save_file

        save_file({"keys": self.keys, "values": self.values}, file)

    @classmethod
    def load(cls, file: Path) -> Self:
        from safetensors.numpy import load_file

        return cls(**load_file(file))


def calibrate(
    folder: Path,
    rows: Sequence[Sequence[int]],
    turned: int,
    threads: int = 0,
    advance: Callable[[int], object] = lambda _: None,
) -> CacheScales:
    """Scales for an ONNX folder with a float cache, from the keys and values that it computes for `rows` of tokens.

    Of each head's dimensions the first `turned` are rotated. `advance` is called with the tokens of each row.
    `UserError` for keys or values that are no numbers.
    """
    most: list[np.ndarray] = []
    with OnnxEngine(folder, threads) as engine:
        for row in rows:
            past = None
            for start in range(0, len(row), PREFILL_CHUNK):
                _, past = engine.logits(row[start : start + PREFILL_CHUNK], past)
            assert past is not None, "rows are not empty"
            here = [_largest(cache[0], 0 if i % 2 else turned // 2) for i, cache in enumerate(past)]
            most = [np.maximum(a, b) for a, b in zip(most, here, strict=True)] if most else here
            advance(len(row))
    if not all(np.isfinite(each).all() for each in most):
        raise UserError(f"keys or values of {folder} are infinite or no numbers: the checkpoint is broken")
    scales = np.maximum(np.stack(most), LEAST).astype(np.float32) / np.float32(HIGHEST)
    # Contiguous: safetensors writes an array's memory, not its view.
    return CacheScales(np.ascontiguousarray(scales[0::2]), np.ascontiguousarray(scales[1::2]))


def _largest(cache: np.ndarray, pairs: int) -> np.ndarray:
    """The largest magnitude of each dimension (G·D,) of (G, T, D), of which `pairs` are turned with the next `pairs`:
    those have their common length instead."""
    sizes = np.abs(cache)
    if pairs:
        lengths = np.hypot(cache[..., :pairs], cache[..., pairs : 2 * pairs])
        sizes[..., :pairs] = sizes[..., pairs : 2 * pairs] = lengths
    return sizes.max(axis=1).reshape(-1)


def quantize_cache(model: ir.Model, scales: CacheScales) -> None:
    """Give a builder's graph an int8 cache, in place: its inputs past_key_values and outputs present change type."""
    import onnx_ir as ir

    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if len(attentions) != len(scales.keys):
        raise UserError(f"the graph has {len(attentions)} attentions for {len(scales.keys)} blocks' cache scales")
    for block, node in enumerate(attentions):
        given: list[Any] = list(node.inputs)
        node.resize_inputs(max(len(given), 14))
        for part, scale in (("k", scales.keys[block]), ("v", scales.values[block])):
            value = _scale(model, f"model.layers.{block}.attn.{part}_scale", scale)
            node.replace_input_with(_SCALE_INPUTS[part], value)
            node.attributes[f"{part}_quant_type"] = ir.AttrString(f"{part}_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            assert value is not None
            value.type = ir.TensorType(ir.DataType.INT8)


def _scale(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    import onnx_ir as ir

    tensor = ir.tensor(np.ascontiguousarray(array, np.float32), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value

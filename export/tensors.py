"""Reading exported weights back and comparing them, row by row, with the checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..modeling.load import load_config
from .gguf import Source

Array = NDArray[np.float32]
# Largest relative error of a row that honest rounding was seen to make, with room; by tensor type.
LIMITS = {
    "F32": 1e-6,
    "F16": 2e-3,
    "Q8_0": 0.03,
    "Q6_K": 0.08,
    "Q5_0": 0.15,
    "Q5_1": 0.15,
    "Q4_0": 0.35,
    "Q4_1": 0.35,
    "Q4_K": 0.35,
    "int8": 0.03,
    "int4": 0.35,
}


def row_error(found: Array, expected: Array) -> float:
    """max over rows of ‖found − expected‖ / ‖expected‖; rows far smaller than the rest count by the typical norm."""
    found, expected = (a.reshape(-1, a.shape[-1]).astype(np.float32) for a in (found, expected))
    if found.shape != expected.shape:
        return float("inf")
    norms = np.linalg.norm(expected, axis=1)
    floor = 0.05 * float(np.sqrt(np.mean(norms**2))) + 1e-12
    errors = np.linalg.norm(found - expected, axis=1) / np.maximum(norms, floor)
    return float("inf") if not np.isfinite(errors).all() else float(errors.max())


def gguf_errors(file: Path, checkpoint: Path) -> Iterator[tuple[str, str, float]]:
    """(tensor, its type, row error) of every tensor of a GGUF file against the checkpoint it was made from."""
    source = Source(checkpoint, load_config(checkpoint))
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, tensor.tensor_type.name, row_error(values, source.read(tensor.name))


def onnx_errors(folder: Path, checkpoint: Path) -> Iterator[tuple[str, str, float]]:
    """(tensor, its type, row error) of every weight matrix of an exported ONNX folder against the checkpoint."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(folder / "model.onnx")).graph  # with its external data
    values = {tensor.name: tensor for tensor in graph.initializer}
    weights = CheckpointMatrices(checkpoint)
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "MatMul") or node.input[1] not in values:
            continue
        expected = weights.named(node.name)
        if expected is None:
            continue
        if node.op_type == "MatMul":
            yield node.name, "F32", row_error(to_array(values[node.input[1]]).T, expected)
            continue
        attributes = {a.name: a.i for a in node.attribute}
        parts = [to_array(values[name]) if name else None for name in node.input[1:]]
        found = dequantize_nbits(parts, attributes["bits"], attributes["block_size"], attributes["K"])
        yield node.name, f"int{attributes['bits']}", row_error(found, expected)


def dequantize_nbits(parts: list[Any], bits: int, block: int, columns: int) -> Array:
    """The (N, K) matrix of a MatMulNBits node from [packed, scales, zero points or None]."""
    packed, scales, zeros = [*parts, None, None][:3]
    rows = packed.shape[0]

    def unpack(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if bits == 8:
            return data
        halves: Any = np.stack([data & 15, data >> 4], axis=-1)
        return halves.reshape(*data.shape[:-1], -1)

    values = unpack(packed).reshape(rows, -1, block).astype(np.float32)
    blocks = values.shape[1]
    if zeros is None:
        offset: Any = np.float32(1 << (bits - 1))
    else:
        offset = unpack(zeros.reshape(rows, -1))[:, :blocks, None].astype(np.float32)
    return ((values - offset) * scales.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :columns]


FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class CheckpointMatrices:
    """A checkpoint's linear layers by the names that the ONNX builder gives their nodes."""

    NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+?)(?:_proj)?/MatMul")

    def __init__(self, checkpoint: Path):
        from safetensors import safe_open

        self.tied = load_config(checkpoint).tie_word_embeddings
        self.where: dict[str, Path] = {}
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, framework="pt") as weights:
                self.where |= dict.fromkeys(weights.keys(), file)

    def named(self, node: str) -> Array | None:
        """The (N, K) matrix of a node, or None for a node of another kind."""
        if node.startswith("/lm_head/"):
            return self.read("model.embed_tokens.weight" if self.tied else "lm_head.weight")
        found = self.NODE.match(node)
        if found is None:
            return None
        number, kind, part = found.groups()
        stem = f"model.layers.{number}.{'self_attn' if kind == 'attn' else 'mlp'}"
        whole = f"{stem}.{part}_proj.weight"
        if whole in self.where:
            return self.read(whole)
        names = [f"{stem}.{piece}_proj.weight" for piece in FUSED.get(part, ())]
        if names and all(name in self.where for name in names):
            return np.concatenate([self.read(name) for name in names])
        return self._slice(stem, part)

    def _slice(self, stem: str, part: str) -> Array | None:
        """A part of a matrix that the checkpoint holds fused (Phi-3)."""
        fused = f"{stem}.gate_up_proj.weight"
        if part in ("gate", "up") and fused in self.where:
            return np.split(self.read(fused), 2)[part == "up"]
        return None

    def read(self, name: str) -> Array:
        from safetensors import safe_open

        with safe_open(self.where[name], framework="pt") as weights:
            return weights.get_tensor(name).float().numpy()

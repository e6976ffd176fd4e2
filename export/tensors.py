"""Reading exported weights back and comparing them, row by row, with the checkpoint's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ..modeling.families import BLOCKS, EMBEDDING, HEAD, family_of
from ..modeling.load import load_config
from ..modeling.weights import Tensors
from .gguf_source import GgufSource
from .quantizers import BLOCK, row_limits

if TYPE_CHECKING:
    import onnx

Array = NDArray[np.float32]
# Largest relative error of a row that may pass, by tensor type: 1.5 to 2 times what honest rounding made at most of a
# SmolLM2-135M. Where one weight rules a block of 32, the error is at most 0.022 of the row in 8 bits, 0.18 in Q5_0.
LIMITS = {
    "F32": 1e-6,
    "F16": 6e-4,
    "BF16": 0.004,
    "Q8_0": 0.025,
    "Q6_K": 0.09,
    "Q5_0": 0.2,
    "Q5_1": 0.2,
    "Q5_K": 0.15,
    "Q4_0": 0.35,
    "Q4_1": 0.3,
    "Q4_K": 0.25,
    "IQ4_NL": 0.25,
    "IQ4_XS": 0.25,
    "MXFP4": 0.35,
    "Q3_K": 0.4,
    "Q2_K": 0.7,
    "IQ3_S": 0.45,
    "IQ3_XXS": 0.55,
    "IQ2_S": 0.8,
    "IQ2_XS": 0.85,
    "IQ2_XXS": 0.95,
    "IQ1_M": 1.0,
    "IQ1_S": 1.1,
    "int2": 1.0,
    "int2/64": 1.0,
    "int2/128": 1.0,
    "int4/16": 0.25,
    "int4/64": 0.4,
    "int4/128": 0.45,
    "int4/256": 0.6,
    "int8/16": 0.02,
    "int8/64": 0.03,
    "int8/128": 0.035,
    "int8/256": 0.045,
} | row_limits()


def row_error(found: Array, expected: Array) -> float:
    """max over rows of ‖found − expected‖ / ‖expected‖; rows far smaller than the rest count by the typical norm."""
    found, expected = (a.reshape(-1, a.shape[-1]).astype(np.float32) for a in (found, expected))
    if found.shape != expected.shape:
        return float("inf")
    norms = np.linalg.norm(expected, axis=1)
    floor = 0.05 * float(np.sqrt(np.mean(norms**2))) + 1e-12
    errors = np.linalg.norm(found - expected, axis=1) / np.maximum(norms, floor)
    return float("inf") if not np.isfinite(errors).all() else float(errors.max())


def gguf_errors(file: Path, checkpoint: Path, depth: int | None = None) -> Iterator[tuple[str, str, float]]:
    """(tensor, its type, row error) of every tensor of a GGUF file against the checkpoint it was made from.

    `depth` is the file's number of blocks (default: all of the checkpoint's).
    """
    source = GgufSource(checkpoint, load_config(checkpoint))
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        yield tensor.name, tensor.tensor_type.name, row_error(values, source.read(tensor.name, depth))


def onnx_errors(folder: Path, checkpoint: Path) -> Iterator[tuple[str, str, float]]:
    """(tensor, its type, row error) of every weight of an exported ONNX folder against the checkpoint.

    A weight of the checkpoint that is missing from the graph has an infinite error, unless it is zero.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(folder / "model.onnx")).graph  # with its external data
    values = {tensor.name: tensor for tensor in graph.initializer}
    weights = CheckpointWeights(checkpoint)
    for node in graph.node:
        expected = weights.matrix(node.name) if node.op_type in MATRIX_OPERATORS else None
        if expected is None:
            continue
        if node.op_type in ("MatMul", "Gather"):
            table = node.input[node.op_type == "MatMul"]
            if table in values:  # a tied embedding is the head's matrix, turned as it is read
                found = to_array(values[table])
                yield node.name, "F32", row_error(found.T if node.op_type == "MatMul" else found, expected)
            continue
        attributes = {a.name: a.i for a in node.attribute}
        bits, block = attributes["bits"], attributes["block_size"]
        parts = [to_array(values[name]) if name else None for name in integer_parts(node)]
        found = dequantize_nbits(parts, bits, block, expected.shape[1])
        kind = f"int{bits}" if block == BLOCK else f"int{bits}/{block}"
        yield node.name, kind, row_error(found, expected)
    for name, tensor in values.items():
        expected = weights.vector(name)
        if expected is not None:
            yield name, "F32", row_error(to_array(tensor), expected)
    for name in weights.unseen():
        if weights.read(name).any():
            yield name, "F32", float("inf")


def integer_parts(node: onnx.NodeProto) -> list[str]:
    """The names of a node's packed integers, scales and zero points (empty if it has none)."""
    if node.op_type == "MatMulNBits":
        names = list(node.input[1:4])
    else:  # its values come through a Reshape
        bits = next(a.i for a in node.attribute if a.name == "bits")
        names = [node.input[2].removesuffix("_scales") + f"_Q{bits}", *node.input[2:4]]
    return [*names, ""][:3]


def dequantize_nbits(parts: list[Any], bits: int, block: int, columns: int) -> Array:
    """The (N, K) matrix of a MatMulNBits node from [packed, scales, zero points or None]."""
    packed, scales, zeros = [*parts, None, None][:3]
    rows = packed.shape[0]

    def unpack(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        parts: Any = np.stack([data >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)], axis=-1)
        return parts.reshape(*data.shape[:-1], -1)

    values = unpack(packed).reshape(rows, -1, block).astype(np.float32)
    blocks = values.shape[1]
    if zeros is None:
        offset: Any = np.float32(1 << (bits - 1))
    else:
        offset = unpack(zeros.reshape(rows, -1))[:, :blocks, None].astype(np.float32)
    return ((values - offset) * scales.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :columns]


MATRIX_OPERATORS = ("MatMul", "MatMulNBits", "Gather", "GatherBlockQuantized")


class CheckpointWeights:
    """A checkpoint's weights under the ONNX builder's node and tensor names."""

    MATRIX = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/(\w+?)(?:_proj)?/MatMul")
    BIAS = re.compile(r"model\.layers\.(\d+)\.(attn|mlp)\.(\w+?)(?:_proj)?\.Add\.bias")
    NORM = re.compile(r"(model\.layers\.\d+)\.(?:attn\.)?(\w+?)(?:\.layernorm)?\.weight")

    def __init__(self, checkpoint: Path):
        config = load_config(checkpoint)
        self.tied = config.tie_word_embeddings
        family = family_of(config)
        self.norm_offset, self.block = np.float32(family.norm_offset), family.block
        self.where = Tensors(checkpoint)
        self.seen: set[str] = set()

    def matrix(self, node: str) -> Array | None:
        """The (N, K) matrix of a node, or None if it has none."""
        return self._joined(self.places(node))

    def places(self, node: str) -> list[tuple[str, slice]]:
        """The rows of the checkpoint's matrices that make up a node's (N, K) matrix, in order; none if it has none."""
        if node.startswith("/lm_head/"):
            return [self._whole(EMBEDDING if self.tied else HEAD)]
        if node == "/model/embed_tokens/Gather":
            return [self._whole(EMBEDDING)]
        found = self.MATRIX.fullmatch(node)
        return self._projection(found, "weight") if found else []

    def rows(self, name: str) -> int:
        """How many rows one of the checkpoint's weights has."""
        return self.where.headers[name].shape[0]

    def vector(self, name: str) -> Array | None:
        """The bias or norm of an initializer, or None if it is neither."""
        if found := self.BIAS.fullmatch(name):
            return self._joined(self._projection(found, "bias"))
        if found := self.NORM.fullmatch(name):
            stem, part = found.groups()
            if part in ("q_norm", "k_norm") and self.block.qk_norms:
                part = self.block.qk_norms[part == "k_norm"]
            whole = f"{stem}.{part}.weight"
            return self.read("model.norm.weight" if part == "final_norm_layernorm" else whole) + self.norm_offset
        return None

    def unseen(self) -> list[str]:
        """Weights that were never requested."""
        tied = {HEAD} if self.tied else set()
        return sorted(set(self.where) - self.seen - tied)

    def _projection(self, found: re.Match[str], suffix: str) -> list[tuple[str, slice]]:
        """One name of the builder's may stand for several of the checkpoint's matrices, or half of one."""
        number, _, part = found.groups()
        qkv, mlp_in = self.block.qkv, self.block.mlp_in
        wanted = {"qkv": qkv, "gate_up": mlp_in, "o": (self.block.attention_out,), "down": (self.block.mlp_out,)}
        wanted |= {piece: (name,) for piece, name in zip("qkv", qkv, strict=False) if len(qkv) == 3}
        wanted |= {"gate": mlp_in[:1], "up": mlp_in[-1:]}
        names = [f"{BLOCKS}.{number}.{name}.{suffix}" for name in wanted.get(part, ())]
        if not names or not all(name in self.where for name in names):
            return []
        if part in ("gate", "up") and len(mlp_in) == 1:
            count, half = self.rows(names[0]), self.rows(names[0]) // 2
            return [(names[0], slice(half, count) if part == "up" else slice(0, half))]
        return [self._whole(name) for name in names]

    def _whole(self, name: str) -> tuple[str, slice]:
        return name, slice(0, self.rows(name))

    def _joined(self, places: list[tuple[str, slice]]) -> Array | None:
        parts = [self.read(name)[rows] for name, rows in places]
        return np.concatenate(parts) if len(parts) > 1 else next(iter(parts), None)

    def read(self, name: str) -> Array:
        self.seen.add(name)
        return self.where[name].float().numpy()

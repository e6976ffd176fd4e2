"""Edits of a builder's graph: its matrices of weights, and integer ones (N, K) in their place, for the operators ONNX
Runtime computes them with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from .quantizers import Quantized

EMBEDDING_NODE = "/model/embed_tokens/Gather"
HEAD_NODE = "/lm_head/MatMul"


@dataclass(frozen=True)
class GraphMatrix:
    """A matrix of weights (N, K) in a graph and the nodes that read it: a product or a lookup of rows; both where the
    embedding is tied to the head."""

    product: Any = None  # a MatMul node
    lookup: Any = None  # a Gather node

    @property
    def name(self) -> str:
        """Of the node; of a tied embedding the head's."""
        return str((self.product or self.lookup).name)

    @property
    def weight(self) -> Any:
        """The graph's value: (K, N) if a product reads it, else (N, K)."""
        return self.product.inputs[1] if self.product is not None else self.lookup.inputs[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        first, second = self.weight.const_value.shape
        return (int(second), int(first)) if self.product is not None else (int(first), int(second))

    def read(self) -> np.ndarray:
        """(N, K) float32."""
        values = self.weight.const_value.numpy()
        return np.ascontiguousarray(values.T if self.product is not None else values)


def graph_matrices(model: ir.Model) -> list[GraphMatrix]:
    """The embedding first, unless it is tied to the head, then the matrices of products in graph order."""
    nodes: list[Any] = list(model.graph)  # onnx-ir's optional fields are all set in the builder's graphs
    (lookup,) = (node for node in nodes if node.name == EMBEDDING_NODE)
    turned = lookup.inputs[0].producer()
    tied = None if turned is None else turned.inputs[0]  # the head's weights, turned as they are read
    found = [] if tied is not None else [GraphMatrix(lookup=lookup)]
    for node in nodes:
        if node.op_type == "MatMul" and node.inputs[1] is not None:
            weight = node.inputs[1].const_value
            if weight is not None and len(weight.shape) == 2:
                found.append(GraphMatrix(node, lookup if node.inputs[1] is tied else None))
    return found


def replace_matrix(model: ir.Model, matrix: GraphMatrix, quantized: Quantized) -> None:
    """Let the nodes of a matrix compute with integers; its float weights are removed."""
    weight = matrix.weight
    parts = _initializers(model, weight.name, quantized)
    if matrix.lookup is not None:
        _replace_lookup(model, matrix.lookup, parts, quantized)
    if matrix.product is not None:
        _replace_product(model, matrix.product, parts, quantized)
    model.graph.initializers.pop(str(weight.name))


def _replace_product(model: ir.Model, node: Any, parts: Sequence[Any], quantized: Quantized) -> None:
    count, blocks = quantized.scales.shape
    settings = {
        "K": blocks * quantized.block,
        "N": count,
        "bits": quantized.bits,
        "block_size": quantized.block,
        # The kernel computes with activations rounded to 8 bits, the fast way on a CPU.
        "accuracy_level": 4,
    }
    new = ir.node("MatMulNBits", [node.inputs[0], *parts], settings, domain="com.microsoft", name=node.name)
    _replace(model, node, new)


def _replace_lookup(model: ir.Model, node: Any, parts: Sequence[Any], quantized: Quantized) -> None:
    values, *others = parts
    # A constant node, because ONNX Runtime reads no shape from the external weights file.
    shape = ir.tensor(np.asarray([quantized.scales.shape[0], -1], np.int64))
    constant = ir.node("Constant", [], {"value": shape}, name=f"{node.name}/Shape")
    flat = ir.node("Reshape", [values, constant.outputs[0]], name=f"{node.name}/Reshape")
    for new in (constant, flat):
        new.outputs[0].name = f"{new.name}/output_0"
        model.graph.insert_before(node, new)
    settings = {"bits": quantized.bits, "block_size": quantized.block, "gather_axis": 0, "quantize_axis": 1}
    inputs = [flat.outputs[0], node.inputs[1], *others]
    turned = node.inputs[0].producer()
    _replace(model, node, ir.node("GatherBlockQuantized", inputs, settings, domain="com.microsoft", name=node.name))
    if turned is not None:
        model.graph.remove(turned, safe=True)


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    out, made = old.outputs[0], new.outputs[0]
    made.type, made.shape = out.type, out.shape
    model.graph.insert_before(old, new)
    out.replace_all_uses_with(made, replace_graph_outputs=True)
    name = out.name
    model.graph.remove(old, safe=True)
    made.name = name


def _initializers(model: ir.Model, name: str, quantized: Quantized) -> list[Any]:
    """Values, scales and zero points if any, as initializers."""
    parts = [(f"{name}_Q{quantized.bits}", quantized.values), (f"{name}_scales", quantized.scales)]
    if quantized.zero_points is not None:
        parts.append((f"{name}_zero_points", quantized.zero_points))
    return [_initializer(model, part, array) for part, array in parts]


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> Any:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value

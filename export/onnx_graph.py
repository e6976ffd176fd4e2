"""Putting integer weights into an ONNX graph (onnx-ir), for the operators ONNX Runtime computes them with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from .quantizers import BLOCK, Quantized, Quantizer


def weight_matmuls(model: ir.Model) -> list[Any]:
    """The MatMul nodes that multiply by a matrix of weights (K, N) whose K divides into blocks, in graph order."""
    found = []
    nodes: list[Any] = list(model.graph)  # onnx-ir's optional fields are all set in the builder's graphs
    for node in nodes:
        if node.op_type == "MatMul" and node.inputs[1] is not None:
            weight = node.inputs[1].const_value
            if weight is not None and len(weight.shape) == 2 and weight.shape[0] % BLOCK == 0:
                found.append(node)
    return found


def replace_matmul(model: ir.Model, node: ir.Node, quantized: Quantized) -> None:
    """Replace a MatMul by MatMulNBits; remove the weights if nothing else reads them."""
    weight: Any = node.inputs[1]
    count, blocks = quantized.scales.shape
    inputs = [node.inputs[0], *_initializers(model, weight.name, quantized)]
    _replace(
        model,
        node,
        ir.node(
            "MatMulNBits",
            inputs,
            # accuracy_level 4: the kernel computes with activations rounded to 8 bits, the fast way on a CPU.
            {"K": blocks * BLOCK, "N": count, "bits": quantized.bits, "block_size": BLOCK, "accuracy_level": 4},
            domain="com.microsoft",
            name=node.name,
        ),
    )
    _drop_unused(model, weight)


def replace_embedding(model: ir.Model, head: ir.Value, quantized: Quantized, quantizer: Quantizer) -> None:
    """Let the embedding look up integer rows: those of the head (`head` is its weight) if tied, else its own."""
    nodes: list[Any] = list(model.graph)
    for node in nodes:
        if node.op_type != "Gather":
            continue
        producer = node.inputs[0].producer()
        tied = producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is head
        table = node.inputs[0]
        if not tied and (table.const_value is None or len(table.const_value.shape) != 2):
            continue
        if tied:
            rows, name = quantized, str(head.name)
        else:
            if table.const_value.shape[1] % BLOCK:
                continue
            rows, name = quantizer.quantize(table.const_value.numpy(), None), table.name
        values, scales = _initializers(model, name, rows)
        # A constant node, because ONNX Runtime reads no shape from the external weights file.
        shape = ir.tensor(np.asarray([rows.scales.shape[0], -1], np.int64))
        constant = ir.node("Constant", [], {"value": shape}, name=f"{node.name}/Shape")
        flat = ir.node("Reshape", [values, constant.outputs[0]], name=f"{node.name}/Reshape")
        for new in (constant, flat):
            new.outputs[0].name = f"{new.name}/output_0"
            model.graph.insert_before(node, new)
        settings = {"bits": rows.bits, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
        lookup = [flat.outputs[0], node.inputs[1], scales]
        new = ir.node("GatherBlockQuantized", lookup, settings, domain="com.microsoft", name=node.name)
        _replace(model, node, new)
        if tied:
            model.graph.remove(table.producer(), safe=True)
        else:
            _drop_unused(model, table)


def _replace(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    out, made = old.outputs[0], new.outputs[0]
    made.type, made.shape = out.type, out.shape
    model.graph.insert_before(old, new)
    out.replace_all_uses_with(made, replace_graph_outputs=True)
    name = out.name
    model.graph.remove(old, safe=True)
    made.name = name


def _initializers(model: ir.Model, name: str, quantized: Quantized) -> list[Any]:
    """Values, scales and zero points if any, as initializers; existing ones (a tied head's) are reused."""
    parts = [(f"{name}_Q{quantized.bits}", quantized.values), (f"{name}_scales", quantized.scales)]
    if quantized.zero_points is not None:
        parts.append((f"{name}_zero_points", quantized.zero_points))
    return [_initializer(model, part, array) for part, array in parts]


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> Any:
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _drop_unused(model: ir.Model, value: ir.Value) -> None:
    if not value.uses():
        model.graph.initializers.pop(str(value.name), None)

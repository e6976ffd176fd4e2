"""Retaining heads in an ONNX graph: an output `retaining_scores.N` (batch, tokens, KV heads) float32 for each block.

They read the projections' outputs, biases added, before any norm and before rotary positions, which
GroupQueryAttention applies itself. The builder packs q, k and v into one matrix where it can; families with norms of q
and k split its product again, and separate projections are concatenated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core.errors import UserError
from ..modeling.load import load_config
from ..modeling.retaining import RetainingHead, RetainingHeads, has_heads, load_heads

SCORES = "retaining_scores"  # an output's name up to its block's number
_PREFIX = "retaining.blocks."  # the heads' weights


def add_heads(model: ir.Model, heads: RetainingHeads) -> None:
    """Add the heads of all blocks to a builder's graph, in place. `UserError` for a graph with another structure."""
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    if len(attentions) != len(heads.blocks):
        raise UserError(f"the graph has {len(attentions)} attentions for {len(heads.blocks)} retaining heads")
    for number, attention in enumerate(attentions):
        stem = f"/model/layers.{number}/retaining"
        value = _projected(model, attention, stem)
        head: Any = heads.blocks[number]
        inner = _add(model, attention, "MatMul", [value, _weight(model, number, "w1", head)], f"{stem}/w1")
        gate = _add(model, attention, "Sigmoid", [inner], f"{stem}/silu")
        inner = _add(model, attention, "Mul", [inner, gate], f"{stem}/silu")
        scores = _add(model, attention, "MatMul", [inner, _weight(model, number, "w2", head)], f"{stem}/w2")
        scores.name = f"{SCORES}.{number}"
        scores.type = ir.TensorType(ir.DataType.FLOAT)
        scores.shape = ir.Shape(["batch_size", "sequence_length", head.w2.out_features])
        model.graph.outputs.append(scores)


def check_heads(folder: Path, checkpoint: Path) -> None:
    """`UserError` unless the heads in an exported folder of all blocks are those of its checkpoint, to the bit."""
    import onnx
    from onnx.numpy_helper import to_array

    if not has_heads(checkpoint):
        return
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    there = {tensor.name: tensor for tensor in graph.initializer if is_head(tensor.name)}
    for name, value in load_heads(checkpoint, load_config(checkpoint)).state_dict().items():
        tensor = there.get(f"retaining.{name}")
        if tensor is None or not np.array_equal(to_array(tensor, str(folder)).T, value.numpy()):
            raise UserError(f"{folder}: retaining head {name} differs from the checkpoint's: it was written wrongly")


def head_bytes(places: Mapping[str, tuple[Any, ...]]) -> int:
    """The bytes of the heads in a weights file; `places` as returned by `weights_read`."""
    return sum(place[2] for name, place in places.items() if is_head(name))


def is_head(name: str) -> bool:
    """Whether an initializer belongs to a head."""
    return name.startswith(_PREFIX)


def _projected(model: ir.Model, attention: ir.Node, stem: str) -> Any:
    """The graph value with q, k and v (batch, tokens, I) as output by the projections."""
    inputs: Any = attention.inputs
    query, key, values = inputs[:3]
    if key is None:
        return query
    maker = values.producer()
    if maker is not None and maker.op_type == "Split":  # packed, then split for the norms of q and k
        return maker.inputs[0]
    return _add(model, attention, "Concat", [_before_norm(query), _before_norm(key), values], stem, axis=-1)


def _before_norm(value: ir.Value) -> Any:
    """The projection output from which an attention's q or k comes, before a Reshape, a norm and another Reshape."""
    maker: Any = value.producer()
    while maker is not None and maker.op_type in ("Reshape", "SimplifiedLayerNormalization"):
        value = maker.inputs[0]
        maker = value.producer()
    return value


def _weight(model: ir.Model, block: int, part: str, head: RetainingHead) -> Any:
    """A matrix of a head as an initializer (inputs, outputs)."""
    name = f"{_PREFIX}{block}.{part}.weight"
    array = getattr(head, part).weight.detach().float().numpy().T.copy()
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _add(model: ir.Model, before: ir.Node, operator: str, inputs: list[Any], stem: str, **attributes: Any) -> Any:
    node = ir.node(operator, inputs, attributes or None, name=f"{stem}/{operator}")
    node.outputs[0].name = f"{stem}/{operator}/output_0"
    model.graph.insert_before(before, node)
    return node.outputs[0]

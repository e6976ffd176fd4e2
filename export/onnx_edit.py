"""From the builder's float32 graph to the one that is delivered: positions, cache, integers, retaining heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.stage import Progress
from ..modeling.load import load_config
from ..modeling.retaining import has_heads, load_heads
from ..runtime.artifact_types import ONNX_TYPES
from ..runtime.onnx_engine import WEIGHTS
from .grids import FLOAT, Grid, round_to
from .onnx_depths import GRAPH
from .onnx_kv import CacheScales, quantize_cache
from .onnx_retaining import add_heads, is_head
from .quantizers import BLOCK, Quantized, quantizer

if TYPE_CHECKING:
    import onnx_ir as ir

    from .onnx_graph import GraphMatrix

Rounding = Callable[["GraphMatrix"], Quantized | None]  # None: the matrix stays as it is
# The builder's name of a projection -> llama.cpp's name of a tensor that reads the same input (for the importance).
_IMPORTANCE = {
    "attn/qkv_proj": "attn_q",
    "attn/q_proj": "attn_q",
    "attn/k_proj": "attn_k",
    "attn/v_proj": "attn_v",
    "attn/o_proj": "attn_output",
    "mlp/gate_up_proj": "ffn_up",
    "mlp/gate_proj": "ffn_gate",
    "mlp/up_proj": "ffn_up",
    "mlp/down_proj": "ffn_down",
}


def edited_graph(
    checkpoint: Path,
    built: Path,
    rounding: Rounding | None = None,
    *,
    kv: CacheScales | None = None,
    label: str = "",
    progress: Progress | None = None,
) -> ir.Model:
    """The graph in `built`, its matrices rounded, its cache int8 with `kv`, with the checkpoint's retaining heads.

    `rounding` is asked for every matrix; without it all stay as they are.
    """
    import onnx_ir as ir

    from .onnx_graph import graph_matrices, replace_matrix

    model = ir.load(built / GRAPH)
    # The builder stamps the git commit of whatever repository its package lies in.
    model.producer_version = version("onnxruntime-genai")
    _add_position_ids(model)
    if kv is not None:
        quantize_cache(model, kv)
    if rounding is not None:
        matrices = graph_matrices(model)
        with (progress or Progress()).bar(f"onnx {label}", len(matrices)) as advance:
            for matrix in matrices:
                name, quantized = matrix.name, rounding(matrix)
                if quantized is not None:
                    replace_matrix(model, matrix, quantized)
                advance(note=name.strip("/"))
        model.graph.sort()
    if has_heads(checkpoint):  # after quantization: their weights stay float32
        add_heads(model, load_heads(checkpoint, load_config(checkpoint)))
    return model


def _add_position_ids(model: ir.Model) -> None:
    """Wire a `position_ids` input (batch, tokens) to every attention, which otherwise counts positions itself.

    The rotary embedding then uses the given positions: a cache from which entries were dropped stays usable.
    """
    import onnx_ir as ir

    inputs = {value.name: value for value in model.graph.inputs}
    if "position_ids" in inputs:
        return
    positions = ir.Value(
        name="position_ids",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(["batch_size", "sequence_length"]),
    )
    model.graph.inputs.insert(2, positions)
    for node in model.graph:
        if node.op_type == "GroupQueryAttention":
            node.replace_input_with(9, positions)


def plain_rounding(precision: str, imatrix: Mapping[str, np.ndarray]) -> Rounding | None:
    """What a precision's quantizers make of each matrix; `imatrix` is by llama.cpp's names. None: nothing."""
    kind = ONNX_TYPES[precision]
    if kind.blocks is None and kind.head is None:
        return None

    def rounding(matrix: GraphMatrix) -> Quantized | None:
        name = kind.blocks if "/layers." in matrix.name else kind.head
        if name is None or matrix.shape[1] % BLOCK:
            return None
        return quantizer(name).quantize(matrix.read(), node_importance(matrix.name, imatrix))

    return rounding


def grid_rounding(grids: Mapping[str, Grid], importance: Mapping[str, np.ndarray]) -> Rounding:
    """Every matrix on a grid of its own; both are by the names of nodes."""

    def rounding(matrix: GraphMatrix) -> Quantized | None:
        grid = grids[matrix.name]
        return None if grid == FLOAT else round_to(grid, matrix.read(), importance[matrix.name])

    return rounding


def node_importance(node: str, imatrix: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Mean squared activations of what a node's matrix reads."""
    match = re.fullmatch(r"/model/layers\.(\d+)/(.+)/MatMul", node)
    if not match or match[2] not in _IMPORTANCE:
        return None
    return imatrix.get(f"blk.{match[1]}.{_IMPORTANCE[match[2]]}.weight")


@dataclass(frozen=True)
class PlannedBytes:
    """What a graph and its weights take once they are written."""

    graph: int
    weights: int  # of the file beside it
    heads: int  # of these, the retaining heads


def planned_bytes(model: ir.Model) -> PlannedBytes:
    """The bytes of an edited graph, as `save_graph` writes it; its weights are not read, and gone afterwards."""
    import onnx_ir as ir

    offset = heads = 0
    for name, value in model.graph.initializers.items():
        tensor: Any = value.const_value
        value.const_value = ir.ExternalTensor(
            WEIGHTS, offset, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name
        )
        offset += tensor.nbytes
        heads += tensor.nbytes if is_head(name) else 0
    return PlannedBytes(ir.to_proto(model).ByteSize(), offset, heads)


def save_graph(model: ir.Model, folder: Path) -> None:
    """Write a graph and beside it all its weights, one behind the other."""
    import onnx_ir as ir

    ir.save(model, folder / GRAPH, external_data=WEIGHTS, size_threshold_bytes=0)

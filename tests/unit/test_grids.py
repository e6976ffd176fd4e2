"""Rounding to the grids of ONNX files against trying everything, and the kernels against plain arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from compress.export.grids import FLOAT, GRIDS, Grid, round_to
from compress.export.onnx_graph import graph_matrices, replace_matrix
from compress.export.tensors import dequantize_nbits

INTEGERS = [grid for grid in GRIDS if grid != FLOAT]
by_name = pytest.mark.parametrize("grid", INTEGERS, ids=lambda grid: grid.name)


def tried(block: np.ndarray, weights: np.ndarray, grid: Grid) -> float:
    """The least weighted error over a fine range of scales and all zero points."""
    top, half = (1 << grid.bits) - 1, 1 << (grid.bits - 1)
    reach = block.max() - min(block.min(), 0) if grid.zeros else np.abs(block).max()
    least = np.inf
    for zero in range(top + 1) if grid.zeros else (half,):
        for scale in reach / top * np.linspace(0.3, 2.2, 120):
            for step in (scale, -scale):
                codes = np.clip(np.round(block / step) + zero, 0, top)
                least = min(least, float(weights @ ((codes - zero) * step - block) ** 2))
    return least


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_rounding_is_nearly_the_best_there_is(bits, zeros):
    draw = np.random.default_rng(bits)
    grid, weight = Grid(bits, 16, zeros), draw.standard_t(6, (12, 16)).astype(np.float32)
    found = round_to(grid, weight).dequantize()
    # Large weights count more.
    weights = np.sqrt((weight**2).mean(1, keepdims=True) + weight**2)
    ours = (weights * (found - weight) ** 2).sum(1)
    best = np.array([tried(row, each, grid) for row, each in zip(weight, weights, strict=True)])
    assert (ours > 0.97 * best).all() and ours.sum() < 1.2 * best.sum()


@by_name
def test_errors_fall_with_the_columns_that_count(grid):
    draw = np.random.default_rng(4)
    weight = draw.standard_t(5, (8, 512)).astype(np.float32)
    importance = draw.lognormal(0, 1.5, 512).astype(np.float32)
    plain, weighted = (round_to(grid, weight, given).dequantize() for given in (None, importance))
    errors = [float(((found - weight) ** 2 @ importance).sum()) for found in (plain, weighted)]
    assert errors[1] < errors[0] if grid.bits < 8 else errors[1] <= errors[0]


@by_name
def test_bytes_are_known_beforehand(grid):
    made = round_to(grid, np.random.default_rng(1).standard_normal((6, 768)).astype(np.float32))
    empty = grid.empty(6, 768)
    for part in ("values", "scales", "zero_points"):
        ours, theirs = getattr(made, part), getattr(empty, part)
        assert (ours is None) == (theirs is None) == (part == "zero_points" and not grid.zeros)
        assert ours is None or (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert made.nbytes == empty.nbytes == 6 * grid.row_bytes(768) and made.block == grid.block


def tied_graph(weight: np.ndarray) -> ir.Model:
    """y = x · weightᵀ and rows = weight[ids], as a builder's graph has a tied head and embedding."""
    count, columns = weight.shape
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, columns]))
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([None]))
    table = ir.Value(name="w", const_value=ir.tensor(np.ascontiguousarray(weight.T), name="w"))
    turn = ir.node("Transpose", [table], {"perm": [1, 0]}, name="turn")
    look = ir.node("Gather", [turn.outputs[0], ids], name="/model/embed_tokens/Gather")
    product = ir.node("MatMul", [x, table], name="/lm_head/MatMul")
    for node, name in ((turn, "turned"), (look, "rows"), (product, "y")):
        node.outputs[0].name = name
    for node, width in ((look, columns), (product, count)):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, width])
    outputs = [product.outputs[0], look.outputs[0]]
    graph = ir.Graph([x, ids], outputs, nodes=[turn, look, product], initializers=[table], name="g",
                     opset_imports={"": 21, "com.microsoft": 1})  # fmt: skip
    return ir.Model(graph, ir_version=10)


@by_name
def test_the_runtime_computes_with_the_values_that_come_back(grid, tmp_path: Path):
    """Rows of the identity are rounded without error, so that products with them are the weights themselves."""
    weight = np.random.default_rng(2).standard_normal((40, 256)).astype(np.float32)
    made = round_to(grid, weight)
    model = tied_graph(weight)
    (matrix,) = graph_matrices(model)
    np.testing.assert_array_equal(matrix.read(), weight)
    replace_matrix(model, matrix, made)
    assert {node.op_type for node in model.graph} == {"Constant", "Reshape", "GatherBlockQuantized", "MatMulNBits"}
    ir.save(model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    ids = np.array([39, 0, 17], np.int64)
    y, rows = session.run(None, {"x": np.eye(256, dtype=np.float32), "ids": ids})
    parts = [made.values, made.scales, made.zero_points]
    expected = dequantize_nbits(parts, grid.bits, grid.block, 256)
    np.testing.assert_allclose(np.asarray(y).T, expected, atol=2e-6)
    np.testing.assert_allclose(np.asarray(rows), expected[ids], atol=2e-6)
    np.testing.assert_array_equal(made.dequantize(), expected)

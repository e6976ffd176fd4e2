"""ONNX folders of a size: the grids that ONNX Runtime computes with.

One choice is made for all matrices of the graph that hold rows of one matrix of the checkpoint (Phi-3's gates), and for
all of the checkpoint's that are one in the graph (packed queries, keys and values).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..modeling.geometry import geometry_of
from ..modeling.load import load_config
from ..runtime.artifact_types import ONNX_TYPES
from .damage import Array, Candidates
from .grids import FLOAT, GRIDS, Grid, round_to
from .onnx import copy_companions
from .onnx_depths import GRAPH, companions
from .onnx_edit import PlannedBytes, edited_graph, node_importance, planned_bytes
from .onnx_kv import CacheScales
from .onnx_sizes import row_bytes
from .quantizers import Quantized
from .sensitivity import Sensitivity, Term
from .sized import Chosen, Sizes
from .tensors import CheckpointWeights

if TYPE_CHECKING:
    from .onnx_graph import GraphMatrix

V = TypeVar("V")


class OnnxSizes(Sizes[Grid]):
    """What sizes a checkpoint's ONNX folder can have, and what is in it at each.

    `built` is the folder with its float32 graph (`build_graph`), `kv` whether keys and values are to be int8. With
    several depths a size is that of all that the deepest reads.
    """

    form = "onnx"
    precise = FLOAT

    def __init__(self, checkpoint: Path, built: Path, *, kv: bool = False):
        import onnx_ir as ir

        from .onnx_graph import graph_matrices

        self.built = built
        self.weights = CheckpointWeights(checkpoint)
        self.nodes: dict[str, list[str]] = {}  # of each choice, by its first
        shapes: dict[str, tuple[int, int]] = {}
        first: dict[str, str] = {}  # node of a matrix of the checkpoint
        for matrix in graph_matrices(ir.load(built / GRAPH)):
            node = matrix.name
            name = first.setdefault(self.weights.places(node)[0][0], node)
            self.nodes.setdefault(name, []).append(node)
            rows, columns = matrix.shape
            shapes[name] = (rows + shapes.get(name, (0, 0))[0], columns)
        super().__init__(checkpoint, shapes)
        shape = geometry_of(load_config(checkpoint).to_dict())
        ones = np.ones((shape.blocks, shape.kv_heads * shape.head_size), np.float32)
        self.kv = CacheScales(ones, ones) if kv else None

    def kinds(self, columns: int, least: float = 0.0) -> list[Grid]:
        return [grid for grid in GRIDS if grid.fits(columns) and 8 * grid.row_bytes(columns) >= least * columns]

    def stored(self, shape: Sequence[int], kind: Grid) -> int:
        return shape[0] * kind.row_bytes(shape[1])

    def bytes(self, types: Mapping[str, Grid]) -> int:
        planned = self._planned(types)
        return planned.graph + planned.weights + self._companions

    def weight_bytes(self, types: Mapping[str, Grid]) -> int:
        planned = self._planned(types)
        return planned.weights - planned.heads

    def like(self, types: Mapping[str, Grid]) -> str:
        size = sum(self.stored(shape, types[name]) for name, shape in self.shapes.items())
        plain = {kind: self._plain(kind) for kind in ONNX_TYPES}
        below = {kind: found for kind, found in plain.items() if found <= size}
        return max(below, key=lambda kind: below[kind]) if below else min(plain, key=lambda kind: plain[kind])

    def importance(self, sensitivity: Sensitivity, imatrix: Mapping[str, Array]) -> dict[str, Array]:
        found = {}
        for name in self.shapes:
            known = node_importance(name, imatrix)
            parts = [sensitivity.importance(tensor) for tensor, _ in self._places(name)] if known is None else [known]
            found[name] = np.stack(parts).sum(0)
        return found

    def candidates(
        self, sensitivity: Sensitivity, importance: Mapping[str, Array], least: float
    ) -> Mapping[str, Candidates[Grid]]:
        found = {}
        for name, shape in self.shapes.items():
            sizes = {grid: self.stored(shape, grid) for grid in self.kinds(shape[1], least)}
            terms, read = self._terms(name, sensitivity), partial(self._read, name)
            found[name] = Candidates(sizes, terms, read, partial(_rounded, importance[name]))
        return found

    def by_node(self, chosen: Chosen[Grid]) -> Chosen[Grid]:
        """The same choice, by the names of the graph's nodes."""
        return replace(chosen, types=self._spread(chosen.types), importance=self._spread(chosen.importance))

    def _spread(self, values: Mapping[str, V]) -> dict[str, V]:
        return {node: value for name, value in values.items() for node in self.nodes[name]}

    def _places(self, name: str) -> list[tuple[str, slice]]:
        """The rows of the checkpoint's matrices that a choice is about, in order."""
        return [place for node in self.nodes[name] for place in self.weights.places(node)]

    def _read(self, name: str) -> Array:
        return np.concatenate([self.weights.read(tensor)[rows] for tensor, rows in self._places(name)])

    def _terms(self, name: str, sensitivity: Sensitivity) -> list[Term]:
        """Those of all of its parts, each for its rows alone."""
        found, start = [], 0
        for tensor, rows in self._places(name):
            for term in sensitivity.terms[tensor]:
                part = term.rows[rows]
                padded = np.zeros(self.shapes[name][0], np.float32)
                padded[start : start + len(part)] = part
                found.append(Term(padded, term.columns))
            start += rows.stop - rows.start
        return found

    def _planned(self, types: Mapping[str, Grid]) -> PlannedBytes:
        grids = self._spread(types)

        def rounding(matrix: GraphMatrix) -> Quantized | None:
            grid = grids[matrix.name]
            return None if grid == FLOAT else grid.empty(*matrix.shape)

        return planned_bytes(edited_graph(self.checkpoint, self.built, rounding, kv=self.kv))

    @cached_property
    def _companions(self) -> int:
        """Bytes of the files beside graph and weights."""
        with tempfile.TemporaryDirectory() as folder:
            copy_companions(self.checkpoint, self.built, Path(folder))
            return sum(file.stat().st_size for file in companions(Path(folder)))

    def _plain(self, precision: str) -> int:
        """Bytes of all matrices in a plain precision."""
        shapes = self.shapes.items()
        return sum(rows * row_bytes(precision, columns, "/layers." in name) for name, (rows, columns) in shapes)


def _rounded(importance: Array, rows: Array, grid: Grid) -> Array:
    return rows if grid == FLOAT else round_to(grid, rows, importance).dequantize()

"""The scales of exported files: read with the codes they belong to, and replaced in place.

A file's size and its other bytes stay as they are. What a layout looks like is asked of the functions that the files
are verified with: with all scales one they give the codes, with all minima one and no scales the offsets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from torch import Tensor

from ..core.gguf_header import TensorPlace, read_tensors, split_files
from ..modeling.families import block_number
from ..modeling.gguf_layout import from_gguf
from ..modeling.load import load_config
from .gguf_source import GgufSource, block_of
from .onnx_depths import GRAPH, weights_read
from .quantize import row_bytes
from .scales import ScaledMatrix, small_integers, stacked
from .tensors import CheckpointWeights, dequantize_nbits, integer_parts

if TYPE_CHECKING:
    import onnx

Type = GGMLQuantizationType
Array = NDArray[np.float32]
Numbers = Sequence[Array]  # (N, B) each: scales, and minima if there are any
# Where a block has its scale, and what its minima are multiplied by, in bytes from its beginning; both are float16.
PLACES: dict[Type, tuple[int, ...]] = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_0: (0,),
    Type.Q4_1: (0, 2),
    Type.Q4_K: (0, 2),
    Type.Q5_0: (0,),
    Type.Q5_1: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.Q8_0: (0,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
SHARE = 16  # weights that share an offset in every layout


class ScaleFiles(ABC):
    """The quantized matrices of one exported artifact, at all its depths."""

    @abstractmethod
    def weights(self) -> Iterator[tuple[str, ScaledMatrix | Tensor]]:
        """Every quantized matrix under the checkpoint's name and in its layout, one at a time.

        Matrices of the blocks have scales to train; embedding and head, and what has no scales, are values (N, K).
        """

    @abstractmethod
    def write(self, numbers: Mapping[str, Numbers]) -> None:
        """Replace the scales and minima of the matrices that `weights` gives, by the checkpoint's names."""


class GgufScales(ScaleFiles):
    """Those of GGUF files: `first` are the first parts of each depth, the deepest last."""

    def __init__(self, first: Sequence[Path], checkpoint: Path):
        self.config = load_config(checkpoint)
        self.names = GgufSource(checkpoint, self.config).originals
        # A part that depths share is one file, or, where the file system has no links, a copy for each.
        files = {(f.stat().st_dev, f.stat().st_ino): f for path in reversed(first) for f in split_files(path)}
        self.places: dict[str, list[TensorPlace]] = {}
        for file in files.values():
            for name, place in read_tensors(file).items():
                self.places.setdefault(name, []).append(place)

    def weights(self) -> Iterator[tuple[str, ScaledMatrix | Tensor]]:
        for name, (place, *_) in self.places.items():
            kind = Type(place.kind)
            if len(place.shape) != 2 or kind == Type.F32 or name not in self.names:
                continue
            data = _blocks(place, "r")
            rows = torch.from_numpy(self._rows(name, place))
            if kind in PLACES and block_of(name) is not None:
                yield self.names[name], read_blocks(data, kind, place.shape[0]).rows(rows)
            else:
                values = gguf.dequantize(data.reshape(place.shape[0], -1), kind)
                yield self.names[name], torch.from_numpy(values)[rows]

    def write(self, numbers: Mapping[str, Numbers]) -> None:
        for name, places in self.places.items():
            for place in places if self.names.get(name) in numbers else ():
                data = _blocks(place, "r+")
                rows = self._rows(name, place)
                for at, found in zip(PLACES[Type(place.kind)], numbers[self.names[name]], strict=True):
                    halves = np.empty(found.shape, np.float16)
                    halves[rows] = found
                    data[:, at : at + 2] = halves.reshape(-1, 1).view(np.uint8)
                data.flush()

    def _rows(self, name: str, place: TensorPlace) -> NDArray[np.int64]:
        """The row of the file that each row of the checkpoint's matrix is."""
        numbered = np.arange(place.shape[0], dtype=np.float32)[:, None]
        return from_gguf(name, numbered, self.config)[:, 0].astype(np.int64)


def _blocks(place: TensorPlace, mode: str) -> np.memmap:
    """A tensor of a GGUF file in the file itself, (blocks, bytes of one)."""
    size = GGML_QUANT_SIZES[Type(place.kind)][1]
    count = place.shape[0] * row_bytes(Type(place.kind), place.shape[1]) // size
    return np.memmap(place.file, np.uint8, mode, place.offset, (count, size))  # type: ignore[arg-type, call-overload]


def read_blocks(data: NDArray[np.uint8], kind: Type, rows: int) -> ScaledMatrix:
    """The matrix in blocks (count, bytes) of a type in PLACES."""
    places = PLACES[kind]
    scales, *minima = (
        torch.from_numpy(data[:, at : at + 2].copy().view(np.float16).astype(np.float32)).view(rows, -1)
        for at in places
    )
    shape = (*scales.shape, -1)
    codes = small_integers(_with_ones(data, kind, rows, places[0]).view(shape))
    if not minima:
        return ScaledMatrix(codes, scales, half=True)
    offsets = _with_ones(data, kind, rows, places[1]).view(*scales.shape, -1, SHARE)[..., 0]
    return ScaledMatrix(codes, scales, small_integers(offsets), minima[0], half=True)


def _with_ones(data: NDArray[np.uint8], kind: Type, rows: int, at: int) -> Tensor:
    """The values (rows, K) of blocks whose number at one place is one, and at the others zero."""
    changed = np.array(data)
    for place in PLACES[kind]:
        changed[:, place : place + 2] = np.full((len(data), 1), place == at, np.float16).view(np.uint8)
    return torch.from_numpy(gguf.dequantize(changed.reshape(rows, -1), kind))


class OnnxScales(ScaleFiles):
    """Those of the ONNX folder of all blocks, whose weights file the depths share."""

    def __init__(self, folder: Path, checkpoint: Path):
        self.folder, self.checkpoint = folder, CheckpointWeights(checkpoint)

    def weights(self) -> Iterator[tuple[str, ScaledMatrix | Tensor]]:
        import onnx
        from onnx.numpy_helper import to_array

        graph = onnx.load(str(self.folder / GRAPH)).graph  # with its external data
        stored = {tensor.name: tensor for tensor in graph.initializer}
        pieces: dict[str, list[tuple[int, ScaledMatrix]]] = {}
        for node in self._nodes(graph):
            packed, scales, zeros = (to_array(stored[name]) if name else None for name in integer_parts(node))
            settings = {a.name: a.i for a in node.attribute}
            assert packed is not None and scales is not None
            rows, size = len(packed), settings["block_size"]
            numbers = scales.reshape(rows, -1)
            ones = [packed, np.ones_like(numbers), zeros]
            codes = dequantize_nbits(ones, settings["bits"], size, numbers.shape[1] * size)
            half = numbers.dtype == np.float16
            matrix = ScaledMatrix(
                small_integers(torch.from_numpy(codes).view(*numbers.shape, size)),
                torch.from_numpy(numbers.astype(np.float32)),
                half=half,
            )
            place = 0
            for name, part in self.checkpoint.places(node.name):
                count = part.stop - part.start
                pieces.setdefault(name, []).append((part.start, matrix.rows(slice(place, place + count))))
                place += count
                if sum(len(piece.scales) for _, piece in pieces[name]) == self.checkpoint.rows(name):
                    whole = stacked([piece for _, piece in sorted(pieces.pop(name), key=lambda entry: entry[0])])
                    yield name, whole if block_number(name) is not None else whole.values()

    def write(self, numbers: Mapping[str, Numbers]) -> None:
        import onnx

        graph = onnx.load(str(self.folder / GRAPH), load_external_data=False).graph
        places = weights_read(self.folder / GRAPH)
        for node in self._nodes(graph):
            parts = self.checkpoint.places(node.name)
            if not all(name in numbers for name, _ in parts):
                continue
            scales = np.concatenate([numbers[name][0][rows] for name, rows in parts])
            file, offset, length, kind, _ = places[integer_parts(node)[1]]
            data = scales.astype(onnx.helper.tensor_dtype_to_np_dtype(kind)).tobytes()
            assert len(data) == length, "scales take the place of scales"
            with (self.folder / file).open("r+b") as stream:
                stream.seek(offset)
                stream.write(data)

    def _nodes(self, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        """The nodes with integer weights that are the checkpoint's; a tied embedding's are the head's."""
        found = {}
        for node in graph.node:
            if node.op_type in ("MatMulNBits", "GatherBlockQuantized") and self.checkpoint.places(node.name):
                found.setdefault(integer_parts(node)[0], node)
        return list(found.values())

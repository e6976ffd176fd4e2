"""Cutting an exported ONNX graph at depths: blocks a … b-1 as one graph each, and the head as another.

ONNX Runtime always runs a whole graph and returns only its declared outputs. Parts that pass hidden states on can be
run one at a time, over the same external weights file, so that one set of weights serves every depth. The graph is
split at the level of protobuf's wire format: its nodes and tensors are copied byte by byte, and the runtime needs no
`onnx` package.

Every attention gets one extra row of zeros, removed again after it. ONNX Runtime uses a different kernel for one row
than for several, with different rounding; with int4, whose activations are rounded to 8 bits, that is enough to change
logits by half a unit. With the extra row no pass has a single row, and a token's logits are bit-identical whether it is
read alone or among others: drafts can be verified, and skipped blocks filled in, without a difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..core.errors import UserError

_GRAPH = 7  # field of ModelProto
_NODE, _INITIALIZER, _INPUT, _OUTPUT, _VALUE = 1, 5, 11, 12, 13  # fields of GraphProto
_FLOAT, _INT64 = 1, 7  # types of TensorProto
# Constants of the added row: Pad's amounts (before and after each of three axes), Slice's starts, ends and axes.
_ROW = {"added_row.pads": (0, 0, 0, 0, 1, 0), "added_row.start": (0,), "added_row.end": (-1,), "added_row.axis": (1,)}


class Cut(NamedTuple):
    """Where a block begins: its first norm adds these two tensors (1, T, H), the residual stream so far and the
    previous block's output."""

    residual: str
    addition: str


class Part(NamedTuple):
    """Blocks `first` … `last`-1, or the final norm and head (`first` == `last`), as a model."""

    model: bytes
    first: int
    last: int
    start: Cut | None  # its inputs; None in the first part, which takes `input_ids`
    end: Cut | None  # its outputs; None in the head, which gives `logits`


@dataclass
class _Node:
    raw: bytes
    name: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def cut_model(file: Path, depths: Sequence[int], blocks: int, scores: bool = False) -> list[Part]:
    """The parts of an ONNX file of `blocks` blocks between the ascending `depths`, followed by the head.

    With `scores` they also output their blocks' `retaining_scores.N`, which are not computed otherwise. Raises
    `UserError` for files whose graph was not written by `compress export`.
    """
    try:
        graph = _Graph(file.read_bytes())
    except (ValueError, IndexError) as error:
        raise UserError(f"ONNX Runtime cannot load {file}: it is not a complete ONNX model ({error})") from error
    cuts = {depth: graph.cut(depth, blocks) for depth in (*depths, blocks)}
    missing = [depth for depth, cut in cuts.items() if cut is None]
    if missing:
        raise UserError(f"{file} cannot be run at depth {missing[0]}: its graph has no block boundary there")
    if scores and not graph.gives(f"retaining_scores.{depths[-1] - 1}"):
        raise UserError(f"{file} gives no retaining scores: it was exported from a checkpoint without retaining heads")
    parts, start, first = [], None, 0
    for depth in depths:
        end = cuts[depth]
        assert end is not None
        presents = [f"present.{i}.{part}" for i in range(first, depth) for part in ("key", "value")]
        retaining = [f"retaining_scores.{i}" for i in range(first, depth)] if scores else []
        parts.append(Part(graph.part([*end, *presents, *retaining], start or ()), first, depth, start, end))
        start, first = end, depth
    final = cuts[blocks]
    assert final is not None
    return [*parts, Part(graph.part(["logits"], final), blocks, blocks, final, None)]


class _Graph:
    def __init__(self, model: bytes):
        self._around = []  # the model's other fields, as they are
        graph = b""
        for number, value, raw in _fields(model):
            if number == _GRAPH and isinstance(value, bytes):
                graph = value
            else:
                self._around.append(raw)
        self._nodes: list[_Node] = []
        self._named: dict[int, dict[str, bytes]] = {_INITIALIZER: {}, _INPUT: {}, _OUTPUT: {}, _VALUE: {}}
        self._rest = []
        for number, value, raw in _fields(graph):
            if number == _NODE and isinstance(value, bytes):
                self._nodes += _with_added_row(value, _node(value, raw))
            elif number in self._named and isinstance(value, bytes):
                name = 8 if number == _INITIALIZER else 1  # the field of TensorProto, of ValueInfoProto
                self._named[number][_text(value, name)] = raw
            else:
                self._rest.append(raw)
        self._named[_INITIALIZER] |= {name: _message(_INITIALIZER, _numbers(name, row)) for name, row in _ROW.items()}
        self._maker = {output: i for i, node in enumerate(self._nodes) for output in node.outputs if output}

    def cut(self, depth: int, blocks: int) -> Cut | None:
        norm = "final_norm_layernorm" if depth == blocks else "input_layernorm"
        pattern = re.compile(rf"/model/layers\.{depth}/{norm}/SkipLayerNorm")
        for node in self._nodes:
            if pattern.fullmatch(node.name):
                return Cut(node.inputs[0], node.inputs[1])
        return None

    def gives(self, name: str) -> bool:
        """Whether an output of this name is declared."""
        return name in self._named[_OUTPUT]

    def part(self, outputs: Sequence[str], given: Iterable[str]) -> bytes:
        """The model that computes `outputs` from the tensors `given` and the inputs it needs."""
        given = list(given)
        wanted: set[int] = set()
        used: dict[str, None] = {}
        todo = list(outputs)
        while todo:
            name = todo.pop()
            if not name or name in used:
                continue
            used[name] = None
            maker = self._maker.get(name)
            if name not in given and maker is not None and maker not in wanted:
                wanted.add(maker)
                todo += self._nodes[maker].inputs
        inputs = [raw for name, raw in self._named[_INPUT].items() if name in used]
        ends = [self._named[_OUTPUT].get(name) or _message(_OUTPUT, _tensor(name)) for name in outputs]
        inner = {name: raw for name, raw in self._named[_VALUE].items() if name in used}
        body = [
            *(self._nodes[i].raw for i in sorted(wanted)),
            *(raw for name, raw in self._named[_INITIALIZER].items() if name in used),
            *(_message(_INPUT, _tensor(name)) for name in given),
            *inputs,
            *ends,
            *(raw for name, raw in inner.items() if name not in given and name not in outputs),
            *self._rest,
        ]
        return b"".join(self._around) + _message(_GRAPH, b"".join(body))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """(number, value, the field's own bytes) of every field of a protobuf message."""
    at = 0
    while at < len(data):
        start = at
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == 0:
            value, at = _varint(data, at)
        else:
            if kind == 2:
                length, at = _varint(data, at)
            elif kind in (1, 5):
                length = 8 if kind == 1 else 4
            else:
                raise ValueError(f"wire type {kind}")
            value, at = data[at : at + length], at + length
        if at > len(data):
            raise ValueError("cut short")
        yield number, value, data[start:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _node(message: bytes, raw: bytes) -> _Node:
    node = _Node(raw)
    for number, value, _ in _fields(message):
        if number in (1, 2, 3) and isinstance(value, bytes):
            text = value.decode()
            if number == 3:
                node.name = text
            else:
                (node.inputs if number == 1 else node.outputs).append(text)
    return node


def _with_added_row(message: bytes, node: _Node) -> list[_Node]:
    """An attention between Pad and Slice; any other node unchanged."""
    if _text(message, 4) != "GroupQueryAttention":
        return [node]
    given = [name for name in node.inputs[:3] if name]  # q, k and v, or all three as one
    longer = {name: f"{name}/longer" for name in [*given, node.outputs[0]]}
    raw = b"".join(
        _message(number, longer.get(value.decode(), value.decode()).encode())
        if number in (1, 2) and isinstance(value, bytes)
        else field
        for number, value, field in _fields(message)
    )
    attention = _node(raw, _message(_NODE, raw))
    pads = [_new_node("Pad", [name, "added_row.pads"], longer[name]) for name in given]
    ends = ["added_row.start", "added_row.end", "added_row.axis"]
    return [*pads, attention, _new_node("Slice", [longer[node.outputs[0]], *ends], node.outputs[0])]


def _new_node(operator: str, inputs: Sequence[str], output: str) -> _Node:
    fields = [(1, name) for name in inputs] + [(2, output), (3, f"{output}/{operator}"), (4, operator)]
    message = b"".join(_message(number, text.encode()) for number, text in fields)
    return _node(message, _message(_NODE, message))


def _text(message: bytes, wanted: int) -> str:
    return next((v.decode() for number, v, _ in _fields(message) if number == wanted and isinstance(v, bytes)), "")


def _message(number: int, content: bytes) -> bytes:
    return _encode(number << 3 | 2) + _encode(len(content)) + content


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _numbers(name: str, values: Sequence[int]) -> bytes:
    """TensorProto of integers (N,)."""
    data = b"".join(value.to_bytes(8, "little", signed=True) for value in values)
    shape = _encode(1 << 3) + _encode(len(values))
    return shape + _encode(2 << 3) + _encode(_INT64) + _message(8, name.encode()) + _message(9, data)


def _tensor(name: str) -> bytes:
    """ValueInfoProto of a float32 tensor of any shape."""
    element = _encode(1 << 3) + _encode(_FLOAT)
    return _message(1, name.encode()) + _message(2, _message(1, element))

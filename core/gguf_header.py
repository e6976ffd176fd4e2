"""Reads a GGUF file's metadata and the places of its tensors, before any runtime opens it."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .files import check_file_exists, unreadable

# GGUF value type -> struct format of its little-endian scalar.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's entry in a GGUF header."""

    file: Path
    kind: int  # ggml's type number
    shape: tuple[int, ...]  # rows first, as in numpy
    offset: int  # from the beginning of the file

    @property
    def size(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Any]:
    """All metadata values by key; an array is given by its length. `UserError` for an incomplete or invalid header."""
    return _read(path, tensors=False, arrays=False)[0]


def read_metadata(path: Path) -> dict[str, Any]:
    """As `read_header`, with arrays as lists."""
    return _read(path, tensors=False, arrays=True)[0]


def read_tensors(path: Path) -> dict[str, TensorPlace]:
    """The places of a GGUF file's tensors, in its order.

    `UserError` for an incomplete or invalid header, a file that ends before its last tensor begins, and a tensor that
    is named twice.
    """
    return _read(path, tensors=True, arrays=False)[1]


def read_tensor_names(path: Path) -> list[str]:
    """The names of a GGUF file's tensors, in order. Raises as `read_tensors` does."""
    return list(read_tensors(path))


def split_files(path: Path) -> list[Path]:
    """All files of a split model, given the first; for an unsplit model only the file itself.

    `UserError` for a part that is not the first, and for a missing part.
    """
    header = read_header(path)
    count = header.get("split.count", 1)
    if count == 1:
        return [path]
    name = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    if name is None:
        raise UserError(f"{path} is one of {count} parts, but is not named as llama.cpp's parts are")
    files = [path.with_name(f"{name[1]}-{part:05d}-of-{name[2]}.gguf") for part in range(1, int(name[2]) + 1)]
    if header["split.no"] != 0:
        raise UserError(f"{path} is part {header['split.no'] + 1} of a model; name the first: {files[0].name}")
    if len(files) != count:
        raise UserError(f"{path} is the first of {count} parts, but its name says {len(files)}")
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} is the first of {count} parts, of which {file.name} is missing")
    return files


def _read(path: Path, *, tensors: bool, arrays: bool) -> tuple[dict[str, Any], dict[str, TensorPlace]]:
    check_file_exists(path)
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file")
            version, number, count = struct.unpack("<IQQ", _take(file, 20))
            if version not in (2, 3):
                raise UserError(f"{path} has GGUF version {version}; versions 2 and 3 are read")
            values = dict(_pair(file, arrays) for _ in range(count))
            if not tensors:
                return values, {}
            entries = [_tensor(file) for _ in range(number)]
            names = [name for name, *_ in entries]
            twice = (
                next((name for name in names if names.count(name) > 1), None) if len({*names}) < len(names) else None
            )
            if twice is not None:
                raise UserError(f"{path} holds the tensor {twice} twice")
            alignment = values.get("general.alignment", 32)
            if not isinstance(alignment, int) or alignment < 1:
                raise ValueError("the alignment is no number above 0")
            start = -(-file.tell() // alignment) * alignment
            if entries and start + max(offset for *_, offset in entries) >= path.stat().st_size:
                raise ValueError("the file ends before its last tensor")
            places = {name: TensorPlace(path, ggml_type, shape, start + at) for name, shape, ggml_type, at in entries}
            return values, places
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise UserError(f"{path} is not a whole GGUF file: its header is damaged or cut off") from error
    except OSError as error:
        raise unreadable(path, error) from error


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, shape (rows first), type, and where its data begins behind the header."""
    name = _string(file)
    dimensions = struct.unpack("<I", _take(file, 4))[0]
    if dimensions > 4:
        raise ValueError("a tensor has more than four dimensions")
    *sizes, ggml_type, offset = struct.unpack(f"<{dimensions}QIQ", _take(file, 8 * dimensions + 4 + 8))
    return name, tuple(reversed(sizes)), ggml_type, offset


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count) if count < 1 << 24 else b""
    if len(data) != count:
        raise ValueError("the file ends inside its header")
    return data


def _pair(file: BinaryIO, arrays: bool) -> tuple[str, Any]:
    key = _string(file)
    return key, _value(file, struct.unpack("<I", _take(file, 4))[0], arrays)


def _string(file: BinaryIO) -> str:
    return _take(file, struct.unpack("<Q", _take(file, 8))[0]).decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int, arrays: bool) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return struct.unpack(_SCALARS[kind], _take(file, struct.calcsize(_SCALARS[kind])))[0]
    inner, length = struct.unpack("<IQ", _take(file, 12))
    if inner not in _SCALARS:
        items = [_value(file, inner, arrays) for _ in range(length)]
        return items if arrays else length
    size = struct.calcsize(_SCALARS[inner])
    if not arrays:
        file.seek(length * size, 1)
        return length
    data = b"".join(_take(file, min(length * size - at, 1 << 20)) for at in range(0, length * size, 1 << 20))
    return list(struct.unpack(f"<{length}{_SCALARS[inner][1]}", data))

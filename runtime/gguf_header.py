"""The metadata of a GGUF file, without its tensors: enough to know what it is before llama.cpp opens it."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

# GGUF value type -> struct format of its little-endian scalar.
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


def read_header(path: Path) -> dict[str, Any]:
    """Every metadata value by key; an array by its length alone. `UserError` for what is not a whole GGUF header."""
    return _read(path, tensors=False)[0]


def read_tensor_names(path: Path) -> list[str]:
    """The names of a GGUF file's tensors, in order. `UserError` for what is not a whole header, or ends before the
    last tensor begins."""
    return _read(path, tensors=True)[1]


def split_files(path: Path) -> list[Path]:
    """The files of a model that is cut into several, from the first of them; the file alone where it is whole.

    `UserError` for a part that is not the first, and where one is missing.
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


def _read(path: Path, tensors: bool) -> tuple[dict[str, Any], list[str]]:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path} is not a GGUF file")
            version, number, count = struct.unpack("<IQQ", _take(file, 20))
            if version not in (2, 3):
                raise UserError(f"{path} has GGUF version {version}; versions 2 and 3 are read")
            values = dict(_pair(file) for _ in range(count))
            found = [_tensor(file) for _ in range(number)] if tensors else []
            if found and file.tell() + max(offset for _, offset in found) >= path.stat().st_size:
                raise ValueError("the file ends before its last tensor")
            return values, [name for name, _ in found]
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a whole GGUF file: its header is damaged or cut off") from error


def _tensor(file: BinaryIO) -> tuple[str, int]:
    """A tensor's name, and where its data begins behind the header."""
    name = _string(file)
    dimensions = struct.unpack("<I", _take(file, 4))[0]
    return name, struct.unpack("<Q", _take(file, 8 * dimensions + 4 + 8)[-8:])[0]  # after its sizes and its type


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count) if count < 1 << 24 else b""
    if len(data) != count:
        raise ValueError("the file ends inside its header")
    return data


def _pair(file: BinaryIO) -> tuple[str, Any]:
    key = _string(file)
    return key, _value(file, struct.unpack("<I", _take(file, 4))[0])


def _string(file: BinaryIO) -> str:
    return _take(file, struct.unpack("<Q", _take(file, 8))[0]).decode("utf-8", errors="replace")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return struct.unpack(_SCALARS[kind], _take(file, struct.calcsize(_SCALARS[kind])))[0]
    inner, length = struct.unpack("<IQ", _take(file, 12))
    if inner in _SCALARS:
        file.seek(length * struct.calcsize(_SCALARS[inner]), 1)
    else:
        for _ in range(length):
            _value(file, inner)
    return length

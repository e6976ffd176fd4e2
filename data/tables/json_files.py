"""JSON Lines, and JSON files that hold a list of rows. Numbers keep their text in the file."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.files import Number, kind_of, parse, parse_line, read_text
from . import Table


class JsonLines:
    """A file with an object per line; rows are read on demand, only their offsets are kept in memory."""

    pads = False

    def __init__(self, path: Path, what: str = ""):
        self.path, self.what = path, what
        self._offsets, self._lines = array("Q"), array("Q")
        known: dict[str, None] = {}
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                    raise UserError(f"{what}{path} is a JSON array, not JSON Lines; rename it to end in .json")
                value = parse_line(line, number, path, what, literal=True)
                if value is not None:
                    known.update(dict.fromkeys(value))
                    self._offsets.append(offset)
                    self._lines.append(number)
                offset += len(line)
        self.columns = list(known)
        self._file = path.open("rb")

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, number: int) -> dict[str, Any]:
        self._file.seek(self._offsets[number])
        value = parse_line(self._file.readline(), self._lines[number], self.path, self.what, literal=True)
        if value is None:
            raise UserError(f"{self.what}{self.path} changed while it was being read")
        return value

    def place(self, number: int) -> str:
        return f"line {self._lines[number]} of {self.path.name}"


class JsonArray:
    """Rows of one JSON value, all in memory."""

    pads = False

    def __init__(self, rows: list[dict[str, Any]], name: str):
        self._rows, self._name = rows, name
        self.columns = list(dict.fromkeys(key for row in rows for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, number: int) -> dict[str, Any]:
        return self._rows[number]

    def place(self, number: int) -> str:
        return f"row {number + 1} of {self._name}"


def open_json(path: Path, what: str = "") -> Table:
    """A .json file: an array of objects, an object with exactly one list of objects, or JSON lines."""
    text = read_text(path, what)
    try:
        value = parse(text, literal=True)
    except (ValueError, RecursionError) as error:
        if _begins_with_an_object(text):
            return JsonLines(path, what)
        raise UserError(f"{what}{path} is not valid JSON: {error}") from error
    return JsonArray(_rows(value, path, what), path.name)


def _begins_with_an_object(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return isinstance(parse(first), dict)
    except (ValueError, RecursionError):
        return False


def _rows(value: object, path: Path, what: str) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        lists = [key for key, item in value.items() if isinstance(item, list)]
        if len(lists) != 1:
            has = (
                f"{len(lists)} lists ({', '.join(lists)})" if lists else f"no list, but {', '.join(value) or 'nothing'}"
            )
            raise UserError(
                f"{what}{path} holds an object with {has}; it must be a list of rows, an object with one list of "
                "rows, or a row per line (.jsonl)"
            )
        value = value[lists[0]]
    if not isinstance(value, list) or isinstance(value, Number):
        raise UserError(f"{what}{path} holds a JSON {kind_of(value)}, not a list of rows")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise UserError(f"{what}row {number} of {path} is a JSON {kind_of(row)}, not an object")
    return value

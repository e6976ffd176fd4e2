"""CSV files, read literally: 007, 1e3, NA and empty values stay the text they are."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ...core.errors import UserError
from ...core.files import why_not_utf8

LONGEST = 1 << 30  # characters of one value; the csv module's own limit is 131,072


class CsvFile:
    """A CSV file with a header; rows are read on demand, only their offsets are kept in memory."""

    pads = False

    def __init__(self, path: Path, what: str = ""):
        csv.field_size_limit(LONGEST)
        self.path, self.what = path, what
        self._offsets, self._lines = array("Q"), array("Q")
        self._file = path.open("rb")
        reader = _Reader(self._file, 0, 1)
        header = self._next(reader)
        while header is not None and not header:
            header = self._next(reader)
        self._header = self._checked(header or [])
        self.columns = [name for name in self._header if name]
        while True:
            offset, line = reader.offset, reader.line
            row = self._next(reader)
            if row is None:
                break
            if row:  # not a blank line
                self._fits(row, line)
                self._offsets.append(offset)
                self._lines.append(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, number: int) -> dict[str, Any]:
        self._file.seek(self._offsets[number])
        row = self._next(_Reader(self._file, self._offsets[number], self._lines[number])) or []
        self._fits(row, self._lines[number])
        return {name: value for name, value in zip(self._header, row, strict=True) if name}

    def place(self, number: int) -> str:
        return f"line {self._lines[number]} of {self.path.name}"

    def _next(self, reader: _Reader) -> list[str] | None:
        """The next row, empty for a blank line; None at the end."""
        line = reader.line
        try:
            return next(reader.rows, None)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.what}line {reader.line} of {self.path} is not UTF-8 text: {why_not_utf8(error.object, error)}"
            ) from error
        except csv.Error as error:
            wrong = str(error)
            if "new-line character" in wrong:
                wrong = "it has a carriage return within a line; save it with ordinary line endings"
            elif "unexpected end" in wrong:
                wrong = "a quote opens there and never closes"
            raise UserError(f"{self.what}the row at line {line} of {self.path} is not valid CSV: {wrong}") from error

    def _checked(self, header: list[str]) -> list[str]:
        """The header, validated. Columns without a name, such as the row numbers that pandas writes, are ignored."""
        if not any(header):
            raise UserError(f"{self.what}{self.path} has no header: its first line must name the columns")
        twice = sorted({name for name in header if name and header.count(name) > 1})
        if twice:
            raise UserError(f"{self.what}the header of {self.path} names {twice[0]!r} twice; rename one")
        if len(header) == 1:
            for separator, called in ((";", "semicolons"), ("\t", "tabs")):
                if separator in header[0]:
                    raise UserError(f"{self.what}{self.path} separates values by {called}; save it with commas")
        return header

    def _fits(self, row: list[str], line: int) -> None:
        if len(row) != len(self._header):
            raise UserError(
                f"{self.what}the row at line {line} of {self.path} has {len(row)} values, but the header has "
                f"{len(self._header)}; quote values that hold commas"
            )


class _Reader:
    """Rows from an offset of a file on, and the offset of the next one."""

    def __init__(self, file: BinaryIO, offset: int, line: int):
        self.offset, self.line = offset, line
        self.rows = csv.reader(self._texts(file), strict=True)

    def _texts(self, file: BinaryIO) -> Iterator[str]:
        for line in file:
            text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8")
            self.offset += len(line)
            self.line += 1
            yield text

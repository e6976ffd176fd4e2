"""Users' files as tables, read literally: file names are not patterns, and values are the text in the file.

Nothing here uses `datasets`, which treats file names as patterns and guesses types.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ...core.errors import UserError
from ...core.files import unreadable


class Table(Protocol):
    """The rows of one data set."""

    pads: bool  # whether missing keys in nested values read as None, as in Arrow's structs

    @property
    def columns(self) -> Sequence[str]:
        """Columns of all rows, in order of first appearance."""
        ...

    def __len__(self) -> int: ...

    def row(self, number: int) -> dict[str, Any]:
        """The values of row `number`, counted from 0; columns that the row lacks may be missing."""
        ...

    def place(self, number: int) -> str:
        """The row's location, for messages: "line 3 of x.jsonl"."""
        ...


def open_table(path: Path, wanted: Sequence[str], cache: Path, what: str = "") -> Table:
    """The table in a .jsonl, .json, .csv or .parquet file.

    `wanted` are the columns that may be read; those of a Parquet file are copied to a file in the folder `cache`. For
    JSON Lines and CSV only row offsets are kept in memory. Raises `UserError` (after `what`) for unreadable files,
    naming the line or row, and for files without rows.
    """
    suffix = path.suffix.lower()
    try:
        table = _open(suffix, path, wanted, cache, what)
    except OSError as error:
        raise unreadable(path, error, what) from error
    if len(table) == 0:
        raise UserError(f"{what}{path} has no rows")
    return table


def _open(suffix: str, path: Path, wanted: Sequence[str], cache: Path, what: str) -> Table:
    if suffix == ".csv":
        from .comma_separated import CsvFile

        return CsvFile(path, what)
    if suffix == ".parquet":
        from .parquet import ParquetFile

        return ParquetFile(path, wanted, cache, what)
    from .json_files import JsonLines, open_json

    return JsonLines(path, what) if suffix == ".jsonl" else open_json(path, what)

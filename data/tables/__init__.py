"""Users' files as tables, read literally: a name is a name, a value is the text that stands in the file.

Nothing here goes through `datasets`, whose file names are patterns and whose readers guess types.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ...core.errors import UserError


class Table(Protocol):
    """The rows of one data set."""

    pads: bool  # whether keys that a nested value lacks read as None, as Arrow's structs have it

    @property
    def columns(self) -> Sequence[str]:
        """Of all rows together, in the order in which they turn up."""
        ...

    def __len__(self) -> int: ...

    def row(self, number: int) -> dict[str, Any]:
        """The values of row `number`, counted from 0; a column that the row lacks may be missing."""
        ...

    def place(self, number: int) -> str:
        """Where that row stands, for messages: "line 3 of x.jsonl"."""
        ...


def open_table(path: Path, wanted: Sequence[str], cache: Path, what: str = "") -> Table:
    """The table in a .jsonl, .json, .csv or .parquet file.

    `wanted` are the columns that may be asked for; of a Parquet file they are kept in a file of the folder `cache`, of
    JSON Lines and CSV only the places of the rows are held in memory. Raises `UserError` (`what` first) for what cannot
    be read, with the line or row, and for files without rows.
    """
    suffix = path.suffix.lower()
    try:
        table = _open(suffix, path, wanted, cache, what)
    except OSError as error:
        raise UserError(f"{what}{path} could not be read: {error.strerror or error}") from error
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

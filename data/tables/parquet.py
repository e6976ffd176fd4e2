"""Parquet files. Text stays text; other values get their exact text form (`literal` in turns.py)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.errors import UserError

BATCH = 1024  # rows converted at a time


class ParquetFile:
    """The wanted columns of a Parquet file, copied uncompressed to a memory-mapped cache file for random access."""

    pads = True

    def __init__(self, path: Path, wanted: Sequence[str], cache: Path, what: str = ""):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path, self.what = path, what
        try:
            with path.open("rb") as file:  # opened by us: pyarrow could misinterpret a file name
                source = pq.ParquetFile(file)
                self.columns = list(source.schema_arrow.names)
                names = [name for name in dict.fromkeys(wanted) if name in self.columns]
                twice = [name for name in names if self.columns.count(name) > 1]
                if twice:
                    raise UserError(f"{what}{path} has two columns called {twice[0]!r}; rename one")
                self._count = source.metadata.num_rows
                self._table = _mapped(source, names, cache, path)
        except (pa.ArrowException, pa.ArrowInvalid, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{what}{path} could not be read: {reason[0]}") from error

    def __len__(self) -> int:
        return self._count

    def row(self, number: int) -> dict[str, Any]:
        try:
            row = self._table.slice(number, 1).to_pylist()[0]
        except (UnicodeDecodeError, ValueError, OverflowError) as error:
            raise UserError(f"{self.what}{self.place(number)} cannot be read: {error}") from error
        return {name: _exact(value, self._table.schema.field(name).type) for name, value in row.items()}

    def place(self, number: int) -> str:
        return f"row {number + 1} of {self.path.name}"


def _mapped(source: Any, names: list[str], cache: Path, path: Path) -> Any:
    """The columns as an Arrow table, memory-mapped from a file in `cache`."""
    import pyarrow as pa

    cache.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(repr((os.fsencode(path), names)).encode()).hexdigest()[:16]
    file, temporary = cache / f"{name}.arrow", cache / f"{name}.{os.getpid()}.tmp"
    schema = pa.schema([source.schema_arrow.field(name) for name in names])
    with temporary.open("wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        # A name with a dot also asks for a field of that name inside a struct, hence the second selection.
        for batch in source.iter_batches(batch_size=BATCH, columns=names) if names else ():
            writer.write_batch(pa.record_batch([batch.column(name) for name in names], schema=schema))
    os.replace(temporary, file)
    with file.open("rb") as stored:
        return pa.ipc.open_stream(_map(stored)).read_all()


def _map(file: Any) -> Any:
    """A file's bytes, memory-mapped; they outlive the file object."""
    import mmap

    import pyarrow as pa

    return pa.BufferReader(pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _exact(value: object, arrow_type: Any) -> Any:
    """Convert a number of less than double precision to the double with the same printed form, so 0.1 does not become
    0.10000000149011612."""
    import numpy as np
    import pyarrow as pa

    if isinstance(value, float) and (pa.types.is_float32(arrow_type) or pa.types.is_float16(arrow_type)):
        return float(str((np.float32 if pa.types.is_float32(arrow_type) else np.float16)(value)))
    return value

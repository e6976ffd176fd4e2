"""The rows of a data stage, and reading and writing the file that holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..core.errors import UserError

FILE = "rows.parquet"
ROW_GROUP = 4096
Split = Literal["train", "heldout"]
Origin = Literal["gold", "rewritten", "own"]
Message = dict[str, Any]  # role and content, and the optional keys listed in turns.py
Messages = list[Message]


@dataclass(frozen=True)
class Row:
    """One training example: a conversation (`messages`) or a plain text (`text`), never both."""

    id: int
    split: Split
    messages: Messages | None = None  # [{"role": ..., "content": ...}, ...]
    text: str | None = None
    source: str = ""  # "magpie", "texts", a data set's name, or a file's name
    seed: int | None = None  # sampling seed, if a model wrote it
    tokens: int = 0  # length in tokens, once encoded
    targets: int = 0  # how many of them are trained on
    cut: bool = False  # the last answer was cut off, so no end of turn is trained on
    origin: Origin = "gold"  # the last answer is the data set's, the model's rewrite of it, or the model's own
    why: str = ""  # why gold was kept or replaced; empty if no rewrite was requested
    tools: list[Any] | None = None  # tool definitions of the conversation


def _schema() -> Any:
    import pyarrow as pa

    # `more` holds a message's other keys, such as tool_calls, as JSON.
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("more", pa.string())])
    return pa.schema(
        [
            ("id", pa.int64()),
            ("split", pa.string()),
            ("messages", pa.list_(message)),
            ("text", pa.string()),
            ("source", pa.string()),
            ("seed", pa.int64()),
            ("tokens", pa.int64()),
            ("targets", pa.int64()),
            ("cut", pa.bool_()),
            ("origin", pa.string()),
            ("why", pa.string()),
            ("tools", pa.string()),  # JSON
        ]
    )


def write_rows(folder: Path, rows: Iterable[Row]) -> Path:
    """Write `rows.parquet` into `folder` atomically; the same rows give the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / FILE
    temporary = path.with_name(FILE + ".tmp")
    schema = _schema()
    table = pa.Table.from_pylist([_stored(row, schema.names) for row in rows], schema=schema)
    with temporary.open("wb") as file:  # pyarrow gets no file name, which may not be UTF-8
        pq.write_table(table, file, row_group_size=ROW_GROUP, compression="zstd", version="2.6")
    os.replace(temporary, path)
    return path


def _stored(row: Row, names: list[str]) -> dict[str, Any]:
    stored = {name: getattr(row, name) for name in names}
    stored["tools"] = None if row.tools is None else json.dumps(row.tools, ensure_ascii=False)
    if row.messages is not None:
        stored["messages"] = [_stored_message(message) for message in row.messages]
    return stored


def _stored_message(message: Message) -> Message:
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    stored = {"role": message["role"], "content": message["content"]}
    return stored | {"more": json.dumps(more, ensure_ascii=False) if more else None}


def _read(record: dict[str, Any]) -> Row:
    if record["messages"] is not None:
        record["messages"] = [
            {"role": m["role"], "content": m["content"]} | json.loads(m["more"] or "{}") for m in record["messages"]
        ]
    record["tools"] = None if record["tools"] is None else json.loads(record["tools"])
    return Row(**record)


def read_rows(folder: Path, split: Split | None = None) -> list[Row]:
    """The rows of a data stage's folder in the order of their ids: one split, or all.

    Raises `UserError` if the rows file is missing, broken, or of another version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / FILE
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE}, so it is not a data stage's folder")
    try:
        with path.open("rb") as file:
            if pq.read_schema(file).names != _schema().names:
                raise UserError(f"{path} was written by another version of compress; run its data stage again")
            file.seek(0)
            records = pq.read_table(file, schema=_schema()).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is broken ({error}); delete its folder and run the data stage again") from error
    return [_read(record) for record in records if split is None or record["split"] == split]

"""Users' data sets: a name on the Hub, or a JSONL, Parquet or CSV file, read through `datasets`."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ..errors import UserError
from ..stage import Context
from .config import SUFFIXES, DatasetConfig
from .rows import Messages

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """One record of a data set, as a conversation or as text; or why it cannot be used."""

    number: int  # in the data set, from 0
    messages: Messages | None = None
    text: str | None = None
    dropped: str = ""  # empty: usable


def local_file(config: DatasetConfig, context: Context) -> Path | None:
    """The file a local data set is in, or None for one on the Hub; `UserError` if it is not there or empty."""
    path = context.resolve(config.path)
    if not config.local:
        if path.exists():
            raise UserError(f"data.path: {config.path} is not one of {', '.join(SUFFIXES)}; convert it to one of them")
        return None
    if not path.is_file():
        raise UserError(f"data.path: there is no file {path}")
    if path.stat().st_size == 0:
        raise UserError(f"data.path: {path} is empty")
    return path


def read_records(config: DatasetConfig, context: Context, cache: Path) -> Iterator[Record]:
    """The records of a data set, in its order or, with `shuffle`, in one drawn from the recipe's seed.

    Raises `UserError` for what is missing, gated, broken (with the line, for JSON) or lacks a column.
    """
    data = _load(config, context, cache)
    columns = config.columns
    names = list(data.column_names or [])
    missing = [f"{key}: {column}" for key, column in columns.items() if column not in names]
    if missing:
        raise UserError(
            f"data.{', data.'.join(missing)}: {config.path} has no such column; it has: {', '.join(names) or 'none'}"
        )
    order = list(range(len(data)))
    if config.shuffle:
        random.Random(f"{context.seed}/data").shuffle(order)
    data = data.select_columns(list(columns.values()))
    for number in order:
        try:
            values = data[number]
        except UnicodeDecodeError as error:  # `datasets` takes bytes as they come
            raise UserError(f"data.path: {config.path} could not be read: {_why(config, context, error)}") from error
        yield _record(number, {key: values[column] for key, column in columns.items()}, config)


def _load(config: DatasetConfig, context: Context, cache: Path) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path = local_file(config, context)
    with _quiet(datasets):
        if path is not None:
            try:
                kind = SUFFIXES[path.suffix.lower()]
                return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))
            except (DatasetGenerationError, OSError, ValueError, TypeError) as error:
                raise UserError(f"data.path: {path} could not be read: {_why(config, context, error)}") from error
        try:
            return datasets.load_dataset(config.path, config.subset, split=config.split, cache_dir=str(cache))
        except (DatasetNotFoundError, DatasetGenerationError) as error:
            raise UserError(f"data.path: {config.path!r} is no file and cannot be had from the Hub: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:  # no network; no such split or subset; a script
            raise UserError(f"data.path: the data set {config.path!r} could not be loaded: {error}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """`datasets` logs tracebacks and draws its own bars; what goes wrong is said once, by us."""
    logger = logging.getLogger("datasets")
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _why(config: DatasetConfig, context: Context, error: BaseException) -> str:
    """What is wrong with a data set, with the line if it is a file of JSON lines."""
    path = context.resolve(config.path)
    if config.local and path.suffix.lower() == ".jsonl":
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line) if line.strip() else {}
                except ValueError as wrong:  # UnicodeDecodeError is one
                    return f"line {number} is not valid JSON: {wrong}"
                if not isinstance(record, dict):
                    return f"line {number} is not a JSON object"
    if "corresponds to no data" in str(error):
        return "it has no rows"
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip() or type(error).__name__


def _record(number: int, values: dict[str, Any], config: DatasetConfig) -> Record:
    if "text" in values:
        text = _words(values["text"], "text", number, config)
        return Record(number, text=text) if text.strip() else Record(number, dropped="empty")
    if "messages" in values:
        return _conversation(number, values["messages"], config)
    prompt, response = (_words(values[key], key, number, config) for key in ("prompt", "response"))
    if not prompt.strip() or not response.strip():
        return Record(number, dropped="empty")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return Record(number, messages=turns)


def _words(value: Any, key: str, number: int, config: DatasetConfig) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):  # a CSV column of numbers is read as numbers
        return str(value)
    column = config.columns[key]
    raise UserError(
        f"data.{key}: row {number + 1} of {PurePath(config.path).name} has a {type(value).__name__} in column "
        f"{column!r}, which has to hold text"
    )


def _conversation(number: int, value: Any, config: DatasetConfig) -> Record:
    if not value:
        return Record(number, dropped="empty")
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        raise UserError(
            f"data.messages: row {number + 1} of {PurePath(config.path).name} has to hold a list of "
            "{role, content} in column " + repr(config.messages)
        )
    turns = [{"role": str(m["role"]), "content": m["content"]} for m in value]
    unknown = sorted({turn["role"] for turn in turns} - set(ROLES))
    if unknown:
        raise UserError(
            f"data.messages: row {number + 1} of {PurePath(config.path).name} has the role {unknown[0]!r}; "
            f"roles are {', '.join(ROLES)}"
        )
    if not all(isinstance(turn["content"], str) and turn["content"].strip() for turn in turns):
        return Record(number, dropped="empty")
    while turns and turns[-1]["role"] != "assistant":  # nothing of these would be learned
        turns.pop()
    speakers = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not speakers or speakers[0] != "user":
        return Record(number, dropped="no_answer" if not speakers else "no_prompt")
    return Record(number, messages=turns)

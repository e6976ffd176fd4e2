"""Users' data sets: a name on the Hub, or a JSONL, Parquet or CSV file, read through `datasets`."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..stage import Context
from .config import SUFFIXES, Columns
from .rows import Messages

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """One record of a data set, as a conversation or as text; or why it cannot be used."""

    number: int  # in the data set, from 0
    messages: Messages | None = None
    text: str | None = None
    dropped: str = ""  # empty: usable
    answer: str = ""  # the final answer, where a column has it
    tests: str = ""  # Python tests, where a column has them


@dataclass(frozen=True)
class Source:
    """One data set, and where the recipe names it."""

    config: Columns
    context: Context
    where: str = "data"  # or data.sets.0

    @property
    def path(self) -> Path:
        return self.context.resolve(self.config.path)


def local_file(source: Source) -> Path | None:
    """The file a local data set is in, or None for one on the Hub; `UserError` if it is not there or empty."""
    path, where = source.path, source.where
    if not source.config.local:
        if path.exists():
            raise UserError(f"{where}.path: {source.config.path} is not one of {', '.join(SUFFIXES)}; convert it")
        return None
    if not path.is_file():
        raise UserError(f"{where}.path: there is no file {path}")
    if path.stat().st_size == 0:
        raise UserError(f"{where}.path: {path} is empty")
    return path


def read_records(source: Source, cache: Path, shuffle: str | None = None) -> Iterator[Record]:
    """The records of a data set, in its order or in one drawn from the seed `shuffle`.

    Raises `UserError` for what is missing, gated, broken (with the line, for JSON) or lacks a column.
    """
    data = _load(source, cache)
    columns = source.config.columns
    names = list(data.column_names or [])
    missing = [f"{key}: {column}" for key, column in columns.items() if column not in names]
    if missing:
        raise UserError(
            f"{', '.join(f'{source.where}.{name}' for name in missing)}: {source.config.path} has no such column; "
            f"it has: {', '.join(names) or 'none'}"
        )
    order = list(range(len(data)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
    data = data.select_columns(sorted(set(columns.values())))
    for number in order:
        try:
            values = data[number]
        except UnicodeDecodeError as error:  # `datasets` takes bytes as they come
            raise UserError(
                f"{source.where}.path: {source.config.path} could not be read: {_why(source, error)}"
            ) from error
        yield _record(number, {key: values[column] for key, column in columns.items()}, source)


def _load(source: Source, cache: Path) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path, config, where = local_file(source), source.config, source.where
    with _quiet(datasets):
        if path is not None:
            try:
                kind = SUFFIXES[path.suffix.lower()]
                return datasets.load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))
            except (DatasetGenerationError, OSError, ValueError, TypeError) as error:
                raise UserError(f"{where}.path: {path} could not be read: {_why(source, error)}") from error
        try:
            return datasets.load_dataset(config.path, config.subset, split=config.split, cache_dir=str(cache))
        except (DatasetNotFoundError, DatasetGenerationError) as error:
            raise UserError(
                f"{where}.path: {config.path!r} is no file and cannot be had from the Hub: {error}"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:  # no network; no such split or subset; a script
            raise UserError(f"{where}.path: the data set {config.path!r} could not be loaded: {error}") from error


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


def _why(source: Source, error: BaseException) -> str:
    """What is wrong with a data set, with the line if it is a file of JSON lines."""
    path = source.path
    if source.config.local and path.suffix.lower() == ".jsonl":
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


def _record(number: int, values: dict[str, Any], source: Source) -> Record:
    words = {key: _words(value, key, number, source) for key, value in values.items() if key != "messages"}
    extra = {"answer": words.get("answer", "").strip(), "tests": words.get("tests", "")}
    if "text" in values:
        return Record(number, text=words["text"]) if words["text"].strip() else Record(number, dropped="empty")
    if "messages" in values:
        return replace(_conversation(number, values["messages"], source), **extra)
    prompt, response, more = words["prompt"], words["response"], words.get("context", "").strip()
    if not prompt.strip() or not response.strip():
        return Record(number, dropped="empty")
    asked = {"role": "user", "content": f"{prompt}\n\n{more}" if more else prompt}
    return Record(number, messages=[asked, {"role": "assistant", "content": response}], **extra)


def _words(value: Any, key: str, number: int, source: Source) -> str:
    if value is None:
        return ""
    if isinstance(value, (str, int, float)):  # a CSV column of numbers is read as numbers
        return str(value)
    if key == "tests" and isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)  # one assertion each
    column = source.config.columns[key]
    raise UserError(
        f"{source.where}.{key}: row {number + 1} of {source.config.title} has a {type(value).__name__} in column "
        f"{column!r}, which has to hold text"
    )


def _conversation(number: int, value: Any, source: Source) -> Record:
    where = f"{source.where}.messages: row {number + 1} of {source.config.title}"
    if not value:
        return Record(number, dropped="empty")
    if not isinstance(value, list) or not all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        raise UserError(f"{where} has to hold a list of {{role, content}} in column {source.config.messages!r}")
    turns = [{"role": str(m["role"]), "content": m["content"]} for m in value]
    unknown = sorted({turn["role"] for turn in turns} - set(ROLES))
    if unknown:
        raise UserError(f"{where} has the role {unknown[0]!r}; roles are {', '.join(ROLES)}")
    if not all(isinstance(turn["content"], str) and turn["content"].strip() for turn in turns):
        return Record(number, dropped="empty")
    while turns and turns[-1]["role"] != "assistant":  # nothing of these would be learned
        turns.pop()
    speakers = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not speakers or speakers[0] != "user":
        return Record(number, dropped="no_answer" if not speakers else "no_prompt")
    return Record(number, messages=turns)

"""Readers for users' data sets: a JSONL, JSON, Parquet or CSV file, read literally, or a Hub name, via `datasets`."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import check_file_exists
from ..core.stage import Context
from .config import Columns
from .prose_config import SUFFIXES
from .rows import Messages
from .tables import Table, open_table
from .turns import UNICODE, Unusable, conversation, is_unicode, literal, tool_definitions

CONVERSATIONS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("problem", "solution"),
    ("query", "response"),
    ("input", "output"),
    ("question", "response"),
    ("prompt", "answer"),
    ("prompt", "output"),
)
TEXTS = ("text", "content")


@dataclass(frozen=True)
class DatasetRecord:
    """One record of a data set: a conversation, a text, or the reason it cannot be used."""

    number: int  # in the data set, from 0
    messages: Messages | None = None
    text: str | None = None
    dropped: str = ""  # empty: usable
    answer: str = ""  # the final answer, if a column has it
    tests: str = ""  # Python tests, if a column has them
    tools: list[Any] | None = None  # tool definitions of the conversation
    detail: str = ""  # for a dropped record: what is wrong, and where
    place: str = ""  # such as "line 3 of x.jsonl"


@dataclass(frozen=True)
class DatasetSource:
    """One data set, and its key in the recipe."""

    config: Columns
    context: Context
    where: str = "data"  # or data.sets.0

    @property
    def path(self) -> Path:
        return self.context.resolve(self.config.path)


def local_file(source: DatasetSource) -> Path | None:
    """The file of a local data set, or None for one on the Hub; raises `UserError` if it is missing or empty."""
    path, where = source.path, source.where
    if not source.config.local:
        if path.exists():
            raise UserError(f"{where}.path: {source.config.path} is not a {' or '.join(SUFFIXES)} file; convert it")
        return None
    check_file_exists(path, f"{where}.path: ")
    if path.stat().st_size == 0:
        raise UserError(f"{where}.path: {path} is empty")
    return path


def read_records(
    source: DatasetSource, cache: Path, shuffle: str | None = None, table: Table | None = None
) -> Iterator[DatasetRecord]:
    """The records of a data set, in its own order or shuffled with the seed `shuffle`; those of `table` if given.

    Raises `UserError` if the data set is missing, gated, broken (names the line) or lacks a column (names the recipe
    key that would read the existing columns).
    """
    columns = dict(source.config.columns)
    if "text" not in columns:
        columns.setdefault("tools", "tools")
    table = table or _open(source, list(columns.values()), cache)
    if source.config.tools is None and "tools" not in table.columns:
        columns.pop("tools", None)
    _check_columns(source, columns, table.columns)
    order = list(range(len(table)))
    if shuffle is not None:
        random.Random(shuffle).shuffle(order)
    for number in order:
        row = table.row(number)
        values = {key: row.get(column) for key, column in columns.items()}
        if source.config.tools is None and "prompt" in values and not isinstance(values["prompt"], list):
            values.pop("tools", None)  # an unrelated column of this name
        yield _record(number, values, table, source, columns)


def _check_columns(source: DatasetSource, columns: dict[str, str], names: Sequence[str]) -> None:
    missing = [f"{source.where}.{key}: {column}" for key, column in columns.items() if column not in names]
    if missing:
        advice = advise(names)
        raise UserError(
            f"{', '.join(missing)}: {source.config.path} has no such column; it has: {', '.join(names) or 'none'}"
            + (f". To read it, set {advice} under {source.where}" if advice else "")
        )


def advise(names: Sequence[str]) -> str:
    """The recipe keys that would read a data set with these columns; empty if that is unclear."""
    for name in CONVERSATIONS:
        if name in names:
            return f"`messages: {name}`"
    for prompt, response in PAIRS:
        if prompt in names and response in names:
            context = next((c for c in ("context", "input") if c in names and c != prompt), None)
            return f"`prompt: {prompt}, response: {response}`" + (f" and `context: {context}`" if context else "")
    return next((f"`text: {name}`" for name in TEXTS if name in names), "")


def _open(source: DatasetSource, wanted: Sequence[str], cache: Path) -> Table:
    path = local_file(source)
    if path is not None:
        return open_table(path, wanted, cache, f"{source.where}.path: ")
    return HubTable(_load_from_hub(source, cache), wanted, source)


class HubTable:
    """A data set of the Hub."""

    pads = True

    def __init__(self, data: Any, wanted: Sequence[str], source: DatasetSource):
        self.columns: Sequence[str] = list(data.column_names or [])
        self._data = data.select_columns(sorted({name for name in wanted if name in self.columns}))
        self._source = source

    def __len__(self) -> int:
        return len(self._data)

    def row(self, number: int) -> dict[str, Any]:
        try:
            return self._data[number]
        except UnicodeDecodeError as error:  # `datasets` does not check encodings on loading
            raise UserError(f"{self._source.where}.path: {self.place(number)} is not UTF-8 text: {error}") from error

    def place(self, number: int) -> str:
        return f"row {number + 1} of {self._source.config.title}"


def _load_from_hub(source: DatasetSource, cache: Path) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    config, where = source.config, source.where
    with _quiet(datasets):
        try:
            return datasets.load_dataset(config.path, config.subset, split=config.split, cache_dir=str(cache))
        except (DatasetNotFoundError, DatasetGenerationError) as error:
            raise UserError(
                f"{where}.path: {config.path!r} is not a local file and cannot be loaded from the Hub: {error}"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:  # no network; no such split or subset; a script
            raise UserError(f"{where}.path: the data set {config.path!r} could not be loaded: {error}") from error


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Silence `datasets`, which logs tracebacks and draws its own bars: errors are reported once, by us."""
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


def _record(
    number: int, values: dict[str, Any], table: Table, source: DatasetSource, columns: dict[str, str]
) -> DatasetRecord:
    place = table.place(number)
    try:
        parts = _read(values, columns, pads=table.pads)
    except Unusable as error:
        return DatasetRecord(number, dropped=error.reason, detail=f"{place} {error.detail}".strip(), place=place)
    texts = [parts.get("messages"), parts.get("text"), parts.get("tools"), parts.get("answer"), parts.get("tests")]
    if not is_unicode(texts):
        detail = f"{place} has half of a surrogate pair (such as \\ud83d alone), which is not valid text"
        return DatasetRecord(number, dropped=UNICODE, detail=detail, place=place)
    return DatasetRecord(number, place=place, **parts)


def _read(values: dict[str, Any], columns: dict[str, str], *, pads: bool) -> dict[str, Any]:
    """A row's values under the field names of `DatasetRecord`; raises `Unusable`."""

    def column(key: str, read: Callable[[Any], Any]) -> Any:
        """The value of a column converted by `read`; errors name the column."""
        try:
            return read(values.get(key))
        except Unusable as error:
            raise Unusable(error.reason, f"(column {columns[key]!r}) {error.detail}") from error

    if "text" in values:
        text = column("text", _words)
        if not text.strip():
            raise Unusable("empty", f"has an empty column {columns['text']!r}")
        return {"text": text}
    if "messages" in values:
        turns = column("messages", lambda value: conversation(value, pads=pads))
    else:
        turns = _pair(column, pads)
    parts: dict[str, Any] = {"messages": _usable(turns)}
    if "answer" in values:
        parts["answer"] = column("answer", _words).strip()
    if "tests" in values:
        parts["tests"] = column("tests", _tests)
    if "tools" in values:
        parts["tools"] = column("tools", lambda value: tool_definitions(value, pads=pads))
    return parts


def _pair(column: Callable[[str, Callable[[Any], Any]], Any], pads: bool) -> Messages:
    """A prompt and its response; either may be a list of messages."""

    def side(role: str) -> Callable[[Any], Messages]:
        def read(value: object) -> Messages:
            if isinstance(value, list):
                return conversation(value, pads=pads)
            words = _words(value)
            return [{"role": role, "content": words}] if words.strip() else []

        return read

    prompt, response = column("prompt", side("user")), column("response", side("assistant"))
    if not prompt or not response:
        raise Unusable("empty", f"has no {'response' if prompt else 'prompt'}")
    more = column("context", _words).strip()
    if more:
        last = prompt[-1]
        prompt = [*prompt[:-1], last | {"content": f"{last['content'] or ''}\n\n{more}"}]
    return [*prompt, *response]


def _words(value: object) -> str:
    text = literal(value)
    if text is None:
        if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
            raise Unusable("messages", "holds a list of messages; read it with `messages: COLUMN`")
        raise Unusable("no_text", f"holds a {type(value).__name__}, not text")
    return text


def _tests(value: object) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)  # one assertion each
    return _words(value)


def _usable(turns: Messages) -> Messages:
    """The conversation up to its last assistant turn; raises `Unusable`."""
    if not turns:
        raise Unusable("empty", "has no messages")
    for number, turn in enumerate(turns, 1):
        says = (turn["content"] or "").strip() or turn.get("tool_calls")
        if turn["role"] in ("system", "tool"):  # these may be empty
            turn["content"] = turn["content"] or ""
        elif not says:
            raise Unusable("empty", f"has an empty message {number} (role {turn['role']})")
    while turns and turns[-1]["role"] != "assistant":  # turns after the last answer are not trained on
        turns = turns[:-1]
    speakers = [turn["role"] for turn in turns if turn["role"] != "system"]
    if not speakers or all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise Unusable("no_answer", "has no assistant turn to train on")
    if speakers[0] != "user":
        raise Unusable("no_prompt", f"starts with the role {speakers[0]}, not with a user message")
    return turns

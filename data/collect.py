"""Rows of one data set, or of several by weight: unusable rows, duplicates and rows of evaluation files are dropped."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import UserError
from ..core.stage import Context
from ..modeling.types import ModelTokenizer
from .chat import encode_text, encode_whole, special_tokens
from .config import DatasetConfig, DatasetsConfig
from .decontaminate import Overlap
from .drafts import KEPT, dropped_note, reasons
from .readers import DatasetRecord, DatasetSource, read_records
from .rewriting import Gold
from .rows import Row
from .spans import TemplateError
from .turns import strings, words

ADVICE = {
    "too_long": "raise data.length, or shorten the rows",
    "tool_call": "use a model whose chat template supports tool calls, or rows without tool calls",
    "left_out": "use a model whose chat template renders such turns, or rows without them",
    "template": "use rows that the model's chat template can render, or plain text (`text: COLUMN`)",
    "special_token": "remove the model's special tokens from the rows",
}
ASKED_FOR = ("duplicate", "contaminated")  # drops that do not count against data.max_dropped


@dataclass
class Collected:
    """Rows in the order of their ids, and counts of what was dropped."""

    golds: list[Gold]
    counts: Counter[str]  # rows by KEPT or the reason they were dropped
    contaminated: Counter[str] = field(default_factory=Counter)  # rows by evaluation file
    sets: dict[str, int] = field(default_factory=dict)  # rows by data set, if there are several


def sources(config: DatasetConfig | DatasetsConfig, context: Context) -> list[DatasetSource]:
    """The data sets of a recipe, each with its recipe key."""
    if isinstance(config, DatasetConfig):
        return [DatasetSource(config, context)]
    return [DatasetSource(part, context, f"data.sets.{i}") for i, part in enumerate(config.sets)]


def collect(
    config: DatasetConfig | DatasetsConfig, tokenizer: ModelTokenizer, context: Context, cache: Path
) -> Collected:
    """Collect rows until there are `config.rows`, or no more.

    With several data sets the next row comes from the one furthest behind its share; when one runs out, that is noted
    and the others supply the rest. Raises `UserError` for unreadable data, and if fewer than two rows are usable.
    """
    origins = sources(config, context)
    overlap = Overlap(config.decontaminate, context) if config.decontaminate else None
    sieve = _Sieve(tokenizer, config.length, overlap)
    streams = []
    for number, source in enumerate(origins):
        several = f"/{number}" if isinstance(config, DatasetsConfig) else ""
        records = read_records(source, cache, f"{context.seed}/data{several}" if config.shuffle else None)
        streams.append(sieve.usable(records, source, number, len(origins)))
    golds: list[Gold] = []
    taken = [0] * len(origins)
    with context.progress.bar("rows", config.rows) as advance:
        for number, gold in _interleaved(streams, _weights(config), config.rows, taken, origins, context):
            golds.append(gold)
            taken[number] += 1
            advance()
    sieve.tell(config, origins, context)
    _enough(config, golds, sieve, context)
    result = Collected(sorted(golds, key=lambda gold: gold.row.id), sieve.counts)
    if overlap is not None:
        result.contaminated = Counter({name: overlap.counts[name] for name in overlap.names})
    if isinstance(config, DatasetsConfig):
        for source, count in zip(origins, taken, strict=True):
            result.sets[source.config.title] = result.sets.get(source.config.title, 0) + count
    return result


def _weights(config: DatasetConfig | DatasetsConfig) -> list[float]:
    weights = [part.weight for part in config.sets] if isinstance(config, DatasetsConfig) else [1.0]
    return [weight / sum(weights) for weight in weights]


def _interleaved(
    streams: Sequence[Iterator[Gold]],
    weights: Sequence[float],
    wanted: int | None,
    taken: Sequence[int],
    found: Sequence[DatasetSource],
    context: Context,
) -> Iterator[tuple[int, Gold]]:
    """(data set, row) pairs, `wanted` of them or all; `taken` counts the rows the caller has taken from each set."""
    left = list(range(len(streams)))
    while left and (wanted is None or sum(taken) < wanted):
        total = sum(taken) + 1
        # The one behind by the most rows; in a tie, the first.
        number = max(left, key=lambda i: (weights[i] * total - taken[i], -i))
        gold = next(streams[number], None)
        if gold is not None:
            yield number, gold
            continue
        left.remove(number)
        if len(streams) > 1:
            rest = "; the other data sets supply the rest" if left else ""
            context.progress.note(f"{found[number].config.title} ran out after {taken[number]} rows{rest}")


class _Sieve:
    """Passes usable rows and counts the dropped ones."""

    def __init__(self, tokenizer: ModelTokenizer, length: int, overlap: Overlap | None):
        self.tokenizer, self.length, self.overlap = tokenizer, length, overlap
        self.special = list(special_tokens(tokenizer).values())
        self.seen: set[str] = set()
        self.by_set: dict[int, Counter[str]] = {}
        self.details: dict[int, str] = {}  # for each set, the first dropped row and why

    @property
    def counts(self) -> Counter[str]:
        """Counts over all data sets."""
        return sum(self.by_set.values(), Counter())

    def usable(self, records: Iterator[DatasetRecord], source: DatasetSource, number: int, of: int) -> Iterator[Gold]:
        """The usable rows of data set `number` out of `of`; ids interleave, so each is used once."""
        counts = self.by_set.setdefault(number, Counter())
        for record in records:
            reason, detail = self._look(record)
            counts[reason] += 1
            if reason not in (KEPT, *ASKED_FOR):
                self.details.setdefault(number, f"{reason}: {detail or record.place}")
            if reason == KEPT:
                title, id = source.config.title, record.number * of + number
                row = Row(id, "train", record.messages, record.text, title, tools=record.tools)
                yield Gold(row, source.config.rewrite, record.answer, record.tests)

    def tell(self, config: DatasetConfig | DatasetsConfig, found: Sequence[DatasetSource], context: Context) -> None:
        """Report how many rows were dropped and why; raises `UserError` if a data set loses too many."""
        for number, source in enumerate(found):
            counts = self.by_set.get(number, Counter())
            note = dropped_note(counts)
            if not note:
                continue
            context.progress.note(f"{source.config.title}: {note}")
            counted = {reason: n for reason, n in counts.items() if reason not in ASKED_FOR}
            total = sum(counted.values())
            lost = total - counted.get(KEPT, 0)
            if lost > config.max_dropped * total:
                raise UserError(
                    f"{source.where}.path: {lost} of {total} rows of {source.config.title} cannot be used "
                    f"({reasons(counted)}), more than the {config.max_dropped:.0%} that data.max_dropped allows; "
                    f"the first: {self.details[number]}. To fix it, {_advice(counted)}"
                )

    def _look(self, record: DatasetRecord) -> tuple[str, str]:
        """KEPT or the reason for dropping the record, and a message if the reason alone is not enough."""
        if record.dropped:
            return record.dropped, record.detail
        if record.messages is None:
            reason, detail = ("" if encode_text(self.tokenizer, record.text or "", self.length) else "empty"), ""
        else:
            reason, detail = self._conversation(record)
        if reason:
            return reason, detail
        known = identity(record)
        if known in self.seen:
            return "duplicate", ""
        self.seen.add(known)
        if self.overlap is not None and self.overlap.overlapping(record.messages, record.text):
            return "contaminated", ""
        return KEPT, ""

    def _conversation(self, record: DatasetRecord) -> tuple[str, str]:
        messages = record.messages or []
        # Inside a template, a special token in the text could end the turn or start one of another role.
        for text in [text for message in messages for text in words(message)] + list(strings(record.tools)):
            token = next((token for token in self.special if token in text), None)
            if token is not None:
                return "special_token", f"{record.place} contains the model's special token {token}"
        try:
            size = len(encode_whole(self.tokenizer, Row(0, "train", messages, tools=record.tools)).input_ids)
        except TemplateError as error:
            return error.reason, f"{record.place}: {error}"
        if size > self.length:
            return "too_long", f"{record.place} has {size} tokens, but data.length is {self.length}"
        return "", ""


def _advice(counts: Mapping[str, int]) -> str:
    """What to do about dropped rows, for the most frequent reason."""
    reason = max((reason for reason in counts if reason != KEPT), key=lambda reason: counts[reason])
    advice = ADVICE.get(reason, "correct the rows")
    share = math.ceil(100 - 100 * counts.get(KEPT, 0) / sum(counts.values())) / 100
    return advice + (f"; or set data.max_dropped to {share:g} to drop them" if share < 1 else "")


def identity(record: DatasetRecord) -> str:
    """A key that two rows share if they differ only in case and spacing; punctuation counts as a difference."""
    turns = [message["content"] or "" for message in record.messages or []] or [record.text or ""]
    more = [message.get("tool_calls") for message in record.messages or []]
    calls = json.dumps([more, record.tools]) if any(more) or record.tools else ""
    return "\0".join([" ".join(turn.casefold().split()) for turn in turns] + ([calls] if calls else []))


def _enough(config: DatasetConfig | DatasetsConfig, golds: list[Gold], sieve: _Sieve, context: Context) -> None:
    if len(golds) < 2:
        several = isinstance(config, DatasetsConfig)
        subject = f"data.sets: the {len(config.sets)} data sets have" if several else f"data.path: {config.path} has"
        first = next(iter(sieve.details.values()), "")
        raise UserError(
            f"{subject} {len(golds)} usable rows, but at least 2 are needed: one to train on and one to "
            f"hold out (dropped: {reasons(sieve.counts) or 'none'})" + (f"; the first: {first}" if first else "")
        )
    if isinstance(config, DatasetsConfig) and len(golds) < config.rows:
        context.progress.note(f"{len(golds)} rows instead of {config.rows}: the data sets have no more")

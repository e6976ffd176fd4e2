"""Real text as rows: documents cut into rows of a given length, and exactly as many tokens to learn as are asked for.

Held-out rows come from other documents than the training rows. Every token of a row but its first is learned.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from ..core.errors import UserError
from ..core.stage import Context
from ..modeling.types import ModelTokenizer
from .chat import encode_text
from .collect import identity
from .config import Columns
from .decontaminate import Overlap
from .drafts import KEPT, reasons
from .prose_config import PYTHON_DOCS, TEXT_SUFFIXES, Prose
from .readers import DatasetRecord, DatasetSource, local_file, read_records
from .rows import Row, Split
from .tables import Table
from .tables.text_files import PythonDocs, TextFiles

CHARACTERS = 8  # per token, that are read first to find a row's end
WORDS = 16  # tokens that a row may be shorter, to end between two words
FEWEST_BYTES = 2.5  # per token; English has about 4, text that is split into characters or bytes at most 2.4


@dataclass(frozen=True)
class ProseSource:
    """Real text, and its key in the recipe."""

    config: Prose
    context: Context
    where: str = "data"  # or data.prose

    @property
    def columns(self) -> DatasetSource:
        """The same as a data set with a column of text."""
        own = self.config
        columns = Columns(path=own.path, subset=own.subset, split=own.split, text=own.text or "text")
        return DatasetSource(columns, self.context, self.where)

    @property
    def title(self) -> str:
        """A file's or folder's name, or the data set's."""
        if self.config.is_text and self.config.path != PYTHON_DOCS:
            return PurePath(self.config.path).name
        return self.columns.config.title

    def files(self) -> list[Path] | None:
        """The text files, in order; None for other sources. Raises `UserError` if there are none."""
        config, path = self.config, self.context.resolve(self.config.path)
        if config.path == PYTHON_DOCS:
            return None
        if not config.is_text:
            if path.is_dir():
                raise UserError(f"{self.where}.path: {config.path} is a folder; write {config.path}/ to read its files")
            local_file(self.columns)
            return None
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in TEXT_SUFFIXES and file.is_file())
            if not found:
                raise UserError(
                    f"{self.where}.path: the folder {path} has no text files ({', '.join(TEXT_SUFFIXES)}); name a data "
                    "set's file by its own path"
                )
            return found
        if not path.is_file():
            raise UserError(f"{self.where}.path: {path} does not exist")
        return [path]

    def table(self) -> Table | None:
        """The documents of text; None for data sets, which the readers open."""
        if self.config.path == PYTHON_DOCS:
            return PythonDocs()
        files = self.files()
        return None if files is None else TextFiles(files, self.config.separator, f"{self.where}.path: ")


@dataclass
class SplitGoal:
    """The rows of one split, up to `goal` tokens to learn."""

    split: Split
    goal: int
    taken: int = 0  # tokens to learn
    documents: int = 0
    full: bool = False

    @property
    def filled(self) -> float:
        """The share of the goal that is reached."""
        return self.taken / self.goal if self.goal else 1.0


@dataclass
class Taken:
    """What was taken of a text."""

    rows: list[Row]  # of both splits, in the order of the documents
    counts: Counter[str]  # documents by KEPT or the reason they were dropped
    documents: dict[str, int]  # split → documents
    bytes_per_token: float


def take(
    source: ProseSource,
    train: int,
    heldout: int,
    tokenizer: ModelTokenizer,
    length: int,
    cache: Path,
) -> Taken:
    """Rows of `length` tokens with exactly `train` and `heldout` tokens to learn; ids count from 0.

    Documents are read in order, or shuffled by the run's seed; each goes to the split that lacks the larger share of
    its goal. What exceeds a goal is left. A goal is missed only where one character has more tokens than are missing,
    and by these few. Raises `UserError` if the text is too short, saying how many tokens there are and are needed.
    """
    parts = [SplitGoal("train", train), SplitGoal("heldout", heldout)]
    reader = ProseReader(source, cache)
    left: list[str] = []  # what exceeded a goal, for the message
    rows: list[Row] = []
    title = source.title
    for text in reader.documents():
        part = min(parts, key=lambda part: (part.full, part.filled))
        left.append(_fill(part, text, tokenizer, length, title, rows))
        if all(part.full for part in parts):
            break
    reader.tell()
    if not all(part.full for part in parts):
        raise too_short(source, parts, sum(learned(tokenizer, rest, length) for rest in left), reader.counts)
    tokens, size = sum(row.tokens for row in rows), sum(len((row.text or "").encode()) for row in rows)
    _tell_bytes(source, size / tokens)
    documents = {part.split: part.documents for part in parts}
    return Taken(rows, reader.counts, documents, round(size / tokens, 2))


def _fill(part: SplitGoal, text: str, tokenizer: ModelTokenizer, length: int, title: str, rows: list[Row]) -> str:
    """Add a document's rows to its split until the goal is reached; what is left of the document."""
    start, part.documents = 0, part.documents + 1
    while start < len(text):
        most = min(length, part.goal - part.taken + 1)
        end, tokens = cut(tokenizer, text, start, most, words=most == length)
        if tokens > most:  # a single character with more tokens than are missing
            part.full = True
            break
        if tokens > 1:
            row = Row(len(rows), part.split, text=text[start:end], source=title, tokens=tokens, targets=tokens - 1)
            rows.append(row)
            part.taken += tokens - 1
        start = end
        if part.taken == part.goal:
            part.full = True
            break
    return text[start:]


def cut(tokenizer: ModelTokenizer, text: str, start: int, most: int, *, words: bool = True) -> tuple[int, int]:
    """The end of a row of up to `most` tokens that begins at `start`, and its number of tokens.

    The row ends between two words if there is such a place near its end (`words`). It has more than `most` tokens only
    if one character has them.
    """
    reach = most * CHARACTERS
    while True:
        block = text[start : start + reach]
        offsets: list[tuple[int, int]] = tokenizer(block, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        whole = start + len(block) == len(text)
        if whole or len(offsets) > most:
            break
        reach *= 2
    if whole and len(offsets) <= most:
        return len(text), len(offsets)
    ends = sorted({end for _, end in offsets[:most] if end}, reverse=True)
    ends = [*_between_words(block, ends[:WORDS]), *ends] if words else ends
    tokens = most + 1
    for end in ends or [1]:  # a piece may be split otherwise than the whole, so it is counted by itself
        tokens = _count(tokenizer, block[:end])
        if tokens <= most:
            return start + end, tokens
    return start + (ends or [1])[-1], tokens


def _between_words(block: str, ends: Sequence[int]) -> list[int]:
    """The first of the ends that is between two words, if one is."""
    return [end for end in ends if end < len(block) and (block[end].isspace() or block[end - 1].isspace())][:1]


def _count(tokenizer: ModelTokenizer, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def learned(tokenizer: ModelTokenizer, text: str, length: int) -> int:
    """Tokens to learn in a text that is cut into rows."""
    return sum(sum(window.loss_mask) for window in encode_text(tokenizer, text, length))


class ProseReader:
    """Reads a source's usable documents and counts the dropped ones."""

    def __init__(self, source: ProseSource, cache: Path):
        self.source, self.cache = source, cache
        self.counts: Counter[str] = Counter()
        config = source.config
        self.overlap = Overlap(config.decontaminate, source.context, source.where) if config.decontaminate else None
        self._seen: set[bytes] = set()

    def documents(self) -> Iterator[str]:
        """The texts of usable documents, in the order in which they are read."""
        source, context = self.source, self.source.context
        shuffle = f"{context.seed}/prose" if source.config.shuffle else None
        for record in read_records(source.columns, self.cache, shuffle, source.table()):
            reason = self._look(record)
            self.counts[reason] += 1
            if reason == KEPT:
                yield record.text or ""

    def _look(self, record: DatasetRecord) -> str:
        if record.dropped:
            return record.dropped
        known = hashlib.sha256(identity(record).encode()).digest()
        if known in self._seen:
            return "duplicate"
        self._seen.add(known)
        if self.overlap is not None and self.overlap.overlapping(None, record.text):
            return "contaminated"
        return KEPT

    def tell(self) -> None:
        """Report how many documents were dropped, and why."""
        total, dropped = sum(self.counts.values()), reasons(self.counts)
        if dropped:
            lost = total - self.counts[KEPT]
            self.source.context.progress.note(f"{self.source.title}: {lost} of {total} documents dropped ({dropped})")


def _tell_bytes(source: ProseSource, size: float) -> None:
    if size < FEWEST_BYTES:
        source.context.progress.note(
            f"warning: {source.title}: a token has {size:.1f} bytes of this text (English: about 4): the "
            "tokenizer splits it into characters or bytes, as it does with languages that the model hardly knows; use "
            "text in a language that it was trained on"
        )


def too_short(source: ProseSource, parts: Sequence[SplitGoal], left: int, counts: Counter[str]) -> UserError:
    """The error for a text that does not reach its goals."""
    there, needed = sum(part.taken for part in parts) + left, sum(part.goal for part in parts)
    documents = counts[KEPT]
    goals = " and ".join(f"{part.goal} {'to hold out' if part.split == 'heldout' else 'to learn'}" for part in parts)
    dropped = sum(n for reason, n in counts.items() if reason != KEPT)
    where = f"{source.where}.path: {source.title} has {there} tokens in {documents} document{'s' * (documents != 1)}"
    where += f" ({dropped} more documents are dropped)" if dropped else ""
    if there < needed:
        return UserError(f"{where}, but {needed} are needed ({goals}): name more text, or ask for fewer tokens")
    advice = "name more documents" + (
        ", or split the files where documents begin (`separator`)" if source.config.is_text else ""
    )
    return UserError(
        f"{where}, but these cannot be divided into {goals}: held-out rows come from other documents than the training "
        f"rows; {advice}"
    )

"""Finds rows that overlap with evaluation files, by shared n-grams (as in arXiv 2005.14165, appendix C)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

from ..core.errors import UserError
from ..core.files import check_file_exists, json_lines, read_text
from ..core.stage import Context
from .drafts import normalised
from .prose_config import Decontaminate
from .rows import Messages
from .turns import strings
from .turns import words as said

SUFFIXES = (".jsonl", ".txt")


class Overlap:
    """The n-grams of all texts in the evaluation files, and the number of rows dropped because of each file."""

    def __init__(self, config: Decontaminate, context: Context, where: str = "data"):
        self.size = config.ngram
        self.counts: Counter[str] = Counter()
        self.names = _names(config.files)
        self._ngrams: dict[str, str] = {}  # n words → the first file that contains them
        self._short: dict[str, str] = {}  # a whole text of fewer than n words → the first file that contains it
        for name, file in zip(self.names, config.files, strict=True):
            for text in read_texts(evaluation_file(file, context, where)):
                words = normalised(text).split()
                if len(words) < self.size and words:
                    self._short.setdefault(" ".join(words), name)
                for ngram in self._cut(words):
                    self._ngrams.setdefault(ngram, name)

    def overlapping(self, messages: Messages | None, text: str | None) -> str | None:
        """The file that a row overlaps with (counted in `counts`), or None.

        A text shorter than n words, such as a one-word choice, must equal a whole user turn: a one-word answer proves
        nothing.
        """
        turns = messages or [{"role": "user", "content": text or ""}]
        for turn in turns:
            words = normalised(" ".join(said(turn))).split()
            name = self._short.get(" ".join(words)) if turn["role"] == "user" else None
            name = name or next((self._ngrams[ngram] for ngram in self._cut(words) if ngram in self._ngrams), None)
            if name is not None:
                self.counts[name] += 1
                return name
        return None

    def _cut(self, words: list[str]) -> Iterator[str]:
        return (" ".join(words[i : i + self.size]) for i in range(len(words) - self.size + 1))


def evaluation_file(file: str, context: Context, where: str = "data") -> Path:
    """The path of an evaluation file; raises `UserError`, naming the key under `where`, if it is missing or of an
    unsupported type."""
    path = context.resolve(file)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{where}.decontaminate.files: {file} is not a {' or '.join(SUFFIXES)} file; convert it")
    check_file_exists(path, f"{where}.decontaminate.files: ")
    return path


def read_texts(path: Path) -> Iterator[str]:
    """All texts of a file: every string in its JSON rows, or the whole of a .txt file."""
    prefix = "data.decontaminate.files: "
    if path.suffix.lower() == ".txt":
        yield read_text(path, prefix)
        return
    for _, row in json_lines(path, prefix):
        yield from strings(row)


def _names(files: list[str]) -> list[str]:
    """The file names without folders; paths as given where two names would be equal."""
    names = [PurePath(file).name for file in files]
    return [name if names.count(name) == 1 else file for name, file in zip(names, files, strict=True)]

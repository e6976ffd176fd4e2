"""Text files as a table: a document per file, or per part of a file; and Python's own documentation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ...core.files import read_text

COLUMN = "text"
Place = tuple[Path, int, tuple[int, int] | None]  # file, number of the document in it, its bytes (None: all)


class TextFiles:
    """The documents of UTF-8 text files, in order. A file is one document; with `separator` a new one begins wherever
    it occurs. Joined, the documents of a file are its text."""

    pads = False
    columns: Sequence[str] = (COLUMN,)

    def __init__(self, files: Sequence[Path], separator: str | None, what: str = ""):
        self.separator, self.what = separator, what
        self._places = [place for file in files for place in self._documents(file)]

    def __len__(self) -> int:
        return len(self._places)

    def row(self, number: int) -> dict[str, Any]:
        file, _, span = self._places[number]
        return {COLUMN: read_text(file, self.what) if span is None else _read_part(file, *span)}

    def place(self, number: int) -> str:
        file, part, _ = self._places[number]
        return file.name if self.separator is None else f"document {part + 1} of {file.name}"

    def _documents(self, file: Path) -> list[Place]:
        """Where the documents of a file begin and end, so that reading one in random order reads that one alone."""
        if self.separator is None:
            return [(file, 0, None)]
        sizes = [len(part.encode()) for part in split_text(read_text(file, self.what), self.separator)]
        ends = list(accumulate(sizes, initial=file.stat().st_size - sum(sizes)))  # behind a mark or an empty start
        return [(file, part, span) for part, span in enumerate(pairwise(ends))]


def _read_part(file: Path, start: int, end: int) -> str:
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(end - start).decode()


def split_text(text: str, separator: str | None) -> list[str]:
    """The parts of a text; each but the first begins with the separator."""
    if separator is None:
        return [text]
    first, *rest = text.split(separator)
    return ([first] if first.strip() else []) + [separator + part for part in rest]


class PythonDocs:
    """The pages of Python's language reference, which comes with it (the module pydoc_data.topics)."""

    pads = False
    columns: Sequence[str] = (COLUMN,)

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        self._topics = sorted(topics.items())

    def __len__(self) -> int:
        return len(self._topics)

    def row(self, number: int) -> dict[str, Any]:
        return {COLUMN: self._topics[number][1]}

    def place(self, number: int) -> str:
        return f"the page {self._topics[number][0]!r}"

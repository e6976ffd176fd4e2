"""Text files as a table: a document per file, or per part of a file; and Python's own documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.files import read_text

COLUMN = "text"


class TextFiles:
    """The documents of UTF-8 text files, in order. A file is one document; with `separator` a new one begins wherever
    it occurs. Joined, the documents of a file are its text."""

    pads = False
    columns: Sequence[str] = (COLUMN,)

    def __init__(self, files: Sequence[Path], separator: str | None, what: str = ""):
        self.separator, self.what = separator, what
        self._last: tuple[Path, list[str]] | None = None
        self._places = [(file, part) for file in files for part in range(self._count(file))]

    def __len__(self) -> int:
        return len(self._places)

    def row(self, number: int) -> dict[str, Any]:
        file, part = self._places[number]
        return {COLUMN: self._parts(file)[part]}

    def place(self, number: int) -> str:
        file, part = self._places[number]
        return file.name if self.separator is None else f"document {part + 1} of {file.name}"

    def _count(self, file: Path) -> int:
        return 1 if self.separator is None else len(self._parts(file))

    def _parts(self, file: Path) -> list[str]:
        """A file's documents; the last file stays in memory."""
        if self._last is None or self._last[0] != file:
            self._last = file, split_text(read_text(file, self.what), self.separator)
        return self._last[1]


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

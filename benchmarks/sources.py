"""Files that a benchmark learns from: documents of text, and a model that comes in parts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.api import UserError
from compress.core.files import json_lines, read_text
from compress.data.prose_config import PYTHON_DOCS, TEXT_SUFFIXES
from compress.data.tables.text_files import PythonDocs

DOCUMENT = 4000  # characters; longer text files are cut into documents behind a line


def joined(parts: Sequence[Path], work: Path) -> Path:
    """The model file that comes in parts."""
    whole = work / f"{parts[0].name.split('.')[0]}.gguf"
    size = sum(part.stat().st_size for part in parts)
    if not whole.exists() or whole.stat().st_size != size:
        partial = whole.with_suffix(".partial")
        with partial.open("wb") as file:
            for part in parts:
                with part.open("rb") as opened:
                    shutil.copyfileobj(opened, file)
        partial.replace(whole)
    return whole


def documents_of(name: str) -> Iterator[str]:
    """The documents of a file."""
    if name == PYTHON_DOCS:
        docs = PythonDocs()
        yield from (docs.row(number)["text"] for number in range(len(docs)))
        return
    file = Path(name)
    if file.suffix.lower() == ".jsonl":
        for number, row in json_lines(file, "--text: "):
            columns = ["text"] if "text" in row else ["prompt", "response"]
            if not all(isinstance(row.get(column), str) for column in columns):
                raise UserError(f"--text: line {number} of {file} has no text, or no prompt and response")
            yield "\n".join(row[column] for column in columns)
        return
    if file.suffix.lower() not in TEXT_SUFFIXES:
        raise UserError(f"--text: {file} is not .txt, .md, .rst, .jsonl or {PYTHON_DOCS}")
    part: list[str] = []
    for line in read_text(file, "--text: ").splitlines(keepends=True):
        part.append(line)
        if sum(map(len, part)) >= DOCUMENT:
            yield "".join(part)
            part = []
    if part:
        yield "".join(part)

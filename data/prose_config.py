"""Keys of the recipe's `data` section for real text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import PurePath
from typing import Self

from pydantic import Field, model_validator

from ..core.errors import UserError
from ..core.stage import Section

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")  # of data sets
TEXT_SUFFIXES = (".txt", ".md", ".rst")
PYTHON_DOCS = "builtin:python-docs"  # the language reference that comes with every Python (PSF licence)


class Decontaminate(Section):
    """Drop rows that share words with evaluation files."""

    files: list[str] = Field(min_length=1, description="evaluation files, .jsonl or .txt; every text in them counts")
    ngram: int = Field(default=13, ge=2, description="n-gram size in words; shorter texts are compared as a whole")


class Prose(Section):
    """Real text: where its documents come from."""

    path: str = Field(
        min_length=1,
        description="a text file (.txt, .md, .rst), a folder of them (written with a / at its end), a .jsonl, .json, "
        f".parquet or .csv file, a data set's Hub name, or {PYTHON_DOCS} (the language reference that Python ships)",
    )
    subset: str | None = Field(default=None, description="the Hub data set's configuration, if it has several")
    split: str = Field(default="train", description="the Hub data set's split")
    text: str | None = Field(
        default=None, description="column with the text, for data sets; a row is a document (default: text)"
    )
    separator: str | None = Field(
        default=None,
        min_length=1,
        description="in text files: characters that begin a new document; null: a file is one document",
    )
    shuffle: bool = Field(default=True, description="read documents in random order, seeded by the recipe's seed")
    decontaminate: Decontaminate | None = Field(
        default=None, description="drop documents that overlap with evaluation files"
    )

    @model_validator(mode="after")
    def _columns_or_files(self) -> Self:
        columns = (self.subset, self.text, self.split) != (None, None, "train")
        if self.is_text and columns:
            raise ValueError("text files have no columns, subsets or splits: leave text, subset and split out")
        if self.separator is not None and not self.is_text:
            raise ValueError("separator is for text files; here every row is a document")
        return self

    @property
    def is_text(self) -> bool:
        """Whether `path` is text itself, rather than a data set with a column of text."""
        suffix = PurePath(self.path).suffix.lower()
        folder = self.path.endswith("/") or self.path.startswith(("/", "./", "../", "~"))
        return self.path == PYTHON_DOCS or suffix in TEXT_SUFFIXES or (folder and suffix not in SUFFIXES)

    def prose_files(self) -> list[str]:
        """The local files and folders that it names."""
        local = self.is_text or PurePath(self.path).suffix.lower() in SUFFIXES
        path = documentation() if self.path == PYTHON_DOCS else self.path
        return ([path] if local else []) + (self.decontaminate.files if self.decontaminate else [])


class ProseBeside(Prose):
    """Real text beside the rows of a source."""

    weight: float = Field(
        default=1.0,
        gt=0,
        description="its tokens to learn for each token to learn of the source's own rows; 1: half and half",
    )


def documentation() -> str:
    """The file that holds Python's own language reference."""
    found = find_spec("pydoc_data.topics")
    if found is None or found.origin is None:
        raise UserError(f"{PYTHON_DOCS}: this Python comes without its documentation (the module pydoc_data.topics)")
    return found.origin

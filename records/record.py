"""Base classes of all records: validated reading and atomic writing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from ..core.errors import UserError
from ..core.files import read_json_value, write_json


class Entry(BaseModel):
    """Part of a record; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class SparseEntry(Entry):
    """An entry that is written without keys that were not set."""

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key in self.model_fields_set}


class Record(BaseModel):
    """The contents of a JSON file with a fixed name."""

    FILE: ClassVar[str]
    TITLE: ClassVar[str]  # the file's name in error messages
    INDENT: ClassVar[int] = 1
    ASCII: ClassVar[bool] = True  # whether other characters are written as \\uXXXX

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record of a folder. `UserError`, naming file and key, if it is missing, damaged or of another version."""
        return cls.read_file(folder / cls.FILE)

    @classmethod
    def read_file(cls, path: Path) -> Self:
        """As `read`, from a file with another name."""
        try:
            return cls.model_validate(read_json_value(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "its content"
            raise UserError(f"{path} is not {cls.TITLE} of this version: {where}: {first['msg']}") from error

    @classmethod
    def read_if_there(cls, folder: Path | None) -> Self | None:
        """As `read`; None if there is no folder, or no such file in it."""
        return cls.read(folder) if folder is not None and (folder / cls.FILE).is_file() else None

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        self.write_file(folder / self.FILE)

    def write_file(self, path: Path) -> None:
        """Write the record to a file with another name."""
        write_json(path, self.contents(), indent=self.INDENT, ascii=self.ASCII)

    def contents(self) -> dict[str, Any]:
        """The file's contents."""
        return self.model_dump()

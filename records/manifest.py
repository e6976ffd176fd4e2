"""`manifest.json` of a stage's folder: what it was made from, how, and what it consists of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError

from ..core.errors import UserError
from .record import Entry, Record

E = TypeVar("E", bound=Entry)


class StageFile(Entry):
    """A file of a stage's folder."""

    bytes: int
    sha256: str


class BaseModelSource(Entry):
    """The unpruned model."""

    source: str  # as the recipe has it
    fingerprint: str


class StageManifest(Record):
    """The record of a finished stage."""

    FILE: ClassVar[str] = "manifest.json"
    TITLE: ClassVar[str] = "a stage's manifest"
    INDENT: ClassVar[int] = 2
    ASCII: ClassVar[bool] = False
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    stage: str
    fingerprint: str
    format: int  # of the stage's output
    config: dict[str, Any]  # the recipe's section
    inputs: dict[str, str]  # the fingerprints of the stages that it read
    base: BaseModelSource
    seed: int
    device: str
    dtype: str | None = None  # of weights and activations
    processes: int
    versions: dict[str, str]
    machine: dict[str, Any]
    seconds: float
    resumed: bool
    peak_memory_bytes: int  # of the process and its children
    peak_cuda_bytes: int | None  # allocated by torch
    planned_memory_bytes: int | None = None  # of the device the stage ran on
    metrics: dict[str, Any]  # the stage's own: `records.figures`
    files: dict[str, StageFile] = Field(default_factory=dict)

    @property
    def chosen(self) -> str | None:
        """Of several models that the stage made, the one that later stages go on from."""
        return self.metrics.get("chosen")

    def figures(self, kind: type[E]) -> E:
        """The metrics as the record of the stage (`records.figures`). `UserError` where they are of another version."""
        try:
            return kind.model_validate(self.metrics)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise UserError(
                f"the manifest of {self.stage}-{self.fingerprint[:12]} is not of this version: metrics.{where}: "
                f"{error.errors()[0]['msg']}; run the recipe again"
            ) from error

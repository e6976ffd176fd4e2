"""`manifest.json` of a stage's folder: what it was made from, how, and what it consists of."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from .record import Entry, Record


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
    metrics: dict[str, Any]  # the stage's own figures
    files: dict[str, StageFile] = Field(default_factory=dict)

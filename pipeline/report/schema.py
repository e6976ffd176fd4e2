"""report.json: what a run measured and made. Documented in docs/reference/report.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...records.importance import Importance
from ...records.merge import MergeRecord
from ...records.models import ModelEntry
from ...records.record import Entry
from ...records.students import Variants


class StageEntry(Entry):
    """One stage of the run."""

    name: str
    folder: str
    fingerprint: str
    seconds: float
    dtype: str | None = None  # of weights and activations; none in reports of older versions
    resumed: bool
    peak_memory_bytes: int  # of the process and its children
    peak_cuda_bytes: int | None = None  # allocated by torch
    planned_memory_bytes: int | None = None  # of the device the stage ran on
    metrics: dict[str, Any]

    @property
    def measured_memory_bytes(self) -> int:
        """What the plan is to be compared with."""
        return self.peak_memory_bytes if self.peak_cuda_bytes is None else self.peak_cuda_bytes


class Report(Entry):
    """The whole report."""

    schema_version: Literal[2] = 2
    name: str
    base: str  # the model source as the recipe has it
    measured_on: str | None  # what perplexity was measured on
    models: list[ModelEntry]
    stages: list[StageEntry]
    importance: Importance | None  # the prune stage's importance.json
    curves: list[dict[str, Any]]  # the distill stage's curves.jsonl
    sort: list[dict[str, Any]] = Field(default_factory=list)  # the sort stage's curves.jsonl
    retain: list[dict[str, Any]] = Field(default_factory=list)  # the retain stage's curves.jsonl
    variants: Variants | None = None  # the distill stage's variants.json
    merge: MergeRecord | None = None  # the merge stage's merge.json
    data: dict[str, Any] | None  # the data stage's counts
    samples: list[list[dict[str, str]]]  # a few conversations of the data stage
    rewrites: list[dict[str, str]] = Field(default_factory=list)  # prompt, gold, written, origin, why
    artifacts: list[dict[str, Any]]  # the bundle's, with their verification
    bench: dict[str, Any] | None = None  # what compress bench measured on this bundle
    recipe: str
    versions: dict[str, str]
    machine: dict[str, Any]

    def model(self, role: str) -> ModelEntry | None:
        return next((entry for entry in self.models if entry.role == role), None)

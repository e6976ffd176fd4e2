"""report.json: what a run measured and made. Documented in docs/reference/report.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ...records.bundle import ArtifactEntry
from ...records.curves import HeadLine, StudentLine
from ...records.figures import DataFigures
from ...records.importance import Importance
from ...records.merge import MergeRecord
from ...records.models import ModelEntry
from ...records.record import Entry
from ...records.students import Variants


class StageEntry(Entry):
    """One stage of the run."""

    name: str = Field(description="the stage")
    folder: str = Field(description="name of its folder")
    fingerprint: str = Field(description="hash of everything that the output depends on")
    seconds: float = Field(description="wall time")
    dtype: str | None = Field(
        default=None, description="type of weights and activations; null in reports of older versions"
    )
    resumed: bool = Field(description="whether it was interrupted and resumed")
    peak_memory_bytes: int = Field(description="peak memory of the process and its children")
    peak_cuda_bytes: int | None = Field(default=None, description="peak of torch's allocations on the GPU")
    planned_memory_bytes: int | None = Field(
        default=None, description="the plan's estimate for the device that it ran on"
    )
    metrics: dict[str, Any] = Field(description="the stage's own figures")

    @property
    def measured_memory_bytes(self) -> int:
        """What the plan is to be compared with."""
        return self.peak_memory_bytes if self.peak_cuda_bytes is None else self.peak_cuda_bytes


class Report(Entry):
    """The whole report."""

    schema_version: Literal[3] = Field(default=3, description="version of this format")
    name: str = Field(description="the run's name")
    base: str = Field(description="source of the unpruned model, as in the recipe")
    measured_on: str | None = Field(description="text that perplexity was measured on")
    models: list[ModelEntry] = Field(description="figures per model and artifact, in the order in which they were made")
    stages: list[StageEntry] = Field(description="the finished stages")
    importance: Importance | None = Field(description="the prune stage's importance.json")
    curves: list[StudentLine] = Field(description="the distill stage's curves.jsonl")
    sort: list[StudentLine] = Field(default_factory=list, description="the sort stage's curves.jsonl")
    retain: list[HeadLine] = Field(default_factory=list, description="the retain stage's curves.jsonl")
    variants: Variants | None = Field(default=None, description="the distill stage's variants.json")
    merge: MergeRecord | None = Field(default=None, description="the merge stage's merge.json")
    data: DataFigures | None = Field(description="the data stage's counts")
    samples: list[list[dict[str, str]]] = Field(description="a few conversations of the data stage")
    rewrites: list[dict[str, str]] = Field(
        default_factory=list, description="a few rewritten rows: prompt, gold, written, origin, why"
    )
    artifacts: list[ArtifactEntry] = Field(description="the bundle's artifacts with their verification")
    bench: dict[str, Any] | None = Field(default=None, description="figures of compress bench on this bundle")
    recipe: str = Field(description="the recipe's text with its overrides")
    versions: dict[str, str] = Field(description="versions of the packages")
    machine: dict[str, Any] = Field(description="machine of the run")

    def model(self, role: str) -> ModelEntry | None:
        return next((entry for entry in self.models if entry.role == role), None)

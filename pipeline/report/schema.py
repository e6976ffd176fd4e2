"""report.json: what was won, measured, and made. Documented in docs/reference/report.md."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskResult(_Entry):
    """One task: the value of one metric, and what is left of the base's."""

    kind: Literal["choice", "generation", "other"]  # of the answers: chosen, written, or neither
    metric: str
    value: float
    low: float | None = None  # the 95 % interval; none where the metric is no mean over questions
    high: float | None = None
    n: int
    chance: float | None = None  # what guessing scores
    difference: float | None = None  # to the base, on the same questions
    difference_low: float | None = None
    difference_high: float | None = None
    kept: float | None = None  # value / the base's
    kept_above_chance: float | None = None  # the same above what guessing scores
    metrics: dict[str, float] = Field(default_factory=dict)


class RetrievalResult(_Entry):
    """What a checkpoint finds again in long prompts with one policy and budget of its KV cache."""

    task: Literal["passkey", "keys", "continuation"]
    length: int  # tokens of the prompts
    depth: float | None  # where the number stands: 0 is the beginning, 1 the end
    policy: str
    budget: float | None  # as asked for: below 1 a share of the length; none where everything is kept
    entries: int | None  # the same in keys per block and KV head
    kv_bytes: int  # of keys and values, when most were held
    n: int
    value: float  # the share of numbers found; the perplexity of a continuation
    nats: float  # per token of the true answer, or of the continuation
    low: float | None = None  # the 95 % interval of a share
    high: float | None = None


class ModelEntry(_Entry):
    """One model or artifact."""

    role: str  # base, pruned, healed, recovered, merged, depth-N, gguf-TYPE, onnx-TYPE
    runtime: str
    blocks: int
    parameters: int | None
    bytes: int
    bits_per_weight: float | None = None
    perplexity: float
    kl_to_base: float | None = None  # nats per token
    top1_agreement: float | None = None
    positions: int  # tokens that the three figures above are measured on
    tokens_per_second: float | None = None  # decoding, one stream
    prefill_tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    retrieval: list[RetrievalResult] = Field(default_factory=list)


class StageEntry(_Entry):
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


class Report(_Entry):
    """The whole report."""

    schema_version: Literal[2] = 2
    name: str
    base: str  # the model source as the recipe has it
    measured_on: str | None  # what perplexity was measured on
    models: list[ModelEntry]
    stages: list[StageEntry]
    importance: dict[str, Any] | None  # the prune stage's importance.json
    curves: list[dict[str, Any]]  # the distill stage's curves.jsonl
    sort: list[dict[str, Any]] = Field(default_factory=list)  # the sort stage's curves.jsonl
    retain: list[dict[str, Any]] = Field(default_factory=list)  # the retain stage's curves.jsonl
    variants: dict[str, Any] | None = None  # the distill stage's variants.json
    merge: dict[str, Any] | None = None  # the merge stage's merge.json
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

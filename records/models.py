"""`models.json`: the evaluate stage's figures, an entry per model and artifact; the report shows the same entries."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, RootModel

from .record import Entry, Record

AnswerKind = Literal["choice", "generation", "other"]  # chosen, written, or neither
RetrievalTask = Literal["passkey", "keys", "continuation"]


class TaskResult(Entry):
    """One task: the value of one metric, and what is left of the base's."""

    kind: AnswerKind
    metric: str
    value: float
    n: int
    chance: float | None = None  # what guessing scores
    metrics: dict[str, float] = Field(default_factory=dict)
    low: float | None = None  # the 95 % interval; none where the metric is no mean over questions
    high: float | None = None
    difference: float | None = None  # to the base, on the same questions
    difference_low: float | None = None
    difference_high: float | None = None
    kept: float | None = None  # value / the base's
    kept_above_chance: float | None = None  # the same above what guessing scores


class RetrievalResult(Entry):
    """What a checkpoint finds again in long prompts with one policy and budget of its KV cache."""

    task: RetrievalTask
    length: int  # tokens of the prompts
    depth: float | None  # where the number stands: 0 is the beginning, 1 the end
    policy: str
    budget: float | None  # as asked for: below 1 a share of the length; none where everything is kept
    entries: int | None  # the same in keys per block and KV head
    kv_bytes: int  # of keys and values, when most were held
    n: int
    value: float  # the share of numbers found; the perplexity of a continuation
    low: float | None = None  # the 95 % interval of a share
    high: float | None = None
    nats: float  # per token of the true answer, or of the continuation


class ModelFigures(Entry):
    """What is measured of every model and artifact, but for its tasks."""

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


class ModelEntry(ModelFigures):
    """One model or artifact."""

    tasks: dict[str, TaskResult] = Field(default_factory=dict)
    retrieval: list[RetrievalResult] = Field(default_factory=list)


class Models(Record, RootModel[list[ModelEntry]]):
    """The record of the evaluate stage."""

    FILE: ClassVar[str] = "models.json"
    TITLE: ClassVar[str] = "an evaluate stage's record"
    INDENT: ClassVar[int] = 2

    def contents(self) -> Any:
        """The entries, each without what was not measured of it."""
        return self.model_dump(exclude_unset=True)

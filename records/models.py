"""`models.json`: the evaluate stage's figures, an entry per model and artifact; the report shows the same entries."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, RootModel

from .record import Entry, Record

AnswerKind = Literal["choice", "generation", "other"]  # chosen, written, or neither
ArtifactFormat = Literal["gguf", "onnx"]
RetrievalTask = Literal["passkey", "keys", "continuation"]


class TaskResult(Entry):
    """One task: the value of one metric, and what is left of the base's."""

    kind: AnswerKind = Field(description="how the task is answered")
    metric: str = Field(description="name of the metric")
    value: float = Field(description="its value")
    n: int = Field(description="number of questions")
    chance: float | None = Field(default=None, description="value that guessing scores")
    metrics: dict[str, float] = Field(default_factory=dict, description="the task's other metrics")
    low: float | None = Field(
        default=None, description="lower end of the 95 % interval; null if the metric is not a mean over questions"
    )
    high: float | None = Field(default=None, description="upper end of the 95 % interval")
    difference: float | None = Field(default=None, description="difference to the base on the same questions")
    difference_low: float | None = Field(default=None, description="lower end of the difference's 95 % interval")
    difference_high: float | None = Field(default=None, description="upper end of the difference's 95 % interval")
    kept: float | None = Field(default=None, description="value / the base's value")
    kept_above_chance: float | None = Field(default=None, description="(value − chance) / (the base's value − chance)")


class RetrievalResult(Entry):
    """What a checkpoint finds again in long prompts with one policy and budget of its KV cache."""

    task: RetrievalTask = Field(description="kind of prompt")
    length: int = Field(description="prompt length in tokens")
    depth: float | None = Field(description="position of the number: 0 is the beginning, 1 the end")
    policy: str = Field(description="eviction policy")
    budget: float | None = Field(
        description="budget as configured, below 1 a share of the length; null without eviction"
    )
    entries: int | None = Field(description="budget in entries per block and KV head")
    kv_bytes: int = Field(description="peak size of keys and values")
    n: int = Field(description="number of prompts or texts")
    value: float = Field(description="share of numbers found; perplexity of a continuation")
    low: float | None = Field(default=None, description="lower end of a share's 95 % interval")
    high: float | None = Field(default=None, description="upper end of a share's 95 % interval")
    nats: float = Field(description="negative log-likelihood per token of the true answer or continuation")


class ModelFigures(Entry):
    """What is measured of every model and artifact, but for its tasks."""

    role: str = Field(
        description="base, pruned, healed, recovered, merged, depth-N, gguf-TYPE, onnx-TYPE; of rivals "
        "base-gguf-TYPE, base-onnx-TYPE"
    )
    runtime: str = Field(description="torch, llama.cpp or onnxruntime")
    blocks: int = Field(description="number of blocks")
    parameters: int | None = Field(description="number of weights")
    bytes: int = Field(description="weights in memory for torch models, files on disk for artifacts")
    bits_per_weight: float | None = Field(default=None, description="average over the weights")
    perplexity: float = Field(description="exp of the mean negative log-likelihood per token")
    kl_to_base: float | None = Field(default=None, description="mean KL(base ‖ model) in nats per token")
    top1_agreement: float | None = Field(
        default=None, description="share of positions where model and base predict the same token"
    )
    positions: int = Field(description="number of tokens behind the three figures above")
    tokens_per_second: float | None = Field(default=None, description="decoding speed, one stream")
    prefill_tokens_per_second: float | None = Field(default=None, description="speed of reading the prompt")
    peak_memory_bytes: int | None = Field(
        default=None, description="peak memory of the process: the run's for torch models, a fresh one for artifacts"
    )


class TaskDissent(Entry):
    """A task that tells two models apart, and not as KL does."""

    task: str = Field(description="name of the task")
    artifact: float = Field(description="the artifact's score")
    rival: float = Field(description="the rival's score")
    low: float = Field(description="lower end of the 95 % interval of the paired difference, positive for the artifact")
    high: float = Field(description="its upper end")


class Standing(Entry):
    """An artifact beside its rival in one format: the unpruned model in a plain type, of at most as many bytes."""

    format: ArtifactFormat = Field(description="format of the rival: gguf or onnx")
    verdict: Literal["better", "worse", "tie", "alone"] = Field(
        description="the artifact's, by KL to the base; alone: the unpruned model has nothing as small"
    )
    on_front: bool | None = Field(
        description="whether no rival of at most its bytes is as good and as fast; null for a tie"
    )
    rival: str | None = Field(default=None, description="the rival's role; null if the artifact is alone")
    smallest: str | None = Field(default=None, description="if the artifact is alone: the smallest plain type")
    smallest_bytes: int | None = Field(default=None, description="its size; of an ONNX folder within a percent")
    smallest_sized_bytes: int | None = Field(
        default=None,
        description="if a GGUF is alone: the size of the unpruned model's smallest with a type per tensor",
    )
    difference: float | None = Field(
        default=None, description="KL(base ‖ artifact) - KL(base ‖ rival) in nats per token, on the same positions"
    )
    difference_low: float | None = Field(
        default=None, description="lower end of its 95 % interval; null for too few tokens"
    )
    difference_high: float | None = Field(default=None, description="upper end of the interval")
    dissent: list[TaskDissent] = Field(default_factory=list, description="tasks that disagree with the verdict")
    sentence: str = Field(description="the comparison by KL and tasks in words")
    conclusion: str = Field(
        default="", description="whether the artifact is on the front, its speed considered; empty if it is alone"
    )


class ModelEntry(ModelFigures):
    """One model or artifact."""

    tasks: dict[str, TaskResult] = Field(default_factory=dict, description="results by task")
    retrieval: list[RetrievalResult] = Field(
        default_factory=list, description="results by task, length, depth, policy and budget"
    )
    rival_of: list[str] = Field(
        default_factory=list, description="of a rival: roles of the artifacts that it is compared with"
    )
    standings: list[Standing] = Field(
        default_factory=list, description="of an artifact: the comparison with its rival, one per format of rivals"
    )


class Models(Record, RootModel[list[ModelEntry]]):
    """The record of the evaluate stage."""

    FILE: ClassVar[str] = "models.json"
    TITLE: ClassVar[str] = "an evaluate stage's record"
    INDENT: ClassVar[int] = 2

    def contents(self) -> Any:
        """The entries, each without what was not measured of it."""
        return self.model_dump(exclude_unset=True)

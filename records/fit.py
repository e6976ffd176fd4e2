"""`fit.json`: what `compress fit` predicted and measured, and what it recommends."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from .record import Entry, Record

Axis = Literal["bytes", "latency"]


class FitFigures(Entry):
    """One candidate's figures, predicted or measured."""

    kl: float = Field(description="nats per token, to the unpruned model")
    bytes: int = Field(description="of the file")
    memory: int = Field(description="bytes of the whole process, with a cache for the asked context")
    latency: float = Field(description="seconds per written token")
    prefill: float = Field(description="seconds per token of a prompt")


class FitCandidate(Entry):
    """A cut, the types of its file, and how its cache is held."""

    name: str = Field(description="the candidate's name")
    removed: int = Field(description="blocks")
    dropped: list[int] | None = Field(description="which ones; none where that many were never chosen")
    mix: str = Field(description="its type or size")
    cache: str = Field(description="how keys and values are held")
    predicted: FitFigures = Field(description="before it was measured")
    measured: FitFigures | None = Field(
        default=None, description="as measured in the stock runtime; null: predicted only"
    )
    deviation: float | None = Field(default=None, description="of the measured KL: its standard error, in nats")
    meets: bool = Field(description="the limits; as measured, if it was")
    front: list[Axis] = Field(default_factory=list, description="where no other measured candidate beats it")


class FitErrors(Entry):
    """How far the predictions were from what was measured, over the measured candidates: the median of |predicted −
    measured| / measured. Memory and times leave out the candidate that was measured first: before it nothing is known
    of them."""

    measured: int = Field(description="candidates that were measured")
    kl: float | None = Field(description="relative error of the KL")
    bytes: float | None = Field(description="relative error of the size")
    memory: float | None = Field(description="relative error of the memory")
    latency: float | None = Field(description="relative error of the time per token")
    prefill: float | None = Field(description="relative error of the time per prompt token")


class FitBudget(Entry):
    """A KV cache of fixed size, of the unpruned model at the context that was asked for."""

    entries: int = Field(description="per block and KV head")
    bytes: int = Field(description="of keys and values in half precision, when most are held")
    kl: float = Field(description="nats per token at the end of a long text, to the model with its whole cache")


class FitLimits(Entry):
    """What was asked for; none: no limit."""

    size: int | None = Field(description="bytes of the file")
    memory: int | None = Field(description="bytes of the whole process")
    context: int = Field(description="tokens that the cache has room for")
    latency_ms: float | None = Field(description="milliseconds per written token")


class FitRecord(Record):
    """What a fit found."""

    FILE: ClassVar[str] = "fit.json"
    TITLE: ClassVar[str] = "the record of a fit"
    model_config = ConfigDict(extra="forbid")

    model: str = Field(description="source of the unpruned model")
    blocks: int = Field(description="blocks of the unpruned model")
    engine: str = Field(description="llama.cpp or onnx")
    limits: FitLimits = Field(description="what was asked for")
    device: str = Field(description='of the speeds: "this machine", or a named one')
    positions: int = Field(description="tokens that KL was measured on")
    candidates: list[FitCandidate] = Field(description="measured ones by KL, then those that were predicted only")
    recommended: str = Field(description="a candidate's name")
    reason: str = Field(description="why it is recommended")
    recipe: str = Field(description="the file that makes it, beside this one")
    errors: FitErrors = Field(description="how far predictions were from what was measured")
    budgets: list[FitBudget] = Field(default_factory=list, description="where a cache is part of what was asked")
    left_out: list[str] = Field(description="what the time did not allow, and what could not be told")
    seconds: float = Field(description="of all work, of earlier attempts too")

    def candidate(self, name: str) -> FitCandidate:
        """The candidate of this name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

"""`fit.json`: what `compress fit` predicted and measured, and what it recommends."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field

from .record import Entry, Record

Axis = Literal["bytes", "latency"]


class FitFigures(Entry):
    """One candidate's figures, predicted or measured."""

    kl: float  # nats per token, to the unpruned model
    bytes: int  # of the file
    memory: int  # bytes of the whole process, with a cache for the asked context
    latency: float  # seconds per written token
    prefill: float  # seconds per token of a prompt


class FitCandidate(Entry):
    """A cut, the types of its file, and how its cache is held."""

    name: str
    removed: int  # blocks
    dropped: list[int] | None  # which ones; none where that many were never chosen
    mix: str
    cache: str
    predicted: FitFigures  # before it was measured
    measured: FitFigures | None = None
    deviation: float | None = None  # of the measured KL: its standard error, in nats
    meets: bool  # the limits; as measured, if it was
    front: list[Axis] = Field(default_factory=list)  # where no other measured candidate beats it


class FitErrors(Entry):
    """How far the predictions were from what was measured, over the measured candidates: the median of |predicted −
    measured| / measured."""

    measured: int
    kl: float | None
    bytes: float | None
    memory: float | None
    latency: float | None
    prefill: float | None


class FitBudget(Entry):
    """A KV cache of fixed size, of the unpruned model at the context that was asked for."""

    entries: int  # per block and KV head
    bytes: int  # of keys and values in half precision, when most are held
    kl: float  # nats per token at the end of a long text, to the model with its whole cache


class FitLimits(Entry):
    """What was asked for; none: no limit."""

    size: int | None  # bytes of the file
    memory: int | None  # bytes of the whole process
    context: int  # tokens that the cache has room for
    latency_ms: float | None  # milliseconds per written token


class FitRecord(Record):
    """What a fit found."""

    FILE: ClassVar[str] = "fit.json"
    TITLE: ClassVar[str] = "the record of a fit"
    model_config = ConfigDict(extra="forbid")

    model: str
    blocks: int
    limits: FitLimits
    device: str  # of the speeds: "this machine", or a named one
    positions: int  # tokens that KL was measured on
    candidates: list[FitCandidate]  # measured ones by KL, then those that were predicted only
    recommended: str  # a candidate's name
    reason: str
    recipe: str  # the file that makes it, beside this one
    errors: FitErrors
    budgets: list[FitBudget] = Field(default_factory=list)  # where a cache is part of what was asked
    left_out: list[str]  # what the time did not allow, and what could not be told
    seconds: float  # of all work, of earlier attempts too

    def candidate(self, name: str) -> FitCandidate:
        """The candidate of this name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

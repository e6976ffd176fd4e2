"""`importance.json`: the prune stage's measurements, the dropped blocks, and the healing of the gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict
from typing_extensions import TypedDict

from .record import Entry, Record


@dataclass(frozen=True)
class Healing:
    """What was fitted for one gap."""

    block: int  # the kept block whose MLP was changed
    gap: tuple[int, int]  # first and last dropped block
    ridge: float
    errors: dict[str, float]  # held-out error by candidate: a ridge, or for cosine a round
    unhealed_error: float  # held-out error without healing
    tokens: int
    scale: float = 1.0  # factor by which the stream after the gap is smaller than the unpruned model's


class Round(TypedDict):
    """The best cut of a size that a search tried, and its score in nats per token."""

    dropped: list[int]
    score: float


class Candidate(TypedDict):
    """A cut that was compared on held-out rows, in nats per token."""

    dropped: list[int]
    held_out: float


class SearchNotes(TypedDict, total=False):
    """The record of a search over cuts; empty for a search that scores none."""

    passes: float  # the cost of the search, in forward passes over the scoring rows
    rounds: list[Round]
    guard: dict[str, Candidate]  # method → its cut, compared at the end


class CurvePoint(Entry):
    """A cut of one size, as `blocks: auto` compares them."""

    dropped: list[int]
    pruned: float  # held-out perplexity
    healed: float
    pruned_ratio: float  # as a multiple of the unpruned model's
    healed_ratio: float
    size: float  # share of the parameters that is left
    latency: float | None  # share of the time per token, if measured


class Importance(Record):
    """The record of the prune stage. Blocks are numbered as in the unpruned model."""

    FILE: ClassVar[str] = "importance.json"
    TITLE: ClassVar[str] = "a prune stage's record"
    model_config = ConfigDict(extra="forbid")

    blocks: int  # of the unpruned model
    dropped: list[int]
    importance: str  # the metric
    position: str  # tokens at which distances are measured: all or last
    search: str
    tokens: int  # in the calibration rows
    values: list[float]  # the metric, block by block
    distances: dict[str, dict[str, list[list[float]]]]  # position → metric → window length − 1 → first block
    trials: SearchNotes
    curve: list[CurvePoint]
    kept: list[int]
    healing: list[Healing]

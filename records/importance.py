"""`importance.json`: the prune stage's measurements, the dropped blocks, and the healing of the gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict

from .record import Entry, Record


@dataclass(frozen=True)
class Healing:
    """What was fitted for one gap."""

    block: Annotated[int, Field(description="the kept block whose MLP was changed")]
    gap: Annotated[tuple[int, int], Field(description="first and last dropped block")]
    ridge: Annotated[float, Field(description="the selected ridge")]
    errors: Annotated[
        dict[str, float], Field(description="held-out error by candidate: a ridge, or for cosine a round")
    ]
    unhealed_error: Annotated[float, Field(description="held-out error without healing")]
    tokens: Annotated[int, Field(description="tokens that it was fitted on")]
    scale: Annotated[
        float, Field(description="factor by which the stream after the gap is smaller than the unpruned model's")
    ] = 1.0


class Round(TypedDict):
    """The best cut of a size that a search tried, and its score in nats per token."""

    dropped: Annotated[list[int], Field(description="blocks of the best cut of a size")]
    score: Annotated[float, Field(description="its score in nats per token")]


class Candidate(TypedDict):
    """A cut that was compared on held-out rows, in nats per token."""

    dropped: Annotated[list[int], Field(description="blocks of the cut")]
    held_out: Annotated[float, Field(description="its score on the held-out rows in nats per token")]


class SearchNotes(TypedDict, total=False):
    """The record of a search over cuts; empty for a search that scores none."""

    passes: Annotated[float, Field(description="cost of the search, in forward passes over the scoring rows")]
    rounds: Annotated[list[Round], Field(description="the best cut of each size")]
    guard: Annotated[dict[str, Candidate], Field(description="the cuts compared at the end, by method")]


class CurvePoint(Entry):
    """A cut of one size, as `blocks: auto` compares them."""

    dropped: list[int] = Field(description="blocks of the cut")
    pruned: float = Field(description="held-out perplexity without healing")
    healed: float = Field(description="held-out perplexity with healing")
    pruned_ratio: float = Field(description="pruned, as a multiple of the unpruned model's perplexity")
    healed_ratio: float = Field(description="healed, as a multiple of the unpruned model's perplexity")
    size: float = Field(description="share of the parameters that is left")
    latency: float | None = Field(description="share of the time per token; null if not measured")


class Importance(Record):
    """The record of the prune stage. Blocks are numbered as in the unpruned model."""

    FILE: ClassVar[str] = "importance.json"
    TITLE: ClassVar[str] = "a prune stage's record"
    model_config = ConfigDict(extra="forbid")

    blocks: int = Field(description="blocks of the unpruned model")
    dropped: list[int] = Field(description="the removed blocks")
    importance: str = Field(description="the metric")
    position: str = Field(description="tokens at which distances are measured: all or last")
    search: str = Field(description="the search")
    tokens: int = Field(description="tokens in the calibration rows")
    values: list[float] = Field(description="the metric per block")
    distances: dict[str, dict[str, list[list[float]]]] = Field(
        description="position → metric → window length − 1 → first block"
    )
    trials: SearchNotes = Field(description="the record of the search")
    curve: list[CurvePoint] = Field(description="the sizes that blocks: auto tried")
    kept: list[int] = Field(description="the remaining blocks")
    healing: list[Healing] = Field(description="the fit of each gap")

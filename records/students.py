"""`variants.json`, and the figures of a training, of which it consists."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict, Field

from .record import Entry, Record, SparseEntry


class HeldOutDepth(Entry):
    """Held-out figures of one depth."""

    depth: int
    loss: float
    kl: float
    perplexity: float


class HeldOutFigures(SparseEntry):
    """Figures on held-out rows after a step; of several depths their weighted mean, and each one's own."""

    step: int
    eval_loss: float
    eval_kl: float  # to the unpruned model, nats per response token
    eval_perplexity: float
    eval_depths: list[HeldOutDepth] = Field(default_factory=list)


class StudentFigures(SparseEntry):
    """The result of a training."""

    objective: str
    steps: int
    trainable_parameters: int
    before: HeldOutFigures
    last: HeldOutFigures
    best: HeldOutFigures  # at the step that was kept
    target_tokens: int  # response tokens learned from, over all epochs
    train_tokens: int  # of the rows
    seconds_training: float = 0.0  # left out where equal inputs must give equal bytes


class VariantName(Entry):
    """The settings in which one of several students differs from the others."""

    name: str
    seed: int
    rows: tuple[float, float]  # shares of the training rows, from and to


class VariantFigures(StudentFigures, VariantName):
    """One student of several."""


class Variants(Record):
    """The record of a distill stage with variants."""

    FILE: ClassVar[str] = "variants.json"
    TITLE: ClassVar[str] = "a distill stage's record"
    model_config = ConfigDict(extra="forbid")

    length: int  # tokens of a packed row
    batch: int  # rows of a batch
    chosen: str
    variants: list[VariantFigures]

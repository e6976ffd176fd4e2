"""`variants.json`, and the figures of a training, of which it consists."""

from __future__ import annotations

from typing import ClassVar

from pydantic import ConfigDict, Field

from .record import Entry, Record, SparseEntry


class HeldOutDepth(Entry):
    """Held-out figures of one depth."""

    depth: int = Field(description="number of blocks")
    loss: float = Field(description="held-out loss")
    kl: float = Field(description="held-out KL to the unpruned model")
    perplexity: float = Field(description="held-out perplexity")


class HeldOutFigures(SparseEntry):
    """Figures on held-out rows after a step; of several depths their weighted mean, and each one's own."""

    step: int = Field(description="optimizer steps taken")
    eval_loss: float = Field(description="held-out loss")
    eval_kl: float = Field(description="held-out KL to the unpruned model in nats per response token")
    eval_perplexity: float = Field(description="held-out perplexity on response tokens")
    eval_depths: list[HeldOutDepth] = Field(
        default_factory=list, description="figures of each depth, in sorted training"
    )


class PaceFigures(Entry):
    """How a training went through its rows: what the recipe says, or what follows from the tokens to learn."""

    learned: int = Field(description="tokens to learn in the training rows, once")
    epochs: float = Field(description="passes over them, unless the steps are given")
    tokens_per_step: int = Field(description="tokens per optimizer step, at most")
    lr: float = Field(description="peak learning rate")
    rank: int | None = Field(description="rank of the adapters; null: full tuning")
    eval_every: int = Field(description="steps between measurements on the held-out rows")


class OnPolicyFigures(Entry):
    """What the student wrote of its training rows itself."""

    rows: int = Field(description="answers that the student wrote, over all epochs")
    tokens: int = Field(description="their tokens, ends of turns included")


class StudentFigures(SparseEntry):
    """The result of a training."""

    objective: str = Field(description="the objective")
    steps: int = Field(description="number of optimizer steps")
    trainable_parameters: int = Field(description="number of trained parameters")
    before: HeldOutFigures = Field(description="figures before training")
    last: HeldOutFigures = Field(description="figures after the last step")
    best: HeldOutFigures = Field(description="figures of the checkpoint that is kept")
    target_tokens: int = Field(description="response tokens learned from, over all epochs")
    train_tokens: int = Field(description="tokens in the training rows")
    quantized_as: str | None = Field(
        default=None, description="the exported type that the weights were rounded to, in training and for the figures"
    )
    pace: PaceFigures | None = Field(default=None, description="tokens per step, rate, epochs and rank")
    on_policy: OnPolicyFigures | None = Field(default=None, description="rows that the student wrote itself")
    seconds_training: float = Field(
        default=0.0, description="training time; left out where equal inputs must give equal bytes"
    )


class LocalFigures(Entry):
    """What the local phase did at one gap; KL to the unpruned model in nats per token."""

    first: int = Field(description="first dropped block of the gap, by its number in the unpruned model")
    last: int = Field(description="last dropped block")
    steps: int = Field(description="optimizer steps")
    tokens: int = Field(description="tokens in the training rows")
    kl_before: float = Field(description="held-out KL before")
    kl_after: float = Field(description="held-out KL after")
    repeated_before: float = Field(description="KL on repeated held-out text before")
    repeated_after: float = Field(description="KL on repeated held-out text after")
    kept: bool = Field(description="whether the result was kept; otherwise it was undone")


class VariantName(Entry):
    """The settings in which one of several students differs from the others."""

    name: str = Field(description="the variant's name")
    seed: int = Field(description="its random seed")
    rows: tuple[float, float] = Field(description="its training rows: from, to, as fractions")


class VariantFigures(StudentFigures, VariantName):
    """One student of several."""


class Variants(Record):
    """The record of a distill stage with variants."""

    FILE: ClassVar[str] = "variants.json"
    TITLE: ClassVar[str] = "a distill stage's record"
    model_config = ConfigDict(extra="forbid")

    length: int = Field(description="tokens per packed row")
    batch: int = Field(description="rows per batch")
    chosen: str = Field(description="the selected variant")
    variants: list[VariantFigures] = Field(description="figures of each variant")

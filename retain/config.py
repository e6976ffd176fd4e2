"""The recipe's `retain` section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..data.config import Columns
from ..kv.settings import HeadSettings

FORMAT = 4
LONGEST = 10240  # tokens per row, as published
SPREAD = 8  # the shortest made row is so many times shorter than the longest


class LongRows(Columns):
    """A user's rows: long prompts with their answers."""

    @model_validator(mode="after")
    def _answers(self) -> Self:
        if self.text is not None or self.rewrite is not None or self.answer is not None or self.tests is not None:
            raise ValueError("rows are prompts with answers: prompt and response (with context, if any), or messages")
        return self


class RetainConfig(HeadSettings):
    """Retaining heads (Locret, arXiv 2410.01805): a head per block learns which keys an answer will attend to. The
    model itself stays as it is."""

    width: int | None = Field(
        default=None, ge=1, description="of the heads; null: a quarter of the model's hidden size"
    )
    dataset: LongRows | None = Field(
        default=None, description="a data set of long prompts with answers; null: rows are made of the data stage's"
    )
    rows: int = Field(
        default=1000, ge=1, description="long rows that are read, each once; of a data set at most so many"
    )
    tokens: int = Field(
        default=128, ge=2, description="tokens of each row that heads learn from, in pairs of neighbours"
    )
    length: int | None = Field(
        default=None,
        ge=128,
        description="tokens in the longest row; null: 10,240, or as many as the model was trained for if that is less",
    )
    labels: Literal["detrended", "published"] = Field(
        default="detrended",
        description="what heads learn: logits less what comes of a key's distance to the answer alone, or as published",
    )
    steps: int = Field(default=3000, ge=1, description="optimizer steps of every head")
    batch: int = Field(default=1024, ge=2, description="tokens of a step, drawn from all rows")
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="of AdamW"
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="of AdamW")
    warmup: float = Field(
        default=2 / 3,
        ge=0,
        lt=1,
        description="share of the steps over which the rate rises, before it falls to nothing",
    )
    clip: float = Field(default=0.5, gt=0, description="gradients are cut off at this value, each for itself")
    smooth: float = Field(default=0.0025, ge=0, description="weight of the squared difference of neighbours' scores")
    heldout: int = Field(default=8, ge=1, description="rows to measure on")
    eval_every: int = Field(default=100, ge=1, description="steps between measurements on them")

    def input_files(self) -> list[str]:
        return [self.dataset.path] if self.dataset is not None and self.dataset.local else []

    def misfits(self, sections: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], str]]:
        if self.dataset is None and "data" not in sections:
            yield (
                (),
                "builds its rows from the data stage, which this recipe lacks: add `data:` or set `retain.dataset`",
            )

    def longest(self, positions: int) -> int:
        """Tokens in the longest row, for a model trained for so many positions."""
        return self.length or min(LONGEST, positions)


def head_width(width: int | None, hidden: int) -> int:
    """The heads' width: a quarter of the hidden size, as published for Llama-3.1-8B, up to a multiple of 64."""
    return width or -(-hidden // 4 // 64) * 64 or 64


def measured_after(config: RetainConfig) -> list[int]:
    """The steps after which the loss is measured on held-out rows."""
    return [*range(0, config.steps, config.eval_every), config.steps]

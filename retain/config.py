"""The recipe's `retain` section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ..data.config import Columns
from ..kv.settings import HeadSettings

FORMAT = 4
LONGEST = 10240  # tokens per row, as published
SPREAD = 8  # the longest generated row is this many times as long as the shortest


class LongRows(Columns):
    """A user's rows: long prompts with their answers."""

    @model_validator(mode="after")
    def _answers(self) -> Self:
        if self.text is not None or self.rewrite is not None or self.answer is not None or self.tests is not None:
            raise ValueError("rows are prompts with answers: prompt and response (with context, if any), or messages")
        return self


class RetainConfig(HeadSettings):
    """Retaining heads (Locret, arXiv 2410.01805): a head per block learns which keys an answer will attend to. The
    model itself does not change."""

    width: int | None = Field(
        default=None, ge=1, description="width of the heads; null: a quarter of the model's hidden size"
    )
    dataset: LongRows | None = Field(
        default=None, description="a data set of long prompts with answers; null: rows are built from the data stage's"
    )
    rows: int = Field(
        default=1000, ge=1, description="number of long rows to read, each once; the maximum for a data set"
    )
    tokens: int = Field(
        default=128, ge=2, description="tokens per row that the heads learn from, in pairs of neighbours"
    )
    length: int | None = Field(
        default=None,
        ge=128,
        description="tokens in the longest row; null: 10,240, or as many as the model was trained for if that is less",
    )
    labels: Literal["detrended", "published"] = Field(
        default="detrended",
        description="target of the heads: logits without the effect of a key's distance to the answer, or as published",
    )
    steps: int = Field(default=3000, ge=1, description="optimizer steps per head")
    batch: int = Field(default=1024, ge=2, description="tokens per step, sampled from all rows")
    lr: float = Field(default=5e-4, gt=0, description="peak learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.95), description="of AdamW"
    )
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="of AdamW")
    warmup: float = Field(
        default=2 / 3,
        ge=0,
        lt=1,
        description="share of the steps over which the rate rises, before it falls to zero",
    )
    clip: float = Field(default=0.5, gt=0, description="limit of each gradient element's absolute value")
    smooth: float = Field(
        default=0.0025, ge=0, description="weight of the squared difference between neighbours' scores"
    )
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
        """Tokens in the longest row, for a model trained for `positions` positions."""
        return self.length or min(LONGEST, positions)


def head_width(width: int | None, hidden: int) -> int:
    """The heads' width: a quarter of the hidden size, as published for Llama-3.1-8B, as a multiple of 64."""
    return width or -(-hidden // 4 // 64) * 64 or 64


def measured_after(config: RetainConfig) -> list[int]:
    """The steps after which the loss is measured on held-out rows."""
    return [*range(0, config.steps, config.eval_every), config.steps]

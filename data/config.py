"""The recipe's `data` section."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..stage import Section

FORMAT = 2
SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


class TeacherConfig(Section):
    """The unpruned model's likeliest next tokens at every token that is learned, for `distill.teacher: cached`."""

    top_k: int = Field(64, ge=1, description="tokens kept with their log-probabilities; all others are one bucket")
    batch: int = Field(1, ge=1, description="packed sequences of `length` tokens per forward pass")


class _Source(Section):
    """What every source has."""

    teacher: TeacherConfig | None = Field(None, description="write the unpruned model's likeliest tokens down too")


class MagpieConfig(_Source):
    """Self-data without any data set: the unpruned model writes prompts and answers (Magpie, arXiv 2406.08464)."""

    source: Literal["magpie"]
    rows: int = Field(96, ge=2, description="how many rows to keep")
    heldout: float = Field(0.125, gt=0, lt=1, description="share of the rows kept out of training, at least one row")
    batch: int = Field(32, ge=1, description="rows sampled together; part of what the rows are, see docs/data.md")
    max_prompt_tokens: int = Field(64, ge=1, description="prompts that have not ended by then are dropped")
    max_tokens: int = Field(192, ge=1, description="answers are cut off there, see `unfinished`")
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="answers cut off at max_tokens: dropped, or kept without learning where they end"
    )
    length: int = Field(512, ge=8, description="rows longer than this, in tokens with the chat template, are dropped")
    temperature: float = Field(1.0, ge=0, description="for prompts: 1 draws from the model as it is, for variety")
    top_p: float = Field(0.9, gt=0, le=1, description="for prompts: draw only from the likeliest tokens of this mass")
    top_k: int = Field(0, ge=0, description="for prompts and answers: draw from the k likeliest tokens; 0: from all")
    answer_temperature: float = Field(0.6, ge=0, description="for answers: 0 takes the likeliest token every time")
    answer_top_p: float = Field(0.95, gt=0, le=1, description="for answers, as top_p")
    topics: list[str] = Field([], description="what prompts are about, in turn; empty: whatever the model thinks of")
    max_attempts: float = Field(4.0, ge=1, description="give up after drawing this many times `rows` prompts")


class TextsConfig(_Source):
    """Plain text the unpruned model writes from random first tokens (LLM-QAT, arXiv 2305.17888): for calibration, and
    for models without a chat template."""

    source: Literal["texts"]
    rows: int = Field(128, ge=2, description="how many texts to keep")
    heldout: float = Field(0.125, gt=0, lt=1, description="share of the rows kept out of training, at least one row")
    batch: int = Field(64, ge=1, description="rows sampled together; part of what the rows are, see docs/data.md")
    tokens: int = Field(256, ge=8, description="texts that have not ended by then are cut off there")
    openings: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="what texts begin with, in turn: words of your domain; empty: one random token each"
    )
    length: int = Field(512, ge=8, description="longer texts are cut into windows of so many tokens")
    temperature: float = Field(1.0, ge=0, description="1 draws from the model as it is")
    top_p: float = Field(0.95, gt=0, le=1, description="draw only from the likeliest tokens of this mass")
    top_k: int = Field(0, ge=0, description="draw from the k likeliest tokens; 0: from all")
    max_attempts: float = Field(4.0, ge=1, description="give up after drawing this many times `rows` texts")


class DatasetConfig(_Source):
    """Rows from a data set on the Hub, or from a local JSONL, Parquet or CSV file."""

    source: Literal["dataset"]
    path: str = Field(min_length=1, description="a .jsonl, .json, .parquet or .csv file, or a data set's Hub name")
    subset: str | None = Field(None, description="the Hub data set's configuration, if it has several")
    split: str = Field("train", description="the Hub data set's split")
    prompt: str | None = Field(None, description="column of the user's words (default: prompt)")
    response: str | None = Field(None, description="column of the answer to learn (default: response)")
    messages: str | None = Field(None, description="column of whole conversations: lists of {role, content}")
    text: str | None = Field(None, description="column of plain text, used without a chat template")
    rows: int | None = Field(None, ge=2, description="how many rows to keep; null: all")
    shuffle: bool = Field(False, description="take the rows in a random order, seeded by the recipe's seed")
    heldout: float = Field(0.125, gt=0, lt=1, description="share of the rows kept out of training, at least one row")
    length: int = Field(
        512, ge=8, description="conversations longer than this, in tokens, are dropped; text is cut into windows"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> DatasetConfig:
        pair = self.prompt is not None or self.response is not None
        if pair + (self.messages is not None) + (self.text is not None) > 1:
            raise ValueError("give either prompt and response, or messages, or text: a row is one of them")
        return self

    @property
    def local(self) -> bool:
        """Whether `path` is a file rather than a Hub name."""
        return PurePath(self.path).suffix.lower() in SUFFIXES

    @property
    def columns(self) -> dict[str, str]:
        """What is read from which column: prompt and response, or messages, or text."""
        if self.messages is not None:
            return {"messages": self.messages}
        if self.text is not None:
            return {"text": self.text}
        return {"prompt": self.prompt or "prompt", "response": self.response or "response"}

    def input_files(self) -> list[str]:
        return [self.path] if self.local else []


DataConfig = Annotated[MagpieConfig | TextsConfig | DatasetConfig, Field(discriminator="source")]

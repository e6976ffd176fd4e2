"""`merge.json`: the merge and its parents, measured side by side."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from .record import Entry, Record


class Merged(Entry):
    """Held-out figures of the merge, or of one of its parents."""

    name: str = Field(description="the merge, or a parent's name")
    merged: bool = Field(description="whether it went into the merge")
    eval_kl: float = Field(description="held-out KL to the unpruned model in nats per token")
    eval_perplexity: float = Field(description="held-out perplexity")


class MergeRecord(Record):
    """The record of the merge stage."""

    FILE: ClassVar[str] = "merge.json"
    TITLE: ClassVar[str] = "a merge stage's record"
    model_config = ConfigDict(extra="forbid")

    config: dict[str, Any] = Field(description="the recipe's section, with its models filled in")
    chosen: str = Field(description="the selected model")
    models: list[Merged] = Field(description="held-out figures of the merge and its parents")

    @property
    def method(self) -> str:
        """mergekit's name of the method."""
        return str(self.config["method"])

    @property
    def parents(self) -> list[str]:
        """The names of the merged models, in the recipe's order."""
        return [str(model["model"]) for model in self.config["models"]]

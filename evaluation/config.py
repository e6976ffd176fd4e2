"""The recipe's `evaluate` section."""

from __future__ import annotations

from pydantic import Field

from ..stage import Section

FORMAT = 1


class SpeedTest(Section):
    """How speed is timed; the best of several repetitions counts."""

    prompt_tokens: int = Field(default=128, ge=2)
    new_tokens: int = Field(default=48, ge=2)
    repeat: int = Field(default=2, ge=1)


class EvaluateConfig(Section):
    """What is measured, the same for every model and artifact."""

    text: str | None = Field(
        default=None, description="a text file to measure perplexity on; null: the data stage's held-out rows"
    )
    window: int = Field(default=512, ge=8, description="tokens per window of text; each window starts afresh")
    tokens: int = Field(
        default=4096, ge=8, description="at most so many tokens, the same for all; llama.cpp is asked one by one"
    )
    tasks: list[str] = Field(
        default_factory=list, description="JSONL files of multiple-choice rows: question, choices, answer"
    )
    limit: int | None = Field(default=None, ge=1, description="at most so many rows of each task, from the start")
    speed: SpeedTest | None = Field(default_factory=SpeedTest, description="null: do not time anything")
    artifacts: bool = Field(default=True, description="measure the exported files in their runtimes too")

    def input_files(self) -> list[str]:
        return [*([self.text] if self.text else []), *self.tasks]

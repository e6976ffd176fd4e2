"""The recipe's `evaluate` section."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ..core.stage import Section

FORMAT = 4
BUILTIN = ("builtin:addition", "builtin:copy")  # made by evaluation/builtin.py


class SpeedTest(Section):
    """How speed is timed; the best of several repetitions counts."""

    prompt_tokens: int = Field(default=128, ge=2, description="tokens of the prompt")
    new_tokens: int = Field(default=48, ge=2, description="tokens decoded after it")
    repeat: int = Field(default=2, ge=1, description="repetitions")


class HarnessConfig(Section):
    """How lm-eval runs its tasks: the ones that are neither JSONL files nor built in."""

    fewshot: int | None = Field(
        default=None, ge=0, description="examples before each question; null: as each task has it"
    )
    chat: bool = Field(
        default=False, description="put questions into the chat template; published figures mostly do without it"
    )
    folder: str | None = Field(
        default=None,
        description="a folder with task files (YAML) of your own; paths of data in them are relative to it",
    )
    batch: int = Field(default=8, ge=1, description="requests per forward pass of a checkpoint")


Policy = Literal["full", "retaining", "recent", "snapkv", "random", "oracle"]
RetrievalTask = Literal["passkey", "keys", "continuation"]


class RetrievalConfig(Section):
    """What checkpoints find again in long prompts when their KV cache is bounded."""

    tasks: list[RetrievalTask] = Field(
        ["passkey", "keys"],
        min_length=1,
        description="passkey: one number in a long text; keys: one at each depth; continuation: perplexity of what "
        "follows a long prompt",
    )
    lengths: list[Annotated[int, Field(ge=256)]] = Field([1024, 2048], min_length=1, description="tokens of a prompt")
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [0.1, 0.3, 0.5, 0.7, 0.9], min_length=1, description="where a number stands: 0 is the beginning, 1 the end"
    )
    policies: list[Policy] = Field(
        ["full", "retaining", "recent", "snapkv"],
        min_length=1,
        description="what chooses: nothing is evicted, trained heads, first and newest tokens, SnapKV's, chance, the "
        "heads' labels",
    )
    budgets: list[Annotated[float, Field(gt=0)]] = Field(
        [0.125],
        description="keys and values kept per block and KV head; below 1: as a share of the prompt's tokens",
    )
    rows: int = Field(4, ge=1, description="texts per length; of passkey per length and depth")
    text: str | None = Field(
        None, description="a text file to hide numbers in and to continue; null: made-up sentences, and no continuation"
    )
    continued: int = Field(128, ge=1, description="tokens of a continuation")
    max_tokens: int = Field(24, ge=1, description="tokens written for an answer")
    chunk: int | None = Field(None, ge=1, description="tokens read at a time; null: as the heads were meant, else 256")
    stabilizers: int | None = Field(
        None,
        ge=0,
        description="newest tokens kept whatever their score; null: as the heads were meant, else 64, and at most a "
        "quarter of the budget",
    )
    local: int | None = Field(
        None, ge=0, description="last tokens of a prompt, always kept; null: as the heads were meant, else 100"
    )
    positions: Literal["true", "contiguous"] = Field(
        "true", description="contiguous: what is kept is rotated anew, for prompts beyond the trained length"
    )
    evict_while_decoding: bool = Field(False, description="keep the budget while the answer is written, too")

    @model_validator(mode="after")
    def _fit(self) -> RetrievalConfig:
        for name in ("tasks", "lengths", "depths", "policies", "budgets"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names something twice")
        if "continuation" in self.tasks and self.text is None:
            raise ValueError("the task continuation needs a text")
        if set(self.policies) - {"full"} and not self.budgets:
            raise ValueError("policies other than full need budgets")
        wrong = [budget for budget in self.budgets if budget >= 1 and budget != int(budget)]
        if wrong:
            raise ValueError(f"budget {wrong[0]}: write a share below 1, or whole keys")
        return self

    def entries(self, budget: float, length: int) -> int:
        """A budget in keys per block and KV head, for prompts of so many tokens."""
        return int(budget) if budget >= 1 else max(1, round(budget * length))


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
        default_factory=list,
        description="JSONL files (question, choices, answer; or prompt, answer), builtin:copy, builtin:addition, "
        "and names of lm-eval tasks such as arc_easy",
    )
    limit: int | None = Field(default=None, ge=1, description="at most so many rows of each task, from the start")
    max_tokens: int = Field(default=32, ge=1, description="tokens written for an answer, in JSONL and built-in tasks")
    chat: bool | None = Field(
        default=None,
        description="put prompts to be answered in writing into the chat template; null: where the model has one",
    )
    harness: HarnessConfig = Field(default_factory=HarnessConfig, description="how lm-eval runs its tasks")
    speed: SpeedTest | None = Field(default_factory=SpeedTest, description="null: do not time anything")
    artifacts: bool = Field(default=True, description="measure the exported files in their runtimes too")
    retrieval: RetrievalConfig | None = Field(
        default=None, description="what checkpoints find again in long prompts with a bounded KV cache; null: nothing"
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        names = [task_name(task) for task in tasks]
        for task, name in zip(tasks, names, strict=True):
            if task.startswith("builtin:") and task not in BUILTIN:
                near = get_close_matches(task, BUILTIN, 1) or BUILTIN
                raise ValueError(f"{task}: there is no such built-in task; there are: {', '.join(near)}")
            if not task.endswith(".jsonl") and not re.fullmatch(r"(builtin:)?[\w.+-]+", task):
                raise ValueError(
                    f"{task}: a task is a .jsonl file, {' or '.join(BUILTIN)}, or the name of an lm-eval task"
                )
            if names.count(name) > 1:
                raise ValueError(f"{name}: two tasks have this name")
        return tasks

    @model_validator(mode="after")
    def _folder_is_used(self) -> EvaluateConfig:
        if self.harness.folder is not None and not self.harness_tasks:
            raise ValueError("harness.folder is given, but no task is one of lm-eval's")
        return self

    @property
    def harness_tasks(self) -> list[str]:
        """The tasks that lm-eval runs."""
        return [task for task in self.tasks if not task.endswith(".jsonl") and task not in BUILTIN]

    def input_files(self) -> list[str]:
        files = [task for task in self.tasks if task.endswith(".jsonl")]
        named = [self.text, self.harness.folder, self.retrieval.text if self.retrieval else None]
        return [*(name for name in named if name), *files]


def task_name(task: str) -> str:
    """What a task is called in the report: a file without folder and suffix, all else as it is."""
    return PurePath(task).stem if task.endswith(".jsonl") else task

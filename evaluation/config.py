"""The recipe's `evaluate` section."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import PurePath

from pydantic import Field, field_validator, model_validator

from ..stage import Section

FORMAT = 2
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
        return [*([self.text] if self.text else []), *files, *([self.harness.folder] if self.harness.folder else [])]


def task_name(task: str) -> str:
    """What a task is called in the report: a file without folder and suffix, all else as it is."""
    return PurePath(task).stem if task.endswith(".jsonl") else task

"""The recipe's `evaluate` section."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..core.stage import Section
from ..core.suggest import did_you_mean, similar

FORMAT = 5
BUILTIN = ("builtin:addition", "builtin:copy")  # made by evaluation/builtin.py


class SpeedTest(Section):
    """How speed is measured; the best repetition counts."""

    prompt_tokens: int = Field(default=128, ge=2, description="tokens in the prompt")
    new_tokens: int = Field(default=48, ge=2, description="tokens to decode")
    repeat: int = Field(default=2, ge=1, description="repetitions")


class HarnessConfig(Section):
    """How lm-eval runs its tasks, i.e. all that are neither JSONL files nor built in."""

    fewshot: int | None = Field(
        default=None, ge=0, description="few-shot examples per question; null: each task's own number"
    )
    chat: bool = Field(default=False, description="apply the chat template to questions; most published results do not")
    folder: str | None = Field(
        default=None,
        description="folder with your own task files (YAML); data paths in them are relative to this folder",
    )
    batch: int = Field(default=8, ge=1, description="requests per forward pass of a checkpoint")


FULL = "full"  # beside the policies of `kv`: nothing is evicted
RetrievalTask = Literal["passkey", "keys", "continuation"]


class RetrievalConfig(Section):
    """Retrieval from long prompts with a bounded KV cache, measured on checkpoints."""

    tasks: list[RetrievalTask] = Field(
        default=["passkey", "keys"],
        min_length=1,
        description="passkey: find one number in a long text; keys: one number at each depth; continuation: perplexity "
        "of the text after a long prompt",
    )
    lengths: list[Annotated[int, Field(ge=256)]] = Field(
        default=[1024, 2048], min_length=1, description="prompt tokens"
    )
    depths: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        min_length=1,
        description="position of a number: 0 is the beginning, 1 the end",
    )
    policies: list[str] = Field(
        default=["full", "retaining", "recent", "snapkv"],
        min_length=1,
        description="eviction policies. full: no eviction; retaining: trained heads; recent: first and newest tokens; "
        "snapkv: SnapKV; random: at random; oracle: the labels that heads are trained on",
    )
    budgets: list[Annotated[float, Field(gt=0)]] = Field(
        default=[0.125],
        description="cache entries kept per block and KV head; below 1: as a share of the prompt's tokens",
    )
    rows: int = Field(default=4, ge=1, description="texts per length; for passkey, per length and depth")
    text: str | None = Field(
        default=None,
        description="text file to hide numbers in and to continue; null: made-up sentences, no continuation",
    )
    continued: int = Field(default=128, ge=1, description="tokens scored in a continuation")
    max_tokens: int = Field(default=24, ge=1, description="maximum tokens per answer")
    chunk: int | None = Field(
        default=None, ge=1, description="tokens read at a time; null: the heads' own setting, else 256"
    )
    stabilizers: int | None = Field(
        default=None,
        ge=0,
        description="newest tokens kept whatever their score; null: the heads' own setting, else 64, and at most a "
        "quarter of the budget",
    )
    local: int | None = Field(
        default=None, ge=0, description="last tokens of a prompt, always kept; null: the heads' own setting, else 100"
    )
    positions: Literal["true", "contiguous"] = Field(
        default="true",
        description="contiguous: kept entries get new rotary positions, for prompts beyond the trained length",
    )
    evict_while_decoding: bool = Field(default=False, description="also evict while the answer is decoded")

    @model_validator(mode="after")
    def _fit(self) -> RetrievalConfig:
        for name in ("tasks", "lengths", "depths", "policies", "budgets"):
            values = getattr(self, name)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise ValueError(f"{name} has {twice[0]!r} twice")
        if "continuation" in self.tasks and self.text is None:
            raise ValueError("the task continuation needs a text: set text")
        if set(self.policies) - {FULL} and not self.budgets:
            raise ValueError("policies other than full need budgets")
        wrong = [budget for budget in self.budgets if budget >= 1 and budget != int(budget)]
        if wrong:
            raise ValueError(f"budget {wrong[0]}: give a share below 1, or a whole number of entries")
        return self

    @field_validator("policies")
    @classmethod
    def _known_policies(cls, policies: list[str]) -> list[str]:
        from ..kv.policies import POLICIES

        known = (FULL, *POLICIES.names)
        broken = [POLICIES.unusable[name] for name in policies if name in POLICIES.unusable]
        if broken:
            raise ValueError(broken[0])
        unknown = [name for name in policies if name not in known]
        if unknown:
            raise ValueError(
                f"there is no policy {unknown[0]!r}; there are: {', '.join(known)}{did_you_mean(unknown[0], known)}"
            )
        return policies

    def methods(self) -> list[type]:
        from ..kv.policies import policy

        return [policy(name) for name in self.policies if name != FULL]

    @property
    def needs_heads(self) -> bool:
        """Whether a policy goes by retaining heads."""
        from ..kv.policies import policy

        return any("heads" in policy(name).needs for name in self.policies if name != FULL)

    def entries(self, budget: float, length: int) -> int:
        """A budget in entries per block and KV head, for prompts of `length` tokens."""
        return int(budget) if budget >= 1 else max(1, round(budget * length))


class EvaluateConfig(Section):
    """What to measure; the same for every model and artifact."""

    text: str | None = Field(
        default=None, description="text file to measure perplexity on; null: the data stage's held-out rows"
    )
    window: int = Field(default=512, ge=8, description="tokens per window; windows are scored independently")
    tokens: int = Field(
        default=4096, ge=8, description="maximum tokens to score, the same for all; slow in llama.cpp, one at a time"
    )
    tasks: list[str] = Field(
        default_factory=list,
        description="JSONL files (question, choices, answer; or prompt, answer), builtin:copy, builtin:addition, "
        "and names of lm-eval tasks such as arc_easy",
    )
    limit: int | None = Field(default=None, ge=1, description="use only the first rows of each task, at most this many")
    max_tokens: int = Field(default=32, ge=1, description="maximum tokens per answer in JSONL and built-in tasks")
    chat: bool | None = Field(
        default=None,
        description="apply the chat template to prompts of written answers; null: if the model has one",
    )
    harness: HarnessConfig = Field(default_factory=HarnessConfig, description="how lm-eval runs its tasks")
    speed: SpeedTest | None = Field(default_factory=SpeedTest, description="null: do not time anything")
    artifacts: bool = Field(default=True, description="also measure the exported files in their runtimes")
    rival: bool | None = Field(
        default=None,
        description="also measure the strongest rival of each exported file: the unpruned model, quantized to at most "
        "its bytes, in a plain type, and with a type per tensor where the file has that or no plain type is as small; "
        "null: if the model was cut or trained",
    )
    retrieval: RetrievalConfig | None = Field(
        default=None, description="retrieval from long prompts with a bounded KV cache; null: not measured"
    )

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        names = [task_name(task) for task in tasks]
        for task, name in zip(tasks, names, strict=True):
            if task.startswith("builtin:") and task not in BUILTIN:
                near = similar(task, BUILTIN)[:1] or BUILTIN
                raise ValueError(f"{task}: there is no such built-in task; there are: {', '.join(near)}")
            if not task.endswith(".jsonl") and not re.fullmatch(r"(builtin:)?[\w.+-]+", task):
                raise ValueError(
                    f"{task}: a task is a .jsonl file, {' or '.join(BUILTIN)}, or the name of an lm-eval task"
                )
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called {name}")
        return tasks

    @model_validator(mode="after")
    def _folder_is_used(self) -> EvaluateConfig:
        if self.harness.folder is not None and not self.harness_tasks:
            raise ValueError("harness.folder is given, but no task is an lm-eval task")
        return self

    @model_validator(mode="after")
    def _rivals_have_artifacts(self) -> EvaluateConfig:
        if self.rival and not self.artifacts:
            raise ValueError("rival is true, but artifacts is false: a rival stands beside an exported file")
        return self

    def misfits(self, sections: Mapping[str, Any]) -> Iterable[tuple[tuple[str | int, ...], str]]:
        if self.rival and "export" not in sections:
            yield (
                ("rival",),
                "a rival stands beside an exported file, and this recipe exports none: add `export:` or remove the key",
            )

    def wants_rivals(self, changed: bool) -> bool:
        """Whether rivals are measured, of a model that was cut or trained or was not."""
        return self.artifacts and (changed if self.rival is None else self.rival)

    @property
    def harness_tasks(self) -> list[str]:
        """The tasks that lm-eval runs."""
        return [task for task in self.tasks if not task.endswith(".jsonl") and task not in BUILTIN]

    def input_files(self) -> list[str]:
        files = [task for task in self.tasks if task.endswith(".jsonl")]
        named = [self.text, self.harness.folder, self.retrieval.text if self.retrieval else None]
        return [*(name for name in named if name), *files]


def task_name(task: str) -> str:
    """A task's name in the report: a file's name without folder and suffix, other names unchanged."""
    return PurePath(task).stem if task.endswith(".jsonl") else task

"""All tasks of an evaluation, run for one model or artifact after another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from ..core.files import write_whole
from ..core.stage import Advance, Context
from ..modeling.types import CausalModel, ModelTokenizer
from ..records.models import ModelEntry, ModelFigures, RetrievalResult
from ..runtime.engine import Engine
from .builtin import exercises
from .config import BUILTIN, EvaluateConfig, task_name
from .cost import ANSWERS
from .generation import Exercise, Prompt, judge, prepare, write_with_engine, write_with_model
from .statistics import TaskOutcome, compare
from .tasks import ChoiceQuestion, choice_scores, engine_scores, read_task, run_task, split_tokens

HARNESS_TOKENS = 2048  # longer lm-eval prompts are truncated on the left, for checkpoints and artifacts alike


class Player(Protocol):
    """A model or artifact to run tasks on."""

    def scores(self, row: ChoiceQuestion) -> list[float]:
        """The log-likelihood of each choice."""
        ...

    def write(self, prompts: Sequence[Prompt], max_tokens: int, advance: Advance) -> list[str]:
        """The text generated after each prompt, greedily."""
        ...

    def language_model(self, longest: int, batch: int) -> Any:
        """The model wrapped as an lm-eval `LM`, for prompts of at most `longest` tokens."""
        ...


class TorchPlayer:
    """A checkpoint."""

    def __init__(self, model: CausalModel, tokenizer: ModelTokenizer):
        self.model, self.tokenizer = model, tokenizer

    def scores(self, row: ChoiceQuestion) -> list[float]:
        return choice_scores(self.model, self.tokenizer, row)

    def write(self, prompts: Sequence[Prompt], max_tokens: int, advance: Advance) -> list[str]:
        return write_with_model(self.model, self.tokenizer, prompts, max_tokens, ANSWERS, advance)

    def language_model(self, longest: int, batch: int) -> Any:
        from .harness_models import checkpoint_lm

        return checkpoint_lm(self.model, self.tokenizer, longest, batch)


class EnginePlayer:
    """An artifact in its runtime."""

    def __init__(self, engine: Engine, tokenizer: ModelTokenizer):
        self.engine, self.tokenizer = engine, tokenizer

    def scores(self, row: ChoiceQuestion) -> list[float]:
        return engine_scores(self.engine, self.tokenizer, row)

    def write(self, prompts: Sequence[Prompt], max_tokens: int, advance: Advance) -> list[str]:
        return write_with_engine(self.engine, self.tokenizer, prompts, max_tokens, advance)

    def language_model(self, longest: int, batch: int) -> Any:
        from .harness_models import EngineLM

        return EngineLM(self.engine, self.tokenizer, longest)


class Suite:
    """The tasks of one evaluation, read once.

    Raises `UserError` for broken files, unknown names, and lm-eval tasks whose data cannot be loaded.
    """

    def __init__(self, config: EvaluateConfig, context: Context, tokenizer: ModelTokenizer):
        self.config, self.context, self.tokenizer = config, context, tokenizer
        self.local: dict[str, list[ChoiceQuestion] | list[Exercise]] = {}
        for task in config.tasks:
            if task in BUILTIN:
                self.local[task] = exercises(task, config.limit)
            elif task.endswith(".jsonl"):
                self.local[task_name(task)] = read_task(context.resolve(task), config.limit)
        self.prompts = {
            name: [prepare(tokenizer, row, config.chat) for row in rows if isinstance(row, Exercise)]
            for name, rows in self.local.items()
        }
        self.harness: dict[str, Any] = {}
        if config.harness_tasks:
            from .harness import load_tasks

            self.harness = load_tasks(config, context)

    def longest(self) -> int:
        """Tokens of the longest text that tasks give an artifact, answer included; 0 without tasks."""
        lengths = [len(prompt.ids) + self.config.max_tokens for prompts in self.prompts.values() for prompt in prompts]
        for rows in self.local.values():
            for row in rows:
                if isinstance(row, ChoiceQuestion):
                    prompt, endings = split_tokens(self.tokenizer, row)
                    lengths.append(len(prompt) + max(map(len, endings)))
        return max([*lengths, HARNESS_TOKENS + 1 if self.harness else 0], default=0)

    def run(self, role: str, player: Player) -> dict[str, TaskOutcome]:
        """The outcome of every task, in the recipe's order."""
        outcomes: dict[str, TaskOutcome] = {}
        for name in map(task_name, self.config.tasks):
            measure = self._local if name in self.local else self._harness
            outcomes[name] = measure(role, name, player)
        return outcomes

    def _local(self, role: str, name: str, player: Player) -> TaskOutcome:
        rows = self.local[name]
        with self.context.progress.bar(f"{role} {name}", len(rows)) as advance:
            questions = [row for row in rows if isinstance(row, ChoiceQuestion)]
            if questions:
                return run_task(player.scores, questions, advance)
            written = player.write(self.prompts[name], self.config.max_tokens, advance)
            return judge([row for row in rows if isinstance(row, Exercise)], self.prompts[name], written)

    def _harness(self, role: str, name: str, player: Player) -> TaskOutcome:
        from .harness import run_tasks

        language_model = player.language_model(HARNESS_TOKENS, self.config.harness.batch)
        with self.context.progress.bar(f"{role} {name}") as advance:
            return run_tasks(name, self.harness[name], language_model, self.config, self.context.seed, advance)


class MeasuredModel(ModelFigures):
    """One model's results, before comparison with the base."""

    tasks: dict[str, TaskOutcome]
    kls: list[float] = Field(default_factory=list)  # of an artifact: KL(base ‖ artifact) at each position, nats
    retrieval: list[RetrievalResult] = Field(default_factory=list)


def side_by_side(models: Sequence[MeasuredModel]) -> list[ModelEntry]:
    """The report's entries, with task results compared to the base's."""
    base = next((model.tasks for model in models if model.role == "base"), {})
    return [
        ModelEntry(
            **model.model_dump(exclude={"tasks", "kls"}, exclude_unset=True),
            tasks={
                name: compare(outcome, base.get(name) if model.role != "base" else None)
                for name, outcome in model.tasks.items()
            },
        )
        for model in models
    ]


def question_scores(models: Sequence[MeasuredModel]) -> dict[str, dict[str, list[float]]]:
    """Every question's score, for tasks that have them: {task: {role: scores}}."""
    scores: dict[str, dict[str, list[float]]] = {}
    for model in models:
        for name, outcome in model.tasks.items():
            if outcome.scores:
                scores.setdefault(name, {})[model.role] = outcome.scores
    return scores


def write_answers(answers: dict[str, dict[str, list[float]]], file: Path) -> None:
    """Write every question's score, one line per task and model."""
    lines = [
        json.dumps({"task": task, "model": role, "scores": scores}) + "\n"
        for task, models in answers.items()
        for role, scores in models.items()
    ]
    write_whole(file, "".join(lines))

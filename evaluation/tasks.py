"""Tasks from local JSONL files: multiple choice (question, choices, answer), or written answers (prompt, answer).

A multiple-choice prompt is the question and the word Answer on its own line, as common harnesses do for ARC and
OpenBookQA; each choice is scored by its log-likelihood as the continuation. `accuracy` picks the choice with the
highest sum, `accuracy_norm` with the highest sum per byte. Written answers are in generation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import Number, json_lines, plain
from ..core.stage import Advance
from ..data.calibration import pad_id
from ..data.turns import strings
from ..modeling.blocks import Decoder
from ..modeling.types import CausalModel, ModelTokenizer
from ..runtime.engine import Engine, ScoringWindow
from .generation import Exercise
from .statistics import TaskOutcome, mean


@dataclass(frozen=True)
class ChoiceQuestion:
    """One row of a task."""

    question: str
    choices: list[str]
    answer: int  # index into choices

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"


def read_task(file: Path, limit: int | None = None) -> list[ChoiceQuestion] | list[Exercise]:
    """The first `limit` rows of a JSONL file, either all multiple choice or all written answers.

    Raises `UserError` naming file and line for an invalid row.
    """
    questions: list[ChoiceQuestion] = []
    exercises: list[Exercise] = []
    for number, values in json_lines(file, "the task: ", literal=True):
        if limit is not None and len(questions) + len(exercises) >= limit:
            break
        row = _row(values, f"{file}:{number}")
        if isinstance(row, ChoiceQuestion):
            questions.append(row)
        else:
            exercises.append(row)
        if questions and exercises:
            raise UserError(f"{file}:{number}: a task must be all multiple choice or all written answers, not both")
    if not questions and not exercises:
        raise UserError(f"the task {file} has no rows")
    return questions or exercises


def read_questions(file: Path, limit: int | None = None) -> list[ChoiceQuestion]:
    """Like `read_task`, but for multiple choice only."""
    rows = [row for row in read_task(file, limit) if isinstance(row, ChoiceQuestion)]
    if not rows:
        raise UserError(f"the task {file} is not multiple choice")
    return rows


def _row(row: dict[str, Any], where: str) -> ChoiceQuestion | Exercise:
    if not ("prompt" in row or "question" in row) or "answer" not in row:
        raise UserError(f"{where}: a row must have either question, choices and answer, or prompt and answer")
    try:  # half of a surrogate pair cannot be tokenized
        "".join(strings(row)).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: a text has half of a surrogate pair (such as \\ud83d alone), which is not valid text"
        ) from error
    return _exercise(row, where) if "prompt" in row else _question(row, where)


def _exercise(row: dict[str, Any], where: str) -> Exercise:
    prompt, answer = row["prompt"], row["answer"]
    if "choices" in row:
        raise UserError(f"{where}: a row with choices needs a question, not a prompt")
    if isinstance(prompt, str) and prompt.strip() and isinstance(answer, str) and answer.strip():
        return Exercise(str(prompt), str(answer))
    raise UserError(f"{where}: prompt must be text, answer text or a number, neither empty")


def _question(row: dict[str, Any], where: str) -> ChoiceQuestion:
    question, answer = str(row["question"]), row["answer"]
    choices: Any = row.get("choices")
    right = isinstance(row["question"], str) and isinstance(choices, list)
    if not right or len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise UserError(f"{where}: question must be text, choices a list of at least two texts")
    index: Any = None
    if isinstance(answer, Number):
        index = plain(answer)
    elif isinstance(answer, str) and len(answer) == 1 and answer.upper() in "ABCDEFGHIJ":
        index = "ABCDEFGHIJ".index(answer.upper())
    if not isinstance(index, int) or not 0 <= index < len(choices):
        raise UserError(
            f"{where}: answer must be the index (0 to {len(choices) - 1}) or letter of a choice, not {plain(answer)!r}"
        )
    return ChoiceQuestion(question, [str(choice) for choice in choices], index)


def run_task(
    score: Callable[[ChoiceQuestion], list[float]], rows: Sequence[ChoiceQuestion], advance: Advance
) -> TaskOutcome:
    """`accuracy_norm` with its score per question, and plain `accuracy` beside it.

    `score` returns the log-likelihood of each choice of a row.
    """
    hits, normed = [], []
    for row in rows:
        scores = score(row)
        sizes = [len(choice.encode()) for choice in row.choices]
        hits.append(float(max(range(len(scores)), key=lambda i: scores[i]) == row.answer))
        normed.append(float(max(range(len(scores)), key=lambda i: scores[i] / sizes[i]) == row.answer))
        advance(1, f"{mean(normed):.0%} right")
    figures = {"accuracy_norm": mean(normed), "accuracy": mean(hits)}
    chance = mean([1 / len(row.choices) for row in rows])
    return TaskOutcome("choice", "accuracy_norm", normed, figures["accuracy_norm"], len(rows), chance, figures)


def engine_scores(engine: Engine, tokenizer: ModelTokenizer, row: ChoiceQuestion) -> list[float]:
    """Summed log-likelihood of each choice after the prompt, in nats, in an artifact's runtime."""
    prompt, endings = split_tokens(tokenizer, row)
    windows = [ScoringWindow.of([*prompt, *ending], len(prompt)) for ending in endings]
    return [sum(d.target_logprob for d in distributions) for distributions in engine.score(windows, top_k=1)]


@torch.no_grad()
def choice_scores(model: CausalModel, tokenizer: ModelTokenizer, row: ChoiceQuestion) -> list[float]:
    """Summed log-likelihood of each choice after the prompt, in nats.

    The prompt is run once; its keys and values are repeated to run the choices as one batch after it.
    """
    prompt, endings = split_tokens(tokenizer, row)
    decoder, device = Decoder(model), model.device
    first = model.model(input_ids=torch.tensor([prompt], device=device), use_cache=True)
    cache = first.past_key_values
    lead = decoder.head(first.last_hidden_state[:, -1:])
    width = max(len(ending) for ending in endings)
    scores = torch.zeros(len(endings))
    if width > 1:
        cache.batch_repeat_interleave(len(endings))
        # The last token of an ending predicts nothing that is needed, so it is left out; padding follows.
        fed = [ending[:-1] + [pad_id(tokenizer)] * (width - len(ending)) for ending in endings]
        hidden = decoder.hidden(input_ids=torch.tensor(fed, device=device), past_key_values=cache, use_cache=True)
        logits = torch.cat([lead.expand(len(endings), -1, -1), decoder.head(hidden)], dim=1)
    else:
        logits = lead.expand(len(endings), -1, -1)
    logs: Tensor = logits.float().log_softmax(-1)
    for number, ending in enumerate(endings):
        targets = torch.tensor(ending, device=device)
        scores[number] = logs[number, : len(ending)].gather(1, targets[:, None]).sum()
    return scores.tolist()


def split_tokens(tokenizer: ModelTokenizer, row: ChoiceQuestion) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompt and of each ending (which includes its leading space).

    Prompt and ending are encoded together, because a token may span both; the prompt is the prefix that all share.
    """
    prompt = tokenizer(row.prompt)["input_ids"]
    wholes = [tokenizer(f"{row.prompt} {choice}")["input_ids"] for choice in row.choices]
    shared = len(prompt)
    for whole in wholes:
        while whole[:shared] != prompt[:shared]:
            shared -= 1
    return prompt[:shared], [whole[shared:] for whole in wholes]

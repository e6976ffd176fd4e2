"""Generative tasks: greedy decoding, scored by exact match.

A numeric answer is right if the last number in the output equals it; any other answer if the output equals it, ignoring
case, spacing, and surrounding quotes and punctuation. `contains` is the laxer metric: the answer occurs anywhere in the
output, as whole words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from decimal import Decimal

from ..core.stage import Advance
from ..data.chat import render, special_tokens
from ..data.sampling import Sampling, sample
from ..modeling.types import CausalModel, ModelTokenizer
from ..runtime.engine import Engine
from .statistics import TaskOutcome, mean

# A minus sign counts where it cannot be a dash or a subtraction: not after a digit, a letter or a closing bracket.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_AROUND = " \t\r\n.,;:!?'\"`*“”\u2018’"


@dataclass(frozen=True)
class Exercise:
    """One row of a generative task."""

    prompt: str
    answer: str
    examples: tuple[tuple[str, str], ...] = ()  # few-shot (prompt, answer) pairs before it


@dataclass(frozen=True)
class Prompt:
    """A tokenized exercise."""

    ids: list[int]
    one_line: bool  # without a chat template an answer ends with its line


def prepare(tokenizer: ModelTokenizer, exercise: Exercise, chat: bool | None) -> Prompt:
    """Tokens of a prompt with its examples: as turns of the chat template, or as plain text line by line.

    `chat` None uses the template if the tokenizer has one; True without one raises `UserError`.
    """
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    if not chat:
        text = "".join(f"{prompt}\n{answer}\n\n" for prompt, answer in exercise.examples) + exercise.prompt
        text += "\n" if exercise.examples else ""
        return Prompt(list(tokenizer(text, verbose=False)["input_ids"]), True)
    turns = [text for example in exercise.examples for text in example] + [exercise.prompt]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    text = render(tokenizer, messages, answer=True)
    return Prompt(list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]), False)


def stops(tokenizer: ModelTokenizer) -> frozenset[int]:
    """Tokens that end an answer: all special tokens, so that checkpoints and artifacts stop alike."""
    eos = tokenizer.eos_token_id
    return frozenset(special_tokens(tokenizer)) | (frozenset() if eos is None else {eos})


def write_with_model(
    model: CausalModel,
    tokenizer: ModelTokenizer,
    prompts: Sequence[Prompt],
    max_tokens: int,
    batch: int,
    advance: Advance,
) -> list[str]:
    """A torch model's answer to each prompt."""
    texts: list[str] = []
    stop, how = stops(tokenizer), Sampling(max_tokens, temperature=0)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        ended = _line_ended(tokenizer) if part[0].one_line else None
        rows = sample(model, [p.ids for p in part], [0] * len(part), how, stop=stop, stopped=ended)
        texts += [text_of(tokenizer, row.tokens) for row in rows]
        advance(len(part))
    return texts


def write_with_engine(
    engine: Engine, tokenizer: ModelTokenizer, prompts: Sequence[Prompt], max_tokens: int, advance: Advance
) -> list[str]:
    """An artifact's answer to each prompt, in its runtime."""
    texts: list[str] = []
    stop: Collection[int] = stops(tokenizer)
    for prompt in prompts:
        ended = _line_ended(tokenizer) if prompt.one_line else None
        tokens: list[int] = []
        for token in engine.generate(prompt.ids, max_tokens, stop=stop):
            tokens.append(token)
            if ended is not None and ended(tokens):
                break
        texts.append(text_of(tokenizer, tokens))
        advance(1)
    return texts


def text_of(tokenizer: ModelTokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _line_ended(tokenizer: ModelTokenizer) -> Callable[[list[int]], bool]:
    """A test whether a non-empty line has ended."""
    return lambda tokens: "\n" in text_of(tokenizer, tokens).lstrip()


def judge(
    exercises: Sequence[Exercise], prompts: Sequence[Prompt], written: Sequence[str], chance: float | None = 0.0
) -> TaskOutcome:
    """The share of exact matches, and beside it the share of outputs that contain the answer."""
    scores, contained = [], []
    for exercise, prompt, text in zip(exercises, prompts, written, strict=True):
        if prompt.one_line:
            text = text.lstrip().split("\n", 1)[0]
        scores.append(float(is_right(text, exercise.answer)))
        contained.append(float(contains(text, exercise.answer)))
    figures = {"exact_match": mean(scores), "contains": mean(contained)}
    return TaskOutcome("generation", "exact_match", scores, figures["exact_match"], len(scores), chance, figures)


def is_right(written: str, answer: str) -> bool:
    """Whether an output is the answer."""
    expected = number(answer)
    if expected is not None:
        numbers = _NUMBER.findall(written)
        return bool(numbers) and _decimal(numbers[-1]) == expected
    return normalised(written) == normalised(answer)


def contains(written: str, answer: str) -> bool:
    """Whether an output contains the answer: a number among its numbers, other answers as whole words."""
    expected = number(answer)
    if expected is not None:
        return any(_decimal(number_text) == expected for number_text in _NUMBER.findall(written))
    return re.search(rf"(?<!\w){re.escape(normalised(answer))}(?!\w)", normalised(written)) is not None


def number(text: str) -> Decimal | None:
    """The number that a whole text states, ignoring currency and percent signs; None if it is not a number."""
    text = text.strip().strip("$€£%").strip()
    return _decimal(text) if _NUMBER.fullmatch(text) else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def normalised(text: str) -> str:
    """The text in lower case with single spaces, without surrounding quotes or punctuation."""
    return " ".join(text.casefold().split()).strip(_AROUND)

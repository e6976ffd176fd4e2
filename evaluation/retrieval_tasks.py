"""Long prompts with hidden numbers, generated from a seed: the same for every model with the same tokenizer.

The wording differs from what retaining heads are trained on. Row i is the same for any number of rows.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..core.errors import UserError
from ..modeling.types import ModelTokenizer
from .generation import Exercise, prepare

LEAD = "Some facts that matter are hidden in the following text. You will be asked about one of them."
CODE = ("The access code of the vault is {0}. Do not forget it: {0}.", "What is the access code of the vault?")
CODE_ANSWER = "The access code of the vault is {0}."
TICKET = ("The ticket number of {1} is {0}.", "What is the ticket number of {1}?")
TICKET_ANSWER = "The ticket number of {1} is {0}."
PEOPLE = (
    "Adams", "Baker", "Carter", "Dixon", "Evans", "Foster", "Graham", "Hughes", "Irving", "Jordan", "Keller", "Lawson",
    "Mason", "Norton", "Owens", "Parker", "Quinn", "Reeves", "Saunders", "Turner",
)  # fmt: skip
SENTENCES = (
    "The leaves move a little in the wind.",
    "A boat goes slowly down the river.",
    "It rains for a while and then stops.",
    "Somebody closes a window on the other side of the street.",
    "The road leads over a hill and back to the village.",
    "Bread lies on the table, with butter beside it.",
    "In the evening the lamps are lit, one after another.",
    "A dog sleeps in front of the door.",
    "The clouds are white and the sky is blue.",
    "Two children play with a ball.",
    "The train stops, waits a little, and goes on.",
    "Grass grows between the stones of the yard.",
)
BREAK = re.compile(r"(?<=[.!?])\s+|\n+")
FIRST_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class RetrievalQuestion:
    """One prompt about a text, and the right number."""

    ids: list[int]  # the prompt, up to where the answer begins
    answer_ids: list[int]  # the true answer as a sentence
    number: str
    depth: float

    def is_right(self, written: str) -> bool:
        """Whether the first number in the output is the right one, digit by digit."""
        match = FIRST_NUMBER.search(written)
        return match is not None and match.group() == self.number


@dataclass(frozen=True)
class Reading:
    """A text and the questions about it; the prompts differ only at their ends."""

    questions: tuple[RetrievalQuestion, ...]


@dataclass(frozen=True)
class Continuation:
    """A long prompt and what comes after it."""

    ids: list[int]
    after: list[int]


class Filler:
    """Sentences to hide numbers among: from a text, starting at a random place for each prompt, or made up."""

    def __init__(self, text: str | None):
        self.sentences = [part for part in BREAK.split(text) if part.strip()] if text is not None else None
        if self.sentences is not None and len(self.sentences) < 2:
            raise UserError("the text to hide numbers in has fewer than two sentences")

    def draw(self, draw: random.Random, count: int) -> list[str]:
        if self.sentences is None:
            return [draw.choice(SENTENCES) for _ in range(count)]
        start = draw.randrange(len(self.sentences))
        return [self.sentences[(start + i) % len(self.sentences)].strip() for i in range(count)]


def passkey(tokenizer: ModelTokenizer, filler: Filler, length: int, depth: float, seed: str) -> Reading:
    """One number at one depth of a prompt of up to `length` tokens."""
    draw = random.Random(f"{seed}/passkey/{length}/{depth}")
    number = str(draw.randrange(10_000, 100_000))
    return _reading(tokenizer, filler, length, draw, [depth], [number], [""], CODE, CODE_ANSWER)


def keys(tokenizer: ModelTokenizer, filler: Filler, length: int, depths: Sequence[float], seed: str) -> Reading:
    """A number at each depth, each with a person's name; each question asks for one of them in a prompt of its own.

    Raises `UserError` for more depths than there are names.
    """
    if len(depths) > len(PEOPLE):
        raise UserError(f"the task keys takes at most {len(PEOPLE)} depths, not {len(depths)}")
    draw = random.Random(f"{seed}/keys/{length}")
    numbers = [str(number) for number in draw.sample(range(10_000, 100_000), len(depths))]
    people = [f"{draw.choice(('Mr.', 'Mrs.'))} {name}" for name in draw.sample(PEOPLE, len(depths))]
    return _reading(tokenizer, filler, length, draw, depths, numbers, people, TICKET, TICKET_ANSWER)


def continuation(tokenizer: ModelTokenizer, text: Sequence[int], length: int, after: int, seed: str) -> Continuation:
    """A piece of a tokenized text: `length` prompt tokens, with the tokenizer's own prefix, and `after` to score."""
    begin = list(tokenizer("", verbose=False)["input_ids"])
    needed = length - len(begin) + after
    if needed > len(text):
        raise UserError(
            f"a prompt of {length} tokens and {after} tokens after it need a longer text than {len(text)} tokens"
        )
    start = random.Random(f"{seed}/continuation/{length}").randrange(len(text) - needed + 1)
    ids = [*begin, *text[start : start + needed]]
    return Continuation(ids[:length], ids[length:])


def _reading(
    tokenizer: ModelTokenizer,
    filler: Filler,
    length: int,
    draw: random.Random,
    depths: Sequence[float],
    numbers: Sequence[str],
    names: Sequence[str],
    wording: tuple[str, str],
    answer: str,
) -> Reading:
    fact, question = wording
    facts = [fact.format(*pair) for pair in zip(numbers, names, strict=True)]
    asked = [question.format(*pair) for pair in zip(numbers, names, strict=True)]
    answers = [answer.format(*pair) for pair in zip(numbers, names, strict=True)]
    state = draw.getstate()
    room = length
    while True:
        draw.setstate(state)  # the same sentences, only fewer
        sentences = _cut(tokenizer, filler.draw(draw, room), room)
        text = hide(sentences, facts, depths)
        prompts = [_prompt(tokenizer, f"{LEAD}\n\n{text}\n\n{line}") for line in asked]
        excess = max(map(len, prompts)) - length
        if excess <= 0:
            break
        room -= excess
        if room < 1:
            raise UserError(f"a prompt of {length} tokens has no room for {len(facts)} facts and a question")
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in answers]
    return Reading(tuple(RetrievalQuestion(*parts) for parts in zip(prompts, ids, numbers, depths, strict=True)))


def _cut(tokenizer: ModelTokenizer, sentences: list[str], tokens: int) -> list[tuple[str, int]]:
    """The first sentences of at most `tokens` tokens in all, each with its number of tokens."""
    counted: list[tuple[str, int]] = []
    total = 0
    for sentence in sentences:
        count = len(tokenizer(f" {sentence}", add_special_tokens=False, verbose=False)["input_ids"])
        total += count
        if total > tokens:
            break
        counted.append((sentence, count))
    return counted


def hide(sentences: Sequence[tuple[str, int]], facts: Sequence[str], depths: Sequence[float]) -> str:
    """A text of sentences (given with their token counts) and facts. Each fact is its own paragraph, before the first
    sentence that ends beyond its depth (0 to 1, as a share of the sentences' tokens)."""
    total = sum(count for _, count in sentences)
    waiting = sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0])
    paragraphs: list[str] = []
    current: list[str] = []
    passed = 0
    for sentence, count in sentences:
        while waiting and passed + count > waiting[0][0] * total:
            paragraphs += [" ".join(current), waiting.pop(0)[1]]
            current = []
        current.append(sentence)
        passed += count
    paragraphs += [" ".join(current), *(fact for _, fact in waiting)]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _prompt(tokenizer: ModelTokenizer, text: str) -> list[int]:
    chat = bool(getattr(tokenizer, "chat_template", None))
    return prepare(tokenizer, Exercise(text if chat else f"{text}\nAnswer:", ""), chat).ids

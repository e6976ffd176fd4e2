"""Drills: rows whose answers need copying, retrieval from the context, or arithmetic (copying and induction tasks as in
arXiv 2209.11895), made from templates over the words that the model's own vocabulary has whole.

The answers are known, so nothing is generated. Wording and numbers differ from the tasks that evaluation/ makes: there
a line is repeated after another instruction, and the numbers to add are below 10; here they have two digits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from ..core.errors import UserError
from ..modeling.types import ModelTokenizer
from .chat import measured
from .drills_config import DrillKind, Drills
from .rows import Messages, Row, Split

SOURCE = "drills"
TURNS = 4  # exercises of a row, at most
SHORTEST_WORD, FEWEST_WORDS = 3, 16  # letters; words that the longest exercise needs
Turn = tuple[str, str]  # question and answer


def copying(draw: random.Random, words: Sequence[str]) -> list[Turn]:
    """Lines to write again."""
    lines = [" ".join(draw.sample(words, draw.randint(5, 12))) for _ in range(TURNS)]
    return [(f"Write this line once more, without any change:\n{line}", line) for line in lines]


def lookup(draw: random.Random, words: Sequence[str]) -> list[Turn]:
    """Entries of one table, asked for by their keys."""
    picked = draw.sample(words, 2 * draw.randint(TURNS, 8))
    table = dict(zip(picked[::2], picked[1::2], strict=True))
    lines = "\n".join(f"{key} -> {entry}" for key, entry in table.items())
    first, *others = draw.sample(list(table), TURNS)
    asked = [f"A table:\n{lines}\nWhich entry does {first} have?", *(f"And which one has {key}?" for key in others)]
    return [(question, table[key]) for question, key in zip(asked, (first, *others), strict=True)]


def successor(draw: random.Random, words: Sequence[str]) -> list[Turn]:
    """The word that comes after another in one line."""
    line = draw.sample(words, draw.randint(8, 14))
    first, *others = draw.sample(range(len(line) - 1), TURNS)
    asked = [f"A line of words:\n{' '.join(line)}\nWhich word comes right after {line[first]}?"]
    asked += [f"And after {line[place]}?" for place in others]
    return [(question, line[place + 1]) for question, place in zip(asked, (first, *others), strict=True)]


def arithmetic(draw: random.Random, _words: Sequence[str]) -> list[Turn]:
    """Sums and differences of two-digit numbers; no difference is negative."""
    turns = []
    for _ in range(TURNS):
        a, b = sorted((draw.randint(10, 99), draw.randint(10, 99)), reverse=True)
        if draw.random() < 0.5:
            turns.append((f"Work out {a} minus {b}.", f"{a} minus {b} makes {a - b}."))
        else:
            turns.append((f"Work out {b} plus {a}.", f"{b} plus {a} makes {a + b}."))
    return turns


MAKERS: dict[DrillKind, Callable[[random.Random, Sequence[str]], list[Turn]]] = {
    "copying": copying,
    "lookup": lookup,
    "successor": successor,
    "arithmetic": arithmetic,
}


class DrillRows:
    """Makes rows; row i is the same for any number of rows."""

    def __init__(self, config: Drills, tokenizer: ModelTokenizer, length: int, seed: int, where: str = "data"):
        """Raises `UserError` for a vocabulary with hardly any whole words."""
        self.config, self.tokenizer, self.length, self.seed, self.where = config, tokenizer, length, seed, where
        self.words = whole_words(tokenizer)
        if len(self.words) < FEWEST_WORDS and set(config.kinds) != {"arithmetic"}:
            raise UserError(
                f"{where}: the model's vocabulary has {len(self.words)} whole words, too few to make lines and tables "
                "of; leave drills out, or ask for kinds: [arithmetic]"
            )

    def row(self, number: int, split: Split = "train") -> Row:
        """A row with as many exercises of a kind as fit. Raises `UserError` if not even one does."""
        kind = self.config.kinds[number % len(self.config.kinds)]
        turns = MAKERS[kind](random.Random(f"{self.seed}/{SOURCE}/{number}"), self.words)
        for count in range(len(turns), 0, -1):
            row = measured(self._written(number, split, turns[:count]), self.tokenizer, None)
            if row.tokens <= self.length:
                return row
        raise UserError(
            f"{self.where}: the drill {kind} has {row.tokens} tokens, but rows have at most {self.length}; raise "
            "data.length, or leave that kind out"
        )

    def take(self, train: int, heldout: int) -> list[Row]:
        """Rows with at least `train` and `heldout` tokens to learn; ids count from 0. Each row goes to the split that
        lacks the larger share of its goal."""
        rows: list[Row] = []
        lacking: dict[Split, int] = {"train": train, "heldout": heldout}
        goals = dict(lacking)
        while any(tokens > 0 for tokens in lacking.values()):
            split = max(lacking, key=lambda split: lacking[split] / goals[split])
            rows.append(self.row(len(rows), split))
            lacking[split] -= rows[-1].targets
        return rows

    def _written(self, number: int, split: Split, turns: Sequence[Turn]) -> Row:
        """As a conversation, or as text for a model without a chat template."""
        if not getattr(self.tokenizer, "chat_template", None):
            text = "\n\n".join(f"{question}\n{answer}" for question, answer in turns)
            return Row(number, split, text=text, source=SOURCE)
        messages: Messages = []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Row(number, split, messages, source=SOURCE)


def whole_words(tokenizer: ModelTokenizer) -> list[str]:
    """The words in small letters that are a single token behind a space, in the order of the vocabulary."""
    pieces = dict.fromkeys(tokenizer.decode([token]).strip() for token in range(len(tokenizer)))
    found = [p for p in pieces if len(p) >= SHORTEST_WORD and p.isalpha() and p == p.lower()]
    if not found:
        return []
    # What follows a word, so that tokenizers which put a space before every text split it as within a line.
    begin = len(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    many: Any = tokenizer  # transformers' tokenizers take lists too, which is faster
    ids = many([f"a {piece}" for piece in found], add_special_tokens=False, verbose=False)["input_ids"]
    return [piece for piece, split in zip(found, ids, strict=True) if len(split) == begin + 1]

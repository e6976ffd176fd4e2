"""Long training rows: documents of the data stage one after another, with hidden facts that are asked about at the end;
or a user's own rows."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import UserError
from ..core.stage import Context
from ..data.chat import Encoded, encode_row, encode_whole
from ..data.drafts import reasons
from ..data.readers import DatasetRecord, DatasetSource, read_records
from ..data.rows import Messages, Row, Split, read_rows
from ..data.spans import TemplateError
from ..modeling.types import ModelTokenizer
from .config import SPREAD, LongRows

LEAD = "Read the following. A question about it comes at the end."
LEAST = 32  # minimum tokens of documents per row
TRIES = 20  # attempts at drawing facts that fit into the longest row
BREAK = re.compile(r"(?<=[.!?])\s+|\n+")
PASSKEYS = (  # statement, question, answer
    ("The pass key is {0}. Remember it. {0} is the pass key.", "What is the pass key?", "The pass key is {0}."),
    ("One of the special magic numbers is {0}.", "What is the special magic number?", "The magic number is {0}."),
    ("Keep this code: {0}.", "Which code were you to keep?", "The code I was to keep is {0}."),
)
KEYS = (  # statements of a place's number
    "The key of the {0} is {1}.",
    "To open the {0}, enter {1}.",
    "The {0} has the number {1}.",
)
PLACES = (
    "harbour", "library", "station", "garden", "workshop", "museum", "bakery", "castle", "hospital", "school", "market",
    "bridge", "theatre", "factory", "chapel", "airport", "cellar", "tower", "office", "farm",
)  # fmt: skip
PEOPLE = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Karla", "Leon", "Maria",
    "Niko", "Olga", "Peter", "Rosa", "Simon", "Tanja", "Victor",
)  # fmt: skip
THINGS = {
    "bicycle": ("red", "green", "blue", "yellow", "black", "white", "silver", "orange"),
    "favourite fruit": ("apple", "pear", "mango", "cherry", "plum", "peach", "melon", "fig"),
    "home town": ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Vienna", "Nairobi"),
    "instrument": ("violin", "flute", "piano", "drum", "guitar", "harp", "trumpet", "cello"),
}


@dataclass(frozen=True)
class LongRow:
    """A row's tokens; the first `prompt` of them are the prompt, the rest is the answer."""

    ids: list[int]
    prompt: int


@dataclass(frozen=True)
class Document:
    """A row of the data stage as a text to read; a conversation's first question can be asked again."""

    text: str
    tokens: int
    question: str = ""  # empty: plain text
    answer: str = ""
    cut: bool = False


@dataclass(frozen=True)
class HiddenQuestion:
    """What is hidden in a text, what is asked about it, and the answer."""

    facts: list[str]
    question: str
    answer: str
    cut: bool = False  # whether the answer is cut short
    document: Document | None = None  # hidden in place of a sentence


def passkey(draw: random.Random, _documents: list[Document]) -> HiddenQuestion:
    """One number in one sentence."""
    told, asked, answer = draw.choice(PASSKEYS)
    key = _number(draw)
    return HiddenQuestion([told.format(key)], asked, answer.format(key))


def keys(draw: random.Random, _documents: list[Document]) -> HiddenQuestion:
    """Several numbers, each of a named place. All are asked for, because a reader cannot know which will be."""
    places = draw.sample(PLACES, draw.randint(4, 8))
    told = draw.choice(KEYS)
    lines = {place: told.format(place, _number(draw)) for place in places}
    asked = draw.sample(places, len(places))
    question = f"Which number goes with the {_listed(asked)}?"
    return HiddenQuestion(list(lines.values()), question, " ".join(lines[place] for place in asked))


def facts(draw: random.Random, _documents: list[Document]) -> HiddenQuestion:
    """Statements about people; all are asked for."""
    people = draw.sample(PEOPLE, draw.randint(3, 6))
    known = {name: (thing := draw.choice(list(THINGS)), draw.choice(THINGS[thing])) for name in people}
    asked = draw.sample(people, len(people))

    def told(name: str) -> str:
        return f"{name}'s {known[name][0]} is {known[name][1]}."

    question = " ".join(f"What is {name}'s {known[name][0]}?" for name in asked)
    return HiddenQuestion([told(name) for name in people], question, " ".join(told(name) for name in asked))


def again(draw: random.Random, documents: list[Document]) -> HiddenQuestion:
    """A conversation among the documents, whose question is asked again and expects the same answer."""
    document = draw.choice([document for document in documents if document.question])
    return HiddenQuestion([document.text], document.question, document.answer, document.cut, document)


Kind = Callable[[random.Random, list[Document]], HiddenQuestion]
KINDS: tuple[Kind, ...] = (passkey, keys, facts, again)


def _number(draw: random.Random) -> int:
    return draw.randrange(10 ** (digits := draw.randint(3, 6)), 10 * 10**digits)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", the ".join(names[:-1]) + f" and the {names[-1]}"


class Maker:
    """Builds rows of up to `length` tokens from documents; a row depends only on its number and the seed."""

    def __init__(self, tokenizer: ModelTokenizer, documents: list[Document], length: int, seed: str):
        self.tokenizer, self.documents, self.length, self.seed = tokenizer, documents, length, seed
        longest = length // 2
        self.askable = [document for document in documents if document.question and document.tokens <= longest]
        self.kinds = KINDS if self.askable else KINDS[:-1]

    def row(self, number: int) -> LongRow:
        """Row `number`: kinds take turns, lengths are log-uniform. Raises `UserError` if even the longest row has no
        room for documents."""
        draw = random.Random(f"{self.seed} {number}")
        length = round(self.length / SPREAD ** draw.random())
        asked, depths, bare = self._asked(self.kinds[number % len(self.kinds)], draw)
        order = draw.sample(self.documents, len(self.documents))
        length = max(length, bare + LEAST)
        room = length - bare
        while True:
            row = self._encode(self._documents(order, room, asked.document), asked, depths)
            if len(row.ids) <= length:
                return row
            room -= len(row.ids) - length  # tokens that appear only when the pieces are joined

    def _asked(self, kind: Kind, draw: random.Random) -> tuple[HiddenQuestion, list[float], int]:
        """The questions, the depth of each fact, and the row's tokens without documents."""
        for _ in range(TRIES):
            asked = kind(draw, self.askable)
            depths = [draw.random() for _ in asked.facts]
            bare = len(self._encode("", asked, depths).ids)
            if bare + LEAST <= self.length:
                return asked, depths, bare
        raise UserError(
            f"retain.length: {self.length} tokens have no room for documents beside a question and its facts; raise it"
        )

    def _documents(self, order: list[Document], tokens: int, without: Document | None) -> str:
        """Documents one after another, repeated if there are too few, and cut to `room` tokens."""
        taken, count = [], 0
        others = [document for document in order if document is not without] or order
        while count < tokens:
            document = others[len(taken) % len(others)]
            taken.append(document.text)
            count += document.tokens
        text = "\n\n".join(taken)
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = offsets["offset_mapping"][: max(0, tokens)]
        return text[: spans[-1][1]] if spans else ""

    def _encode(self, text: str, asked: HiddenQuestion, depths: list[float]) -> LongRow:
        hidden = hide(text, asked.facts, depths)
        prompt = f"{LEAD}\n\n{hidden}\n\n{asked.question}"
        if not getattr(self.tokenizer, "chat_template", None):  # a base model continues the text
            before = self.tokenizer(f"{prompt}\n", verbose=False)["input_ids"]
            after = self.tokenizer(asked.answer, add_special_tokens=False, verbose=False)["input_ids"]
            return LongRow([*before, *after], len(before))
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": asked.answer}]
        row = last_answer(encode_row(self.tokenizer, Row(-1, "train", turns, cut=asked.cut)))
        assert row is not None
        return row


def hide(text: str, facts: list[str], depths: list[float]) -> str:
    """A text with each fact inserted as a paragraph, at the sentence or line break nearest to its depth (0 is the
    beginning, 1 the end)."""
    breaks = [0, *(match.end() for match in BREAK.finditer(text)), len(text)]
    places = [min(breaks, key=lambda place: abs(place - depth * len(text))) for depth in depths]
    pieces, rest = [], len(text)
    for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: pair[0], reverse=True):
        pieces += [text[place:rest].strip(), fact]
        rest = place
    pieces.append(text[:rest].strip())
    return "\n\n".join(piece for piece in reversed(pieces) if piece)


def last_answer(encoded: Encoded) -> LongRow | None:
    """A conversation up to the end of its last answer; None if that is empty or nothing precedes it."""
    mask = encoded.loss_mask
    end = max((i for i, learned in enumerate(mask) if learned), default=-1) + 1
    prompt = end
    while prompt > 0 and mask[prompt - 1]:
        prompt -= 1
    return LongRow(encoded.input_ids[:end], prompt) if 0 < prompt < end else None


def read_documents(tokenizer: ModelTokenizer, folder: Path, split: Split) -> list[Document]:
    """The rows of one split of a data stage's folder as documents; `UserError` if there are none."""
    documents = [_document(tokenizer, row) for row in read_rows(folder, split)]
    documents = [document for document in documents if document.tokens]
    if not documents:
        raise UserError(f"no {split} row of {folder.name} has text to build long rows from")
    return documents


def _document(tokenizer: ModelTokenizer, row: Row) -> Document:
    turns: Messages = [turn for turn in row.messages or [] if turn["role"] in ("user", "assistant")]
    question = answer = ""
    if row.messages is None:
        text = (row.text or "").strip()
    elif [turn["role"] for turn in turns] == ["user", "assistant"] and all(turn["content"] for turn in turns):
        question, answer = ((turn["content"] or "").strip() for turn in turns)
        text = f"Question: {question}\nAnswer: {answer}"
    else:
        text = "\n".join((turn["content"] or "").strip() for turn in turns)
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return Document(text, tokens, question, answer, row.cut)


@dataclass(frozen=True)
class RetainRows:
    """Training rows, by number below `count`, and held-out rows."""

    train: Callable[[int], LongRow]
    count: int
    heldout: list[LongRow]


def made_rows(tokenizer: ModelTokenizer, folder: Path, length: int, count: int, heldout: int, seed: int) -> RetainRows:
    """Rows built from a data stage's documents: training rows from its training rows, held-out from its held-out."""
    train = Maker(tokenizer, read_documents(tokenizer, folder, "train"), length, f"retain {seed}")
    held = Maker(tokenizer, read_documents(tokenizer, folder, "heldout"), length, f"retain heldout {seed}")
    return RetainRows(train.row, count, [held.row(number) for number in range(heldout)])


def _users_row(tokenizer: ModelTokenizer, record: DatasetRecord) -> tuple[LongRow | None, str, str]:
    """The row, or the reason why it cannot be used."""
    if record.messages is None:
        return None, record.dropped or "no_answer", record.detail
    try:
        encoded = encode_whole(tokenizer, Row(record.number, "train", record.messages, tools=record.tools))
    except TemplateError as error:
        return None, error.reason, f"{record.place}: {error}"
    return last_answer(encoded), "no_answer", ""


def users_rows(
    tokenizer: ModelTokenizer, config: LongRows, length: int, wanted: int, heldout: int, context: Context, cache: Path
) -> RetainRows:
    """A user's rows, shuffled by the seed: the first `heldout` are held out, at most `wanted` of the rest are for
    training. Rows that are too long are left out. Raises `UserError` if too few remain."""
    source = DatasetSource(config, context, "retain.dataset")
    rows: list[LongRow] = []
    longer = 0
    dropped: Counter[str] = Counter()
    first = ""
    for record in read_records(source, cache, shuffle=f"retain rows {context.seed}"):
        row, reason, detail = _users_row(tokenizer, record)
        if row is None:
            dropped[reason] += 1
            first = first or f"{reason}: {detail or record.place}"
            continue
        if len(row.ids) > length:
            longer += 1
            continue
        rows.append(row)
        if len(rows) == heldout + wanted:
            break
    if len(rows) <= heldout:
        more = f", {reasons(dropped)}; the first: {first}" if first else ""
        raise UserError(
            f"retain.dataset: {config.title} has {len(rows)} usable rows of at most {length} tokens ({longer} are "
            f"longer{more}); {heldout} are held out (retain.heldout), and at least one more is needed"
        )
    if dropped:
        context.progress.note(f"rows of {config.title} that cannot be used: {reasons(dropped)}; the first: {first}")
    if longer:
        context.progress.note(f"{longer} rows of more than {length} tokens are left out")
    train = rows[heldout:]
    if len(train) < wanted:
        context.progress.note(f"{len(train)} training rows instead of {wanted} (retain.rows): the data set has no more")
    return RetainRows(train.__getitem__, len(train), rows[:heldout])

"""Long rows: what is hidden in them, what is asked, how long they are; and a user's own."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.core.stage import Context, Progress
from compress.data.chat import render
from compress.data.rows import Row, write_rows
from compress.modeling.random import build_tokenizer
from compress.retain.config import LongRows
from compress.retain.rows import (
    KINDS,
    LEAD,
    Document,
    Maker,
    again,
    facts,
    hide,
    keys,
    made_rows,
    passkey,
    read_documents,
    users_rows,
)

TOKENIZER = build_tokenizer()
LENGTH = 1600


def documents(count: int = 30) -> list[Document]:
    draw, words = random.Random(1), "the way of many people is which model time and look so".split()
    found = []
    for number in range(count):
        question = f"{' '.join(draw.choices(words, k=4))} {number}?"
        answer = ". ".join(" ".join(draw.choices(words, k=6)) for _ in range(3)) + "."
        text = f"Question: {question}\nAnswer: {answer}"
        found.append(Document(text, len(TOKENIZER(text)["input_ids"]), question, answer, number % 2 == 0))
    return found


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(TOKENIZER, documents(), LENGTH, "seed")


def test_rows_are_chats_whose_answers_are_in_their_prompts(maker):
    seen = set()
    for number in range(24):
        row, kind = maker.row(number), KINDS[number % 4]
        prompt, answer = (TOKENIZER.decode(part) for part in (row.ids[: row.prompt], row.ids[row.prompt :]))
        assert prompt.startswith(f"<|im_start|>user\n{LEAD}\n\n") and prompt.endswith(
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        body = prompt.split(LEAD)[1].removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        words, ended = answer.removesuffix("<|im_end|>"), answer.endswith("<|im_end|>")
        *context, question = body.strip().split("\n\n")
        text = "\n\n".join(context)
        numbers = re.findall(r"\d{4,}", words)
        if kind is passkey:
            assert len(numbers) == 1 and text.count(numbers[0]) in (1, 2)
        elif kind in (keys, facts):
            stated = re.findall(r"[^.]+\.", words)
            assert all(line.strip() in context for line in stated)
            assert len(stated) in (range(4, 9) if kind is keys else range(3, 7))
            if kind is keys:  # every number that was told is asked for
                assert sorted(numbers) == sorted(re.findall(r"\d{4,}", text))
            seen.add(len(stated))
        else:
            (document,) = (d for d in maker.documents if d.question == question)
            assert words == document.answer and document.text in text and ended != document.cut
        assert kind is again or ended
    assert len(seen) >= 4


def test_lengths_are_spread_and_rows_are_full(maker):
    lengths = [len(maker.row(number).ids) for number in range(60)]
    assert max(lengths) <= LENGTH and min(lengths) < LENGTH / 5 and max(lengths) > LENGTH * 0.85
    halves = [sum(low <= n < 2 * low for n in lengths) for low in (LENGTH / 8, LENGTH / 4, LENGTH / 2)]
    assert min(halves) >= 10, halves  # the same number of rows in every doubling
    draw = random.Random("seed 7")
    wanted = round(LENGTH / 8 ** draw.random())
    assert wanted - 4 <= len(maker.row(7).ids) <= max(wanted, 400)


def test_a_row_depends_on_its_number_and_the_seed_alone(maker):
    assert [maker.row(n) for n in (5, 3)] == [Maker(TOKENIZER, documents(), LENGTH, "seed").row(n) for n in (5, 3)]
    assert maker.row(3) != maker.row(7) and maker.row(3) != Maker(TOKENIZER, documents(), LENGTH, "other").row(3)


def test_facts_lie_at_breaks_at_their_depths():
    text = " ".join(f"Sentence {n}." for n in range(100))
    hidden = hide(text, ["ONE", "TWO", "THREE", "FOUR"], [0.5, 0.0, 1.0, 0.25])
    pieces = hidden.split("\n\n")
    assert [pieces[i] for i in (0, 2, 4, 6)] == ["TWO", "FOUR", "ONE", "THREE"]
    assert pieces[1].endswith("Sentence 25.") and pieces[5].startswith("Sentence 50.")
    assert " ".join(pieces[i] for i in (1, 3, 5)) == text
    assert hide("", ["ONE", "TWO"], [0.3, 0.9]).split("\n\n") in (["ONE", "TWO"], ["TWO", "ONE"])
    assert hide("no break", ["ONE"], [0.9]) == "no break\n\nONE"


def test_depths_are_even(maker):
    places = []
    for number in range(0, 120, 4):  # pass keys
        row = maker.row(number)
        prompt = TOKENIZER.decode(row.ids[: row.prompt])
        (key,) = re.findall(r"\d{4,}", TOKENIZER.decode(row.ids[row.prompt :]))
        places.append(prompt.index(key) / len(prompt))
    assert min(places) < 0.25 and max(places) > 0.75 and 0.3 < sum(places) / len(places) < 0.7


def test_one_document_is_enough_and_a_long_one_is_cut():
    short = Maker(TOKENIZER, documents(1), LENGTH, "seed")
    assert max(len(short.row(n).ids) for n in range(12)) > LENGTH / 2  # again and again
    text = "The way of the people. " * 400
    long = Maker(TOKENIZER, [Document(text, len(TOKENIZER(text)["input_ids"]))], LENGTH, "seed")
    assert long.kinds == KINDS[:3]  # nothing to ask again
    for number in range(9):
        row = long.row(number)
        assert len(row.ids) <= LENGTH and "The way of the people" in TOKENIZER.decode(row.ids)


def test_a_length_without_room_is_refused():
    with pytest.raises(UserError, match=r"retain\.length: 150 tokens have no room for documents"):
        for number in range(4):
            Maker(TOKENIZER, documents(), 150, "seed").row(number)


def test_documents_of_a_data_stage(tmp_path):
    talk = [{"role": "user", "content": " Who? "}, {"role": "assistant", "content": "You."}]
    rows = [
        Row(0, "train", [{"role": "system", "content": "S"}, *talk], cut=True),
        Row(1, "train", talk * 2),
        Row(2, "train", text=" plain text "),
        Row(3, "heldout", text="held"),
    ]
    write_rows(tmp_path, rows)
    one, two, three = read_documents(TOKENIZER, tmp_path, "train")
    assert (one.text, one.question, one.answer, one.cut) == ("Question: Who?\nAnswer: You.", "Who?", "You.", True)
    assert (two.text, two.question) == ("Who?\nYou.\nWho?\nYou.", "")
    assert (three.text, three.question) == ("plain text", "")
    assert [d.text for d in read_documents(TOKENIZER, tmp_path, "heldout")] == ["held"]
    made = made_rows(TOKENIZER, tmp_path, LENGTH, 5, 2, 3)
    assert all("held" in TOKENIZER.decode(row.ids) for row in made.heldout)
    assert "plain text" in TOKENIZER.decode(made.train(0).ids) and "held" not in TOKENIZER.decode(made.train(0).ids)
    write_rows(tmp_path, rows[:3])
    with pytest.raises(UserError, match=r"no heldout row of .* has text to build long rows from"):
        made_rows(TOKENIZER, tmp_path, LENGTH, 5, 2, 3)


def test_a_model_without_chat_reads_on():
    plain = build_tokenizer()
    plain.chat_template = None
    row = Maker(plain, documents(), LENGTH, "seed").row(0)
    prompt, answer = plain.decode(row.ids[: row.prompt]), plain.decode(row.ids[row.prompt :])
    (key,) = re.findall(r"\d{4,}", answer)
    assert key in prompt and prompt.endswith("?\n") and "<|im" not in prompt + answer


def users(
    tmp_path: Path, rows: list[Any], length: int = 300, heldout: int = 2, progress: Any = None, **columns: str
) -> Any:
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = LongRows.model_validate({"path": "long.jsonl"} | columns)
    context = Context(seed=3, recipe_dir=tmp_path, progress=progress or Progress())
    return users_rows(TOKENIZER, config, length, 5, heldout, context, tmp_path / "cache")


def test_a_users_rows(noted, tmp_path):
    rows = [{"q": f"question {n}", "a": f"answer {n}", "long": "the way " * (10 if n % 3 else 400)} for n in range(12)]
    progress = noted()
    found = users(tmp_path, rows, progress=progress, prompt="q", context="long", response="a")
    assert len(found.heldout) == 2 and "4 rows of more than 300 tokens are left out" in progress.texts[-1]
    train = [found.train(n) for n in range(found.count)]
    texts = [TOKENIZER.decode(row.ids) for row in train]
    assert len(set(texts)) == len(texts) == 5
    assert not set(texts) & {TOKENIZER.decode(row.ids) for row in found.heldout}
    for row in train + found.heldout:
        answer = TOKENIZER.decode(row.ids[row.prompt :])
        number = re.fullmatch(r"answer (\d+)<\|im_end\|>", answer)
        assert number and f"question {number[1]}\n" in TOKENIZER.decode(row.ids[: row.prompt])
    with pytest.raises(UserError, match=r"long\.jsonl has 2 usable rows of at most 300 tokens \(1 are longer\); 2 are"):
        users(tmp_path, rows[:3], prompt="q", context="long", response="a")


def test_of_a_conversation_the_last_answer_counts(tmp_path):
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    found = users(tmp_path, [{"m": turns}] * 3, messages="m")
    row = found.train(0)
    assert TOKENIZER.decode(row.ids[: row.prompt]) == render(TOKENIZER, turns[:3], answer=True)
    assert TOKENIZER.decode(row.ids[row.prompt :]) == "assistant 1<|im_end|>"


def test_a_users_turn_that_the_template_leaves_out_is_no_silence(tmp_path, monkeypatch):
    template = TOKENIZER.chat_template.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    turns = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant")]
    with pytest.raises(UserError, match=r"3 left_out; the first: left_out: line \d of .* \(role system\)"):
        users(tmp_path, [{"m": turns}] * 3, messages="m")

"""Drills: rows whose answers need copying, retrieval or arithmetic (`source: drills`), and beside other rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress.core.cost import Setting
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.chat import encode_row
from compress.data.config import DataConfig
from compress.data.cost import rows_of
from compress.data.drills import TURNS, DrillRows, whole_words
from compress.data.drills_config import Drills
from compress.data.rows import Row, read_rows
from compress.data.stage import check, ready, run
from compress.evaluation.builtin import MAKERS as TASKS
from compress.evaluation.builtin import exercises
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_config, load_tokenizer
from compress.pipeline.stages import STAGES
from compress.records.figures import DataFigures
from pydantic import TypeAdapter, ValidationError

KINDS = ["copying", "lookup", "successor", "arithmetic"]


@pytest.fixture(scope="module")
def drills(tiny: Callable[..., Path]) -> DrillRows:
    return DrillRows(Drills(), load_tokenizer(tiny()), 1024, 7)


def section(**keys: Any) -> Any:
    return TypeAdapter(DataConfig).validate_python(keys)


def collected(base: Path, out: Path, **keys: Any) -> tuple[list[Row], DataFigures]:
    out.mkdir()
    context = Context(seed=7)
    ready(section(**keys), context)
    check(section(**keys), base, context)
    figures = run(section(**keys), Inputs(base, base), out, context)
    return read_rows(out), DataFigures.model_validate(figures)


def turns(row: Row) -> list[tuple[str, str]]:
    said = [message["content"] for message in row.messages or []]
    return list(zip(said[::2], said[1::2], strict=True))


def solved(kind: str, asked: list[str]) -> list[str]:
    """The right answers, read from the questions alone."""
    if kind == "copying":
        return [question.splitlines()[1] for question in asked]
    if kind == "arithmetic":
        found = [re.fullmatch(r"Work out (\d\d) (plus|minus) (\d\d)\.", question) for question in asked]
        parts = [(int(m[1]), m[2], int(m[3])) for m in found if m]
        return [f"{a} {sign} {b} makes {a + b if sign == 'plus' else a - b}." for a, sign, b in parts]
    words = [re.split(r"\W+", question.rstrip("?")) for question in asked]
    lines = asked[0].splitlines()
    if kind == "lookup":
        table = dict(line.split(" -> ") for line in lines[1:-1])
        return [table[asked[-2] if number == 0 else asked[-1]] for number, asked in enumerate(words)]
    line = lines[1].split()
    return [line[line.index(asked[-1]) + 1] for asked in words]


def test_answers_are_right(drills: DrillRows) -> None:
    for number in range(40):
        pairs = turns(drills.row(number))
        assert len(pairs) == TURNS
        assert [answer for _, answer in pairs] == solved(KINDS[number % 4], [question for question, _ in pairs])
    results = [int(answer.split()[-1][:-1]) for n in range(3, 120, 4) for _, answer in turns(drills.row(n))]
    assert min(results) >= 0 and max(results) > 99


def test_a_row_depends_on_its_number_and_the_seed_alone(drills: DrillRows) -> None:
    again = DrillRows(Drills(), drills.tokenizer, 1024, 7)
    assert [again.row(number) for number in (5, 3)] == [drills.row(5), drills.row(3)]
    other = DrillRows(Drills(), drills.tokenizer, 1024, 8)
    assert all(other.row(number) != drills.row(number) for number in range(8))
    assert len({str(turns(drills.row(number))) for number in range(60)}) == 60
    only = DrillRows(Drills(kinds=["arithmetic"]), drills.tokenizer, 1024, 7)
    assert all("Work out" in only.row(number).messages[0]["content"] for number in range(5))  # type: ignore[index]


def test_words_are_single_tokens_within_a_line(drills: DrillRows) -> None:
    """Token by token from the offsets of a line of all words; each is in the vocabulary as it stands there."""
    line = "a " + " ".join(drills.words)
    encoding = drills.tokenizer(line, return_offsets_mapping=True, add_special_tokens=False)
    pieces = [line[start:end].strip() for start, end in encoding["offset_mapping"]]
    assert [piece for piece in pieces if piece][1:] == drills.words
    assert len(drills.words) > 50 and all(re.fullmatch("[a-z]{3,}", word) for word in drills.words)


def test_tasks_of_the_evaluation_are_not_among_them(drills: DrillRows) -> None:
    """Neither their wording nor, for sums, their numbers."""
    rows = [drills.row(number) for number in range(80)]
    said = "\n".join(text for row in rows for pair in turns(row) for text in pair)
    asked = {question for row in rows for question, _ in turns(row)}
    wording = {re.sub(r"\d+", "#", prompt.split(":")[0]) for task in TASKS for prompt in _prompts(task)}
    assert wording == {"Repeat", "What is # + #?"}  # a new task has to be looked at here
    assert not any(prompt in asked for task in TASKS for prompt in _prompts(task))
    assert "Repeat" not in said and "What is" not in said and "+" not in said
    assert all(int(number) >= 10 for question in asked if "Work" in question for number in re.findall(r"\d+", question))


def _prompts(task: str) -> list[str]:
    return [prompt for exercise in exercises(task, 100) for prompt in (exercise.prompt, *dict(exercise.examples))]


def test_a_row_has_as_many_exercises_as_fit(drills: DrillRows) -> None:
    whole = drills.row(3)
    assert whole.tokens == len(encode_row(drills.tokenizer, whole).input_ids)
    assert whole.targets == sum(encode_row(drills.tokenizer, whole).loss_mask)
    shorter = DrillRows(Drills(), drills.tokenizer, whole.tokens - 1, 7).row(3)
    assert turns(shorter) == turns(whole)[: TURNS - 1] and shorter.tokens < whole.tokens
    with pytest.raises(UserError, match=r"data: the drill copying has \d+ tokens, but rows have at most 16; raise"):
        DrillRows(Drills(), drills.tokenizer, 16, 7).row(0)


def test_models_without_a_template_get_text(tiny: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(tiny())
    tokenizer.chat_template = None  # type: ignore[attr-defined]
    row = DrillRows(Drills(kinds=["arithmetic"]), tokenizer, 512, 7).row(0)
    assert row.messages is None and row.text is not None and row.targets == row.tokens - 1
    assert re.fullmatch(r"(Work out \d\d (plus|minus) \d\d\.\n\d\d (plus|minus) \d\d makes \d+\.(\n\n|$)){4}", row.text)


def test_a_data_stage_of_drills(tiny: Callable[..., Path], tmp_path: Path) -> None:
    rows, figures = collected(tiny(), tmp_path / "out", source="drills", rows=16, heldout=0.25, length=1024)
    assert (figures.rows, figures.heldout, figures.kept_share) == (16, 4, 1.0)
    assert [row.id for row in rows] == list(range(16)) and {row.source for row in rows} == {"drills"}
    assert figures.targets == sum(row.targets for row in rows) > 0


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_beside_other_rows_they_have_their_weight(tiny: Callable[..., Path], tmp_path: Path, weight: float) -> None:
    """In both splits, to within a row; own rows stay as they are, and any part has its share of each source."""
    keys: dict[str, Any] = {"source": "texts", "rows": 24, "batch": 24, "tokens": 48, "heldout": 0.25, "length": 512}
    own, _ = collected(tiny(), tmp_path / "own", **keys)
    rows, figures = collected(tiny(), tmp_path / "both", **keys, drills={"weight": weight, "kinds": ["arithmetic"]})
    for split in ("train", "heldout"):
        kept = [row.text for row in rows if (row.source, row.split) == ("texts", split)]
        assert kept == [row.text for row in own if row.split == split]
        parts = {
            name: [row.targets for row in rows if row.split == split and row.source == name]
            for name in ("texts", "drills")
        }
        goal = weight * sum(parts["texts"])
        assert goal <= sum(parts["drills"]) < goal + max(parts["drills"])
    assert set(figures.shares) == {"texts", "drills"}
    assert figures.shares["drills"].share == pytest.approx(weight / (1 + weight), abs=0.05)
    train = [row for row in rows if row.split == "train"]
    half = sum(row.targets for row in train[: len(train) // 2] if row.source == "drills")
    assert half / sum(row.targets for row in train if row.source == "drills") == pytest.approx(0.5, abs=0.25)


def test_beside_real_text(tiny: Callable[..., Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{number} and some words of it" for number in range(400)))
    prose: dict[str, Any] = {"source": "prose", "path": str(text), "separator": "\n", "tokens": 800, "length": 512}
    rows, figures = collected(tiny(), tmp_path / "out", **prose, drills={"kinds": ["arithmetic"]})
    assert set(figures.shares) == {"prose", "drills"} and figures.prose is not None
    assert figures.shares["drills"].share == pytest.approx(0.5, abs=0.06)
    assert [row.id for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("kinds", [[], ["sums"]])
def test_kinds_that_do_not_exist_are_refused(kinds: list[str]) -> None:
    with pytest.raises(ValidationError, match="kinds"):
        section(source="drills", kinds=kinds)


def test_a_vocabulary_without_words_is_refused_before_any_work(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.data.drills.whole_words", lambda _: ["only", "few"])
    keys = {"source": "texts", "drills": {}}
    with pytest.raises(UserError, match=r"data.drills: the model's vocabulary has 2 whole words, too few"):
        check(section(**keys), tiny(), Context())
    check(section(**keys | {"drills": {"kinds": ["arithmetic"]}}), tiny(), Context())
    assert len(whole_words(load_tokenizer(tiny()))) > 50


def test_the_plan_knows_them(tiny: Callable[..., Path]) -> None:
    cost, at = STAGES["data"].cost, Setting(geometry_of(load_config(tiny()).to_dict()), 4, "float32")
    alone, texts = section(source="drills", rows=100), {"source": "texts", "rows": 100, "tokens": 64}
    assert cost.need(alone, at).note == "drills, nothing is written"
    work = cost.work(alone, at)
    assert work is not None and work.total == 0
    plain, both = rows_of(section(**texts)), rows_of(section(**texts, drills={"weight": 2}))
    assert plain is not None and both is not None
    assert both.learned == 3 * plain.learned and both.targets == 3 * plain.targets
    assert cost.need(section(**texts, drills={}), at).note.startswith("drills and 64 written at once")

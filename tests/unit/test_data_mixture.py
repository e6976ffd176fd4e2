"""Several data sets by weight, duplicates, and rows that evaluation files have."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.config import DataConfig
from compress.data.rows import read_rows
from compress.data.stage import check, run
from pydantic import TypeAdapter, ValidationError


class Stage:
    def __init__(self, noted: Callable[[], Any], base: Path, folder: Path):
        self.noted, self.base, self.folder, self.runs = noted, base, folder, 0

    def file(self, name: str, records: list[Any]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (self.folder / name).write_text(text, encoding="utf-8")

    def __call__(self, seed: int = 7, **section: Any) -> dict[str, Any]:
        self.runs += 1
        self.out = self.folder / f"out{self.runs}"
        self.out.mkdir()
        config = TypeAdapter(DataConfig).validate_python(section)
        self.progress = self.noted()
        context = Context(seed=seed, recipe_dir=self.folder, progress=self.progress)
        check(config, self.base, context)
        return run(config, Inputs(self.base, self.base), self.out, context)


@pytest.fixture
def stage(noted: Callable[[], Any], tiny: Callable[..., Path], tmp_path: Path) -> Stage:
    made = Stage(noted, tiny(), tmp_path)
    for name in "abc":
        made.file(f"{name}.jsonl", [{"prompt": f"{name} {i}", "response": "so"} for i in range(40)])
    return made


def sets(**weights: float) -> list[dict[str, Any]]:
    return [{"path": f"{name}.jsonl", "weight": weight} for name, weight in weights.items()]


def test_weights_decide_the_shares(stage: Stage) -> None:
    for weights, rows, expected in (
        ({"a": 2, "b": 1, "c": 1}, 40, {"a.jsonl": 20, "b.jsonl": 10, "c.jsonl": 10}),
        ({"a": 1, "b": 1}, 5, {"a.jsonl": 3, "b.jsonl": 2}),
        ({"a": 0.1, "b": 0.7}, 16, {"a.jsonl": 2, "b.jsonl": 14}),
    ):
        metrics = stage(source="datasets", sets=sets(**weights), rows=rows)
        assert metrics["sets"] == expected and metrics["rows"] == rows
        found = read_rows(stage.out)
        assert Counter(row.source for row in found) == expected
        assert len({row.id for row in found}) == rows and [row.id for row in found] == sorted(row.id for row in found)


def test_the_seed_decides_which_and_nothing_else_does(stage: Stage) -> None:
    section = {"source": "datasets", "sets": sets(a=1, b=2), "rows": 12}
    stage(**section)
    first = stage.out
    stage(**section)
    assert (first / "rows.parquet").read_bytes() == (stage.out / "rows.parquet").read_bytes()
    stage(seed=8, **section)
    assert {row.id for row in read_rows(first)} != {row.id for row in read_rows(stage.out)}
    stage(shuffle=False, **section)
    rows = read_rows(stage.out)
    assert [row.messages[0]["content"] for row in rows if row.messages and row.source == "a.jsonl"] == [
        f"a {i}" for i in range(4)
    ]
    # Two sets are not shuffled alike.
    stage(source="datasets", sets=sets(a=1, b=1), rows=20)
    orders = [{row.id // 2 for row in read_rows(stage.out) if row.source == name} for name in ("a.jsonl", "b.jsonl")]
    assert orders[0] != orders[1]


def test_a_set_that_runs_out_is_told_and_filled_up(stage: Stage) -> None:
    stage.file("b.jsonl", [{"prompt": f"b {i}", "response": "so"} for i in range(3)])
    metrics = stage(source="datasets", sets=sets(a=1, b=1), rows=30)
    assert metrics["sets"] == {"a.jsonl": 27, "b.jsonl": 3}
    assert "b.jsonl ran out after 3 rows; the other data sets supply the rest" in stage.progress.texts
    metrics = stage(source="datasets", sets=sets(a=1, b=1), rows=60)
    assert metrics["rows"] == 43
    assert "43 rows instead of 60: the data sets have no more" in stage.progress.texts


def test_sets_have_columns_and_rewriting_of_their_own(stage: Stage) -> None:
    stage.file("b.jsonl", [{"q": f"b {i}", "messages": None, "a": "so"} for i in range(9)])
    stage.file("c.jsonl", [{"t": f"plain text {i}"} for i in range(9)])
    several = [
        {"path": "a.jsonl"},
        {"path": "b.jsonl", "prompt": "q", "response": "a"},
        {"path": "c.jsonl", "text": "t"},
    ]
    metrics = stage(source="datasets", sets=several, rows=9)
    assert metrics["sets"] == {"a.jsonl": 3, "b.jsonl": 3, "c.jsonl": 3}
    assert sum(row.text is not None for row in read_rows(stage.out)) == 3


def test_errors_name_the_set(stage: Stage) -> None:
    with pytest.raises(UserError, match=r"data\.sets\.1\.path: .*nowhere\.jsonl does not exist"):
        stage(source="datasets", sets=[*sets(a=1), {"path": "nowhere.jsonl"}], rows=4)
    with pytest.raises(
        UserError, match=r"data\.sets\.1\.response: r: b\.jsonl has no such column; it has: prompt, resp"
    ):
        stage(source="datasets", sets=[*sets(a=1), {"path": "b.jsonl", "response": "r"}], rows=4)
    stage.file("c.jsonl", [{"prompt": "", "response": ""}] * 3)
    with pytest.raises(UserError, match=r"data\.sets\.0\.path: 3 of 3 rows of c\.jsonl cannot be used \(3 empty\)"):
        stage(source="datasets", sets=sets(c=1), rows=4)
    for wrong in (
        {"sets": [], "rows": 4},
        {"sets": sets(a=1)},
        {"sets": sets(a=0), "rows": 4},
        {"sets": [{"path": "a.jsonl", "rows": 3}], "rows": 4},
    ):
        with pytest.raises(ValidationError):
            TypeAdapter(DataConfig).validate_python({"source": "datasets", **wrong})


def test_duplicates_are_dropped(stage: Stage) -> None:
    records = [
        ("What is 3 + 4?", "7"),
        ("what is  3 + 4?\n", "7"),
        ("What is 3 - 4?", "-1"),
        ("What is 3 + 4?", "Seven"),
    ]
    stage.file("a.jsonl", [{"prompt": p, "response": r} for p, r in records])
    metrics = stage(source="dataset", path="a.jsonl")
    assert metrics["dropped"] == {"duplicate": 1} and [row.id for row in read_rows(stage.out)] == [0, 2, 3]
    stage.file("b.jsonl", [{"prompt": p, "response": r} for p, r in [*records, ("new", "x")]])
    assert stage(source="datasets", sets=sets(a=1, b=1), rows=9)["dropped"] == {"duplicate": 5}


LONG = "Which factor will most likely cause a person to develop a fever in the cold of a long winter"


def slow_overlap(first: str, second: str, size: int) -> bool:
    """Whether two texts share so many words in a row."""
    words = [["".join(c for c in w if c.isalnum()) for w in text.lower().split()] for text in (first, second)]
    a, b = ([w for w in text if w] for text in words)
    return any(a[i : i + size] == b[j : j + size] for i in range(len(a) - size + 1) for j in range(len(b) - size + 1))


def test_rows_of_evaluation_files_are_dropped(stage: Stage) -> None:
    stage.file(
        "task.jsonl", [{"question": LONG, "choices": ["food", "heat"], "answer": 1}, {"more": {"deep": ["Short one?"]}}]
    )
    (stage.folder / "wiki.txt").write_text("The dog and the cat went over the hill to see the sea.\nAnd so they did.")
    rows = {
        "kept": ("An unrelated question", "food"),  # a choice of one word as an answer tells nothing
        "same": (LONG, "x"),
        "case": (LONG.upper().replace(" ", "  ") + "!", "x"),
        "part": ("Say: " + " ".join(LONG.split()[3:16]) + " and so on", "x"),
        "less": ("Say: " + " ".join(LONG.split()[3:15]) + " and so on", "x"),
        "answer": ("Tell me", "He said: " + LONG),
        "short": ("short ONE", "x"),
        "within": ("Is this a short one?", "x"),
        "text": ("Go on", "so the dog and the cat went over the hill to see the sea and so on"),
    }
    stage.file("a.jsonl", [{"prompt": p, "response": r} for p, r in rows.values()])
    section = {"source": "dataset", "path": "a.jsonl", "decontaminate": {"files": ["task.jsonl", "wiki.txt"]}}
    metrics = stage(**section)
    names = list(rows)
    kept = {names[row.id] for row in read_rows(stage.out)}
    assert kept == {"kept", "less", "within"}
    assert metrics["contaminated"] == {"task.jsonl": 5, "wiki.txt": 1} and metrics["dropped"] == {"contaminated": 6}
    for name in set(rows) - {"short"}:
        texts = (LONG, (stage.folder / "wiki.txt").read_text())
        assert (name not in kept) == any(slow_overlap(t, r, 13) for t in texts for r in rows[name]), name
    metrics = stage(**{**section, "decontaminate": {"files": ["task.jsonl"], "ngram": 12}})
    assert "less" not in {names[row.id] for row in read_rows(stage.out)}
    files = TypeAdapter(DataConfig).validate_python(section).input_files()
    assert files == ["a.jsonl", "task.jsonl", "wiki.txt"]


def test_plain_text_is_looked_at_too(stage: Stage) -> None:
    (stage.folder / "wiki.txt").write_text(LONG)
    stage.file("a.jsonl", [{"t": f"{i} {LONG}"} for i in range(2)] + [{"t": f"other {i}"} for i in range(3)])
    metrics = stage(source="dataset", path="a.jsonl", text="t", decontaminate={"files": ["wiki.txt"]})
    assert metrics["contaminated"] == {"wiki.txt": 2} and metrics["rows"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("a.csv", "x", r"a\.csv is not a \.jsonl or \.txt file"),
        ("bad.jsonl", '{"a": "b"}\n{"a": \n', "line 2 of .*bad.jsonl is not valid JSON"),
        ("bytes.txt", b"\xff\xfe\xff", "is not UTF-8 text: its byte order mark says UTF-16"),
    ],
)
def test_evaluation_files_that_cannot_be_read(stage: Stage, name: str, content: Any, message: str) -> None:
    if content is not None:
        (stage.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=rf"data\.decontaminate\.files: .*{message}"):
        stage(source="dataset", path="b.jsonl", decontaminate={"files": [name]})


def test_separators_within_json_strings_do_not_end_a_line(stage: Stage) -> None:
    stage.file("task.jsonl", [{"q": "one\u2028two\x85three"}])
    assert stage(source="dataset", path="b.jsonl", decontaminate={"files": ["task.jsonl"]})["rows"] == 40

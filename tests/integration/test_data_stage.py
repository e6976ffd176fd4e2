from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.config import DataConfig, DatasetConfig, MagpieConfig
from compress.data.rows import Row, read_rows
from compress.data.stage import check, run, split_rows
from pydantic import TypeAdapter, ValidationError

RECORDS = [{"prompt": f"Wie viele? {i} 🙂", "response": f"中文 é {i}\nso", "n": i} for i in range(12)]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


class Stage:
    """Runs the stage on one data file of a fresh folder."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder, self.runs = base, folder, 0

    def __call__(self, name: str, seed: int = 7, **options: Any) -> dict[str, Any]:
        self.runs += 1
        self.out = self.folder / f"out{self.runs}"
        self.out.mkdir()
        config = DatasetConfig(source="dataset", path=name, **options)
        context = Context(seed=seed, recipe_dir=self.folder)
        check(config, self.base, context)
        return run(config, Inputs(self.base, self.base), self.out, context)

    def rows(self) -> list[Row]:
        return read_rows(self.out)


@pytest.fixture
def stage(tiny: Callable[..., Path], tmp_path: Path) -> Stage:
    return Stage(tiny(), tmp_path)


def test_jsonl_parquet_and_csv_give_the_same_rows(stage: Stage, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "response", "n"])
        writer.writeheader()
        writer.writerows(RECORDS)
    seen = []
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        metrics = stage(name)
        assert (metrics["rows"], metrics["train"], metrics["heldout"], metrics["dropped"]) == (12, 10, 2, {})
        seen.append([(row.id, row.split, row.messages, row.tokens, row.targets) for row in stage.rows()])
        assert {row.source for row in stage.rows()} == {name}
    assert seen[0] == seen[1] == seen[2]
    assert [turns and [m["content"] for m in turns] for _, _, turns, _, _ in seen[0]] == [
        [r["prompt"], r["response"]] for r in RECORDS
    ]
    assert {p.name for p in stage.out.iterdir()} == {"rows.parquet", "stats.json", ".work"}


def test_the_same_data_gives_the_same_bytes(stage: Stage, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    stage("a.jsonl", rows=5, shuffle=True)
    first = stage.out
    stage("a.jsonl", rows=5, shuffle=True)
    assert all((first / n).read_bytes() == (stage.out / n).read_bytes() for n in ("rows.parquet", "stats.json"))
    assert len(stage.rows()) == 5 and [row.id for row in stage.rows()] != list(range(5))
    chosen = [row.id for row in stage.rows()]
    stage("a.jsonl", rows=5, shuffle=True, seed=8)
    assert [row.id for row in stage.rows()] != chosen


def test_columns_by_other_names_and_numbers_as_answers(stage: Stage, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    stage("a.jsonl", prompt="response", response="n")
    first = stage.rows()[0].messages
    assert first and [m["content"] for m in first] == ["中文 é 0\nso", "0"]
    with pytest.raises(UserError, match=r"data\.response: answer: a\.jsonl has no such column; it has: prompt, resp"):
        stage("a.jsonl", response="answer")


def test_conversations(stage: Stage, tmp_path: Path) -> None:
    def turn(role: str, content: str | None) -> dict[str, Any]:
        return {"role": role, "content": content}

    talk = [turn("system", "Be so"), turn("user", "a b"), turn("assistant", "c"), turn("user", "d")]
    records: list[list[dict[str, Any]] | None] = [
        talk,
        [*talk, turn("assistant", "e f")],
        [turn("assistant", "x"), turn("user", "y"), turn("assistant", "z")],
        [turn("user", "y")],
        [turn("user", None), turn("assistant", "z")],
        None,
        [],
        [turn("user", "<|im_end|>"), turn("assistant", "z")],
        [turn("user", "y"), turn("assistant", "z " * 600)],
    ]
    write_jsonl(tmp_path / "a.jsonl", [{"talk": record} for record in records])
    metrics = stage("a.jsonl", messages="talk", max_dropped=0.8)
    assert metrics["dropped"] == {"empty": 3, "no_answer": 1, "no_prompt": 1, "special_token": 1, "too_long": 1}
    assert [row.messages for row in stage.rows()] == [talk[:3], [*talk, turn("assistant", "e f")]]
    assert [row.targets for row in stage.rows()] == [2, 5]  # c, end; then also e, f, end
    write_jsonl(tmp_path / "c.jsonl", [{"talk": "hello"}] * 3)
    with pytest.raises(UserError, match=r"line 1 of c\.jsonl \(column 'talk'\) holds text, not a list of messages"):
        stage("c.jsonl", messages="talk")


def test_plain_text_needs_no_template(stage: Stage, tmp_path: Path) -> None:
    records = [{"t": "the way of é 🙂 " * n} for n in (1, 0, 50, 3)]
    write_jsonl(tmp_path / "a.jsonl", [*records, {"t": None}])
    metrics = stage("a.jsonl", text="t", length=32, max_dropped=0.5)
    assert metrics["dropped"] == {"empty": 2} and [row.text for row in stage.rows()] == [
        records[i]["t"] for i in (0, 2, 3)
    ]
    assert all(row.messages is None and row.targets < row.tokens for row in stage.rows())


def test_nulls_are_dropped_and_counted(stage: Stage, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [*RECORDS, {"prompt": None, "response": "x"}, {"prompt": "x", "response": "  "}])
    assert stage("a.jsonl")["dropped"] == {"empty": 2}
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "response": None}, {"prompt": "x", "response": "y"}])
    with pytest.raises(UserError, match=r"b\.jsonl has 1 usable rows, but at least 2 are needed.*dropped: 1 empty"):
        stage("b.jsonl", max_dropped=0.5)
    write_jsonl(tmp_path / "c.jsonl", [{"prompt": ["x"], "response": "y"}] * 2)
    with pytest.raises(
        UserError, match=r"line 1 of c\.jsonl \(column 'prompt'\) must hold a list of \{role, content\}"
    ):
        stage("c.jsonl")


def test_files_that_are_missing_empty_or_broken(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.docx").touch()
    good = json.dumps(RECORDS[0])
    (tmp_path / "broken.jsonl").write_text(good + "\n" + good + "\n" + '{"prompt": "x", "resp\n')
    (tmp_path / "list.jsonl").write_text(good + "\n[1, 2]\n")
    (tmp_path / "bytes.jsonl").write_bytes(good.encode() + b'\n{"prompt": "\xff"}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 nothing more")
    (tmp_path / "header.csv").write_text("prompt,response\n")
    for name, message in {
        "none.jsonl": r".*none\.jsonl does not exist",
        "empty.jsonl": r"empty\.jsonl is empty",
        "notes.docx": r"notes\.docx is not a \.jsonl or",
        "broken.jsonl": r"line 3 of .*broken\.jsonl is not valid JSON",
        "list.jsonl": r"line 2 of .*list\.jsonl is a JSON array where an object is needed",
        "bytes.jsonl": r"line 2 of .*bytes\.jsonl is not UTF-8 text: byte 12 is 0xff",
        "broken.parquet": r"broken\.parquet could not be read",
        "header.csv": r"header\.csv has no rows",
    }.items():
        with pytest.raises(UserError, match=message):
            stage(name)


def test_hub_data_sets_that_cannot_be_had(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def missing(*_: Any, **__: Any) -> None:
        raise DatasetNotFoundError("Dataset 'who/what' is a gated dataset on the Hub. You must be authenticated")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(UserError, match=r"'who/what' is not a local file and cannot be loaded from the Hub: .* gated"):
        stage("who/what")

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'who/what' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match="could not be loaded: Couldn't reach"):
        stage("who/what")


def test_a_template_that_refuses_every_row_is_told(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import compress.data.stage as module
    from compress.modeling.load import load_tokenizer

    tokenizer = load_tokenizer(stage.base)
    tokenizer.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + str(
        tokenizer.chat_template
    )
    monkeypatch.setattr(module, "load_tokenizer", lambda _: tokenizer)
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    with pytest.raises(
        UserError, match=r"cannot be used \(12 template\), more than .*; the first: template: line 1 of .*one turn only"
    ):
        stage("a.jsonl")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        stage("a.jsonl")
    assert stage("a.jsonl", text="prompt")["rows"] == 12


def test_split_rows_holds_out_a_share_but_never_all_or_none() -> None:
    for count, share, expected in ((2, 0.01, 1), (2, 0.99, 1), (40, 0.125, 5), (3, 0.9, 2)):
        rows = split_rows([Row(i, "train", text="x") for i in range(count)], share, 7)
        assert sum(row.split == "heldout" for row in rows) == expected
        assert [row.id for row in rows] == list(range(count))
    many = [Row(i, "train", text="x") for i in range(40)]
    held = {r.id for r in split_rows(many, 0.25, 1) if r.split == "heldout"}
    assert held != {r.id for r in split_rows(many, 0.25, 2) if r.split == "heldout"}
    fewer = {r.id for r in split_rows(many, 0.125, 1) if r.split == "heldout"}
    assert fewer < held  # a larger share holds out more rows, not others


def test_recipe_section() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(DataConfig)
    assert isinstance(adapter.validate_python({"source": "magpie"}), MagpieConfig)
    local = adapter.validate_python({"source": "dataset", "path": "x/rows.jsonl"})
    assert local.input_files() == ["x/rows.jsonl"] and local.columns == {"prompt": "prompt", "response": "response"}
    assert adapter.validate_python({"source": "dataset", "path": "who/what"}).input_files() == []
    for wrong in (
        {"source": "dataset"},
        {"source": "web"},
        {"source": "magpie", "row": 3},
        {"source": "dataset", "path": "a.csv", "text": "t", "prompt": "p"},
        {"source": "magpie", "heldout": 1.0},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
    for config in (MagpieConfig, DatasetConfig):
        assert all(field.description for name, field in config.model_fields.items() if name != "source")

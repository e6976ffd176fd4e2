"""Files are read literally: a value is the text that stands there, a name is a name."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.config import DatasetConfig
from compress.data.rows import read_rows
from compress.data.stage import check, run
from compress.data.tables import open_table
from compress.data.turns import literal

TRICKY = [
    "007",
    "1e3",
    "NA",
    "null",
    "None",
    "True",
    "0.10",
    "-0",
    "1,5",
    'a "b"',
    "two\nlines",
    " spaced ",
    "é🙂",
    "nan",
    "1_000",
]


def column(path: Path, name: str, cache: Path) -> list[str | None]:
    """All values of one column, as they are learned."""
    table = open_table(path, [name], cache)
    return [literal(table.row(number).get(name)) for number in range(len(table))]


def test_csv_values_are_the_text_that_stands_there(tmp_path: Path) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"' if any(c in value for c in ',"\n') else value

    for begin, end in (("", "\n"), ("\ufeff", "\r\n")):
        file = tmp_path / "a.csv"
        lines = ["q,a", *(f"{i},{quoted(value)}" for i, value in enumerate([*TRICKY, "", "x"]))]
        file.write_bytes((begin + end.join(lines) + end).encode())
        assert column(file, "a", tmp_path / "c") == [*TRICKY, "", "x"]
        assert column(file, "q", tmp_path / "c") == [str(i) for i in range(len(TRICKY) + 2)]
    file.write_text("only\n007\n\n08")  # no last line end; a blank line is no row
    assert column(file, "only", tmp_path / "c") == ["007", "08"]
    file.write_text(',q\n0,"' + "x" * 200_000 + '"\n')  # the row numbers of pandas; a long value
    assert column(file, "q", tmp_path / "c") == ["x" * 200_000]


def test_csv_files_that_cannot_be_read_are_named_with_the_line(tmp_path: Path) -> None:
    for content, message in {
        "q,a\n1,2\n1,2,3\n": r"row at line 3 of .*a\.csv has 3 values, but the header has 2",
        'q,a\n1,"2\n3"\n1\n': "row at line 4 of .* has 1 values",
        "q,q\n1,2\n": "names 'q' twice",
        "\n\n": "has no header",
        'q,a\n1,"2\n': "row at line 2 of .* a quote opens there and never closes",
        "q;a\n1;2\n": "separates values by semicolons; save it with commas",
        "q\ta\n1\t2\n": "separates values by tabs",
        "q,a\n1,caf\xe9\n": "line 2 of .* is not UTF-8 text: byte 5 is 0xe9",
        "q,a\r1,2\r": "carriage return",
        "q,a\n": "has no rows",
    }.items():
        (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=message) as caught:
            open_table(tmp_path / "a.csv", ["q"], tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.csv").write_bytes("q,a\n1,2\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16"):
        open_table(tmp_path / "a.csv", ["q"], tmp_path)


def test_json_lines_take_any_values_beside_the_wanted_ones(tmp_path: Path) -> None:
    rows = [
        '{"a": 0.10, "meta": {"score": 1}}',
        "",
        '{"a": 007.5e1, "meta": {"score": "high"}}'.replace("007.5e1", "7.50e1"),
        '{"a": "x\u2028y\x85z", "late": [1, {"b": null}]}',
        '{"a": 12345678901234567890123, "meta": 3}',
        '{"a": true}',
        '{"a": null}',
        '{"other": 1}',
    ]
    expected = ["0.10", "7.50e1", "x\u2028y\x85z", "12345678901234567890123", "true", "", ""]
    for begin, end in (("", "\n"), ("\ufeff", "\r\n")):
        file = tmp_path / "a.jsonl"
        file.write_bytes((begin + end.join(rows)).encode())
        assert column(file, "a", tmp_path) == expected
        table = open_table(file, ["a"], tmp_path)
        assert list(table.columns) == ["a", "meta", "late", "other"]
        assert [table.place(i) for i in (0, 1)] == ["line 1 of a.jsonl", "line 3 of a.jsonl"]


def test_json_files_hold_rows_in_one_of_three_ways(tmp_path: Path) -> None:
    rows = [{"a": f"{i}"} for i in range(3)]
    file = tmp_path / "a.json"
    for content in (
        json.dumps(rows, indent=1),
        json.dumps({"version": "1", "data": rows}),
        "\n".join(json.dumps(row) for row in rows),
    ):
        file.write_text("\ufeff" + content, encoding="utf-8")
        assert column(file, "a", tmp_path) == ["0", "1", "2"]
    file.write_text('[{"a": 0.10}]')
    assert column(file, "a", tmp_path) == ["0.10"]
    for content, message in {
        '{"a": [1], "b": [2]}': r"2 lists \(a, b\)",
        '{"a": {"0": 1}}': "no list, but a",
        '[{"a": 1}, 3]': "row 2 of .* is a JSON number",
        '"x"': "holds a JSON string",
        "3": "holds a JSON number",
        '[{"a": 1}': "not valid JSON",
        "[]": "has no rows",
    }.items():
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            open_table(file, ["a"], tmp_path)
    (tmp_path / "a.jsonl").write_text("[{}]")
    with pytest.raises(UserError, match=r"is a JSON array, not JSON Lines; rename it to end in \.json"):
        open_table(tmp_path / "a.jsonl", ["a"], tmp_path)


def test_parquet_values_are_exact(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 3, 1, 12, 30, 0, 5)
    columns: dict[str, tuple[pa.Array, list[str]]] = {
        "text": (pa.array([*TRICKY[:3], None]), [*TRICKY[:3], ""]),
        "large": (pa.array(TRICKY[:4], pa.large_string()), TRICKY[:4]),
        "dictionary": (pa.array(["007", "08", "007", None]).dictionary_encode(), ["007", "08", "007", ""]),
        "int": (pa.array([1, None, -(2**62), 4]), ["1", "", str(-(2**62)), "4"]),
        "double": (pa.array([0.1, 1e300, 2.0, None]), ["0.1", "1e+300", "2.0", ""]),
        "float": (pa.array([0.1, 2.5, 1.0, None], pa.float32()), ["0.1", "2.5", "1.0", ""]),
        "decimal": (pa.array([Decimal("0.10"), Decimal("7.00"), None, Decimal("1.25")]), ["0.10", "7.00", "", "1.25"]),
        "bool": (pa.array([True, False, None, True]), ["true", "false", "", "true"]),
        "date": (pa.array([datetime.date(2024, 1, 2)] * 4), ["2024-01-02"] * 4),
        "moment": (pa.array([moment] * 4), [moment.isoformat()] * 4),
        "bytes": (pa.array(["é".encode()] * 4), ["é"] * 4),
        "with.dot": (pa.array(TRICKY[:4]), TRICKY[:4]),
        "with": (pa.array([{"dot": "no"}] * 4), [None] * 4),  # type: ignore[list-item]
    }
    table = pa.table({name: values for name, (values, _) in columns.items()})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    for name, (_, expected) in columns.items():
        assert column(tmp_path / "a.parquet", name, tmp_path / "c") == expected, name
    assert not [file for file in (tmp_path / "c").iterdir() if file.suffix != ".arrow"]


def test_nested_parquet_values_have_no_padding(stage: Stage, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": "say", "reasoning_content": "muse"},
    ]
    other = [{"role": "system", "content": "be so", "name": "n", "weight": 1}]  # so that the struct has more keys
    pq.write_table(pa.Table.from_pylist([{"m": messages}, {"m": [*other, *messages]}]), tmp_path / "a.parquet")
    stage(tmp_path / "a.parquet", messages="m")
    assert [row.messages for row in read_rows(stage.out)] == [
        messages,
        [{k: other[0][k] for k in ("role", "content", "name")}, *messages],
    ]


class Stage:
    """Runs the stage on one data file."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder, self.runs = base, folder, 0

    def __call__(self, path: Path, **options: Any) -> dict[str, Any]:
        self.runs += 1
        self.out = self.folder / f"out{self.runs}"
        self.out.mkdir()
        config = DatasetConfig(source="dataset", path=str(path), **options)
        context = Context(seed=7, recipe_dir=self.folder)
        check(config, self.base, context)
        return run(config, Inputs(self.base, self.base), self.out, context)


@pytest.fixture
def stage(tiny: Callable[..., Path], tmp_path: Path) -> Stage:
    return Stage(tiny(), tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_all_kinds_of_files_give_the_same_rows_in_any_order(stage: Stage, tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"ask {value}", "response": value} for value in TRICKY]
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=4)
    elif suffix == "csv":
        lines = ['"' + '","'.join(v.replace('"', '""') for v in row.values()) + '"' for row in rows]
        file.write_text("\n".join(["prompt,response", *lines]), encoding="utf-8")
    else:
        text = json.dumps(rows) if suffix == "json" else "\n".join(json.dumps(row) for row in rows)
        file.write_text(text, encoding="utf-8")
    for shuffle in (False, True):
        stage(file, shuffle=shuffle)
        learned = [row.messages[-1]["content"] for row in read_rows(stage.out) if row.messages]
        assert learned == TRICKY


NAMES = ["in [a]", "a*b?", "sp ace", "qu'o\"te", "文 é🙂", "-x", "[!a]", "{a,b}", "a#b%20", "~x", "$HOME"]


@pytest.mark.parametrize("name", NAMES)
def test_folders_and_files_may_have_any_name(stage: Stage, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    stage.folder = folder
    rows = [{"prompt": f"ask {i}", "response": f"say {i}"} for i in range(6)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / f"{name}.csv").write_text("prompt,response\n" + "".join(f"{r['prompt']},{r['response']}\n" for r in rows))
    (folder / f"{name}.txt").write_text("ask 3")
    for suffix in ("jsonl", "parquet", "csv"):
        file = Path(f"{name}.{suffix}") if name[0] != "~" else folder / f"{name}.{suffix}"
        found = stage(file, decontaminate={"files": [str(folder / f"{name}.txt")]})
        assert (found["rows"], found["dropped"]) == (5, {"contaminated": 1})


def test_a_folder_whose_name_is_no_text(stage: Stage, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    file = Path(os.fsdecode(folder)) / "a.parquet"
    with file.open("wb") as sink:
        pq.write_table(pa.Table.from_pylist([{"prompt": f"ask {i}", "response": "x"} for i in range(4)]), sink)
    stage.folder = file.parent
    assert stage(Path("a.parquet"))["rows"] == 4

"""Real text as rows (`source: prose`), and beside the rows that a model writes."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from compress.core.cost import Setting
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs, Progress
from compress.data.calibration import calibration_batches
from compress.data.chat import encode_text, load_encoded
from compress.data.config import DataConfig, MagpieConfig, ProseConfig, TextsConfig
from compress.data.cost import rows_of
from compress.data.mixing import goals, interleaved
from compress.data.prose import ProseSource, cut, take
from compress.data.prose import learned as tokens_to_learn
from compress.data.rows import Row, read_rows
from compress.data.stage import check, ready, run
from compress.data.tables.text_files import TextFiles, split_text
from compress.modeling.geometry import geometry_of
from compress.modeling.load import load_config, load_tokenizer
from compress.pipeline.stages import STAGES
from compress.records.figures import DataFigures
from compress.retain.rows import read_documents
from pydantic import TypeAdapter, ValidationError

LENGTH = 32


class Noted(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def document(number: int, words: int = 60) -> str:
    """Words that no other document has; the tests' tokenizer has about a token per byte of them."""
    draw = random.Random(number)
    return " ".join("".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 8))) for _ in range(words)) + ".\n"


def texts(folder: Path, count: int = 12, words: int = 60) -> Path:
    (folder / "deep").mkdir(parents=True)
    for number in range(count):
        where = folder / "deep" if number % 3 == 0 else folder
        (where / f"{number:02d}{'.md' if number % 2 else '.txt'}").write_text(document(number, words))
    (folder / "table.csv").write_text("a,b\n")  # not text
    return folder


def settings(**values: Any) -> ProseConfig:
    return ProseConfig.model_validate({"source": "prose", "tokens": 1000, "length": LENGTH, "heldout": 0.2} | values)


def make(base: Path, out: Path, config: DataConfig, progress: Progress | None = None, seed: int = 7) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    context = Context(seed=seed, recipe_dir=out.parent, progress=progress or Progress())
    ready(config, context)
    check(config, base, context)
    return run(config, Inputs(base, base), out, context)


def learned(rows: list[Row], split: str) -> int:
    return sum(row.targets for row in rows if row.split == split)


def test_rows_are_cut_documents_with_exactly_the_tokens_asked_for(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, tokenizer = tiny(), load_tokenizer(tiny())
    texts(tmp_path / "books")
    stats = make(base, tmp_path / "out", settings(path="books/"))
    rows = read_rows(tmp_path / "out")
    assert (learned(rows, "train"), learned(rows, "heldout")) == (800, 200) and stats["targets"] == 1000
    for row in rows:
        windows = encode_text(tokenizer, row.text or "")
        assert row.messages is None and row.source == "books" and len(windows) == 1 and row.tokens <= LENGTH
        assert (row.tokens, row.targets) == (len(windows[0].input_ids), sum(windows[0].loss_mask))
    # Documents are cut, nothing of them is left out before the goal: the rows of one joined are its beginning.
    known = [document(number) for number in range(12)]
    where = {row.id: next(n for n, text in enumerate(known) if (row.text or "") in text) for row in rows}
    for number in set(where.values()):
        joined = "".join(row.text or "" for row in rows if where[row.id] == number)
        assert known[number].startswith(joined) and len(joined) > LENGTH
    # Held-out rows are of other documents than training rows.
    splits = {split: {where[row.id] for row in rows if row.split == split} for split in ("train", "heldout")}
    assert splits["train"] and splits["heldout"] and not splits["train"] & splits["heldout"]
    figures = DataFigures.model_validate(stats).prose
    size = sum(len(row.text or "") for row in rows) / sum(row.tokens for row in rows)
    assert figures is not None and figures.bytes_per_token == round(size, 2) and not figures.dropped
    assert (figures.train_documents, figures.heldout_documents) == (len(splits["train"]), len(splits["heldout"]))


def test_rows_are_the_same_for_a_seed_and_others_for_another(tiny: Callable[..., Path], tmp_path: Path) -> None:
    texts(tmp_path / "books")
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        make(tiny(), tmp_path / name, settings(path="books/"), seed=seed)
    a, b, c = ((tmp_path / name / "rows.parquet").read_bytes() for name in "abc")
    assert a == b != c
    make(tiny(), tmp_path / "d", settings(path="books/", shuffle=False))
    first = read_rows(tmp_path / "d")[0]
    assert document(1).startswith(first.text or "")  # 01.md: files in order of their paths


@pytest.mark.parametrize("words", [True, False])
def test_pieces_joined_are_the_text_whatever_the_characters(tiny: Callable[..., Path], words: bool) -> None:
    tokenizer = load_tokenizer(tiny())
    text = "Ein Fluß, é🙂 и река 山 x. " * 9 + "z" * 50
    start, pieces = 0, []
    while start < len(text):
        end, tokens = cut(tokenizer, text, start, 16, words=words)
        assert end > start and tokens <= 16 and tokens == len(tokenizer(text[start:end])["input_ids"])
        pieces.append(text[start:end])
        start = end
    assert "".join(pieces) == text
    inside = sum(a[-1].isalnum() and b[0].isalnum() for a, b in itertools.pairwise(pieces))
    assert (inside <= 4) if words else (inside > 4)  # only the last word is longer than a row
    assert cut(tokenizer, "🙂🙂", 0, 2) == (1, 4)  # one character alone has more


def test_data_sets_of_text_are_read_by_their_column(tiny: Callable[..., Path], tmp_path: Path) -> None:
    bodies = ["", document(0), *(document(n) for n in range(12))]
    rows = [{"body": body, "id": n} for n, body in enumerate(bodies)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = []
    for name in ("a.jsonl", "a.parquet"):
        progress = Noted()
        config = settings(path=name, text="body", tokens=2800, shuffle=False)
        stats = make(tiny(), tmp_path / f"out-{name}", config, progress)
        found.append([(row.text, row.split) for row in read_rows(tmp_path / f"out-{name}")])
        assert stats["dropped"] == {"duplicate": 1, "empty": 1} == stats["prose"]["dropped"]
        assert any("documents dropped (1 duplicate, 1 empty)" in note for note in progress.notes)
    assert found[0] == found[1]
    with pytest.raises(UserError, match=r"data\.text: text: a\.jsonl has no such column; it has: body, id"):
        make(tiny(), tmp_path / "none", settings(path="a.jsonl"))


@pytest.mark.parametrize("content", ["\ufeff# é\n# zwei 中", "  \n# only", "none", "", "intro ü\n# z\r\n"])
def test_documents_read_one_by_one_are_those_of_the_whole_file(tmp_path: Path, content: str) -> None:
    """Byte order marks, blank beginnings and characters of several bytes included."""
    file = tmp_path / "a.txt"
    file.write_bytes(content.encode())
    table = TextFiles([file, file], "# ")
    first, *rest = content.removeprefix("\ufeff").split("# ")
    expected = [part for part in (first, *("# " + part for part in rest)) if part.strip()]
    assert [table.row(number)["text"] for number in range(len(table))] == 2 * expected


def test_a_file_is_one_document_unless_a_separator_divides_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    whole = "\n# ".join(document(n) for n in range(8))
    (tmp_path / "book.txt").write_text(whole)
    with pytest.raises(UserError, match=r"book\.txt has \d+ tokens in 1 document, but these cannot be divided"):
        make(tiny(), tmp_path / "one", settings(path="book.txt"))
    stats = make(tiny(), tmp_path / "eight", settings(path="book.txt", separator="\n# "))
    assert stats["prose"]["train_documents"] + stats["prose"]["heldout_documents"] <= 8
    table = TextFiles([tmp_path / "book.txt"], "\n# ")
    assert len(table) == 8 and "".join(table.row(n)["text"] for n in range(8)) == whole
    assert table.place(2) == "document 3 of book.txt"
    assert split_text("\n# a\n# b", "\n# ") == ["\n# a", "\n# b"] and split_text("a", None) == ["a"]


def test_too_little_text_says_how_much_there_is_and_is_needed(tiny: Callable[..., Path], tmp_path: Path) -> None:
    texts(tmp_path / "books", count=3, words=15)
    size = sum(tokens_to_learn(load_tokenizer(tiny()), document(n, 15), LENGTH) for n in range(3))
    message = r"books has (\d+) tokens in 3 documents, but 1000 are needed \(800 to learn and 200 to hold out\)"
    with pytest.raises(UserError, match=message) as error:
        make(tiny(), tmp_path / "out", settings(path="books/"))
    said = int(str(error.value).split(" has ")[1].split()[0])
    assert abs(said - size) <= 3  # rows end between words, so there may be one more in a document
    # Beside rows that are still to be written it is refused before they are.
    config = TypeAdapter(DataConfig).validate_python(
        {"source": "texts", "rows": 8, "tokens": 200, "prose": {"path": "books/", "weight": 2}}
    )
    with pytest.raises(UserError, match=r"data\.prose\.path: books has \d+ tokens, but up to 3216, in two or more"):
        make(tiny(), tmp_path / "beside", config)
    assert not list((tmp_path / "beside").rglob("*.jsonl"))  # no part was written


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "empty/"}, r"data\.path: the folder .*empty has no text files \(\.txt, \.md, \.rst\)"),
        ({"path": "gone/"}, r"data\.path: .*gone does not exist"),
        ({"path": "gone.txt"}, r"data\.path: .*gone\.txt does not exist"),
        ({"path": "gone.parquet"}, r"data\.path: .*gone\.parquet does not exist"),
        ({"path": "empty"}, r"data\.path: empty is a folder; write empty/ to read its files"),
        ({"path": "a.txt", "decontaminate": {"files": ["no.txt"]}}, r"data\.decontaminate\.files: .*no\.txt does not"),
    ],
)
def test_missing_text_is_refused_before_any_work(
    tiny: Callable[..., Path], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.csv").write_text("a\n1\n")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=message):
        check(settings(**keys), tiny(), Context(recipe_dir=tmp_path))


def test_keys_that_do_not_fit_the_path_are_refused() -> None:
    for keys, message in (
        ({"path": "a.txt", "text": "body"}, "text files have no columns"),
        ({"path": "books/", "subset": "en"}, "text files have no columns"),
        ({"path": "a.jsonl", "separator": "#"}, "separator is for text files"),
    ):
        with pytest.raises(ValidationError, match=message):
            settings(**keys)
    again = settings(path="books/")
    assert ProseConfig.model_validate(again.model_dump(mode="json")) == again
    assert settings(path="/books").is_text and settings(path="a.md").is_text
    assert not settings(path="org/books").is_text and not settings(path="/a.parquet").is_text
    assert settings(path="org/books").input_files() == [] and settings(path="/a.csv").input_files() == ["/a.csv"]
    beside = MagpieConfig.model_validate({"source": "magpie", "prose": {"path": "books/"}})
    assert beside.input_files() == ["books/"]


def test_text_that_is_split_into_bytes_is_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    texts(tmp_path / "books")
    progress = Noted()
    make(tiny(), tmp_path / "out", settings(path="books/"), progress)
    warning = r"warning: books: a token has 1\.\d bytes of this text \(English: about 4\): the tokenizer splits it"
    assert sum(bool(re.match(warning, note)) for note in progress.notes) == 1


def test_documents_that_overlap_with_evaluation_files_are_dropped(tiny: Callable[..., Path], tmp_path: Path) -> None:
    texts(tmp_path / "books")
    (tmp_path / "exam.txt").write_text(document(5))
    config = settings(path="books/", tokens=3000, decontaminate={"files": ["exam.txt"], "ngram": 8})
    stats = make(tiny(), tmp_path / "out", config)
    assert stats["prose"]["dropped"] == {"contaminated": 1}
    assert not any((row.text or "") in document(5) for row in read_rows(tmp_path / "out"))


def test_pythons_own_documentation_is_a_text(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = settings(path="builtin:python-docs", tokens=3000, length=128)
    stats = make(tiny(), tmp_path / "out", config)
    assert stats["targets"] == 3000 and stats["prose"]["heldout_documents"] >= 1
    assert config.input_files()[0].endswith("topics.py")


@pytest.mark.parametrize("weight", [0.5, 1, 3])
def test_shares_beside_written_rows_are_exact_in_both_splits(
    tiny: Callable[..., Path], tmp_path: Path, weight: float
) -> None:
    texts(tmp_path / "books", count=40)
    written = {"source": "texts", "rows": 12, "batch": 6, "tokens": 40, "heldout": 0.25, "length": LENGTH}
    alone, mixed = (
        TextsConfig.model_validate(written | more) for more in ({}, {"prose": {"path": "books/", "weight": weight}})
    )
    make(tiny(), tmp_path / "alone", alone)
    progress = Noted()
    stats = make(tiny(), tmp_path / "mixed", mixed, progress)
    own, rows = read_rows(tmp_path / "alone"), read_rows(tmp_path / "mixed")
    for split in ("train", "heldout"):  # nothing else changes
        kept = [row.text for row in rows if (row.source, row.split) == ("texts", split)]
        assert kept == [row.text for row in own if row.split == split]
    real = [row for row in rows if row.source == "books"]
    for split in ("train", "heldout"):
        assert learned(real, split) == round(weight * learned(own, split))
    share = learned(real, "train") / learned(rows, "train")
    figures = DataFigures.model_validate(stats)
    assert figures.shares["books"].share == round(share, 4) and list(figures.shares) == ["texts", "books"]
    assert figures.shares["texts"].learned == learned(own, "train")
    assert figures.shares["books"].heldout == learned(real, "heldout")
    assert any(note == f"tokens to learn: {1 - share:.1%} texts, {share:.1%} books" for note in progress.notes)
    assert [row.id for row in rows] == list(range(len(rows)))
    # What reads a beginning of the rows has both: calibration, and a variant of half the rows.
    train = [row for row in rows if row.split == "train"]
    half = train[: len(train) // 2]
    ofs = Counter({source: sum(row.targets for row in half if row.source == source) for source in ("texts", "books")})
    assert ofs["books"] / ofs.total() == pytest.approx(share, abs=0.12)


def test_order_of_two_sources_is_by_tokens() -> None:
    def rows(source: str, sizes: list[int]) -> list[Row]:
        return [Row(i, "train", text="x", source=source, targets=size) for i, size in enumerate(sizes)]

    order = interleaved(rows("a", [10, 10, 10, 10]), rows("b", [5, 30, 5]))
    assert [row.source for row in order] == ["b", "a", "a", "b", "a", "a", "b"]
    held = [Row(9, "heldout", text="x", targets=4)]
    assert goals([*rows("a", [3, 4]), *held], 1.5) == (round(10.5), 6)


def test_every_stage_that_reads_rows_takes_them(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base, tokenizer = tiny(), load_tokenizer(tiny())
    texts(tmp_path / "books")
    make(base, tmp_path / "out", settings(path="books/"))
    windows = load_encoded(tmp_path / "out", tokenizer, "train", LENGTH)
    assert all(len(w.input_ids) <= LENGTH and not w.loss_mask[0] and all(w.loss_mask[1:]) for w in windows)
    inputs = Inputs(base, base, {"data": tmp_path / "out"})
    batches = calibration_batches(inputs, tokenizer, tokens=300, length=LENGTH, batch=2)
    assert sum(batch.tokens for batch in batches) == 300
    documents = read_documents(tokenizer, tmp_path / "out", "train")
    assert len(documents) == len(read_rows(tmp_path / "out", "train")) and all(d.tokens for d in documents)


def test_the_plan_knows_its_rows_and_that_nothing_is_written(tiny: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny()
    at = Setting(geometry_of(load_config(base).to_dict()), 4, "float32")
    cost = STAGES["data"].cost
    config = settings(path="books/", tokens=2000)
    work, need, rows = cost.work(config, at), cost.need(config, at), rows_of(config)
    assert work is not None and work.total == 0 and need.note == "real text, nothing is written"
    assert list(need.parts) == ["runtime"] and cost.cards(config, 4) == 1 and not list(cost.changes(config, at))
    assert rows is not None and (rows.learned, rows.targets, rows.longest) == (1600, 400, LENGTH)
    texts(tmp_path / "books")
    made = make(base, tmp_path / "out", config)
    assert rows.learned + rows.targets == made["targets"] and rows.tokens == pytest.approx(made["tokens"], rel=0.05)
    cached = cost.work(settings(path="books/", teacher={"top_k": 4}), at)
    assert cached is not None and cached.total > 0
    beside = {"source": "texts", "rows": 16, "tokens": 100}
    own, mixed = (TextsConfig.model_validate(beside | more) for more in ({}, {"prose": {"path": "x/", "weight": 3}}))
    plain, both = rows_of(own), rows_of(mixed)
    assert plain is not None and both is not None
    assert (both.learned, both.targets) == (4 * plain.learned, 4 * plain.targets)
    written, as_much = cost.work(own, at), cost.work(mixed, at)
    assert written is not None and as_much is not None and written.total == as_much.total > 0


def test_a_goal_that_splits_a_character_ends_before_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Every character has four tokens, so 100 and 21 tokens can only be missed, and by less than a character."""
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number}" + "🙂" * 40)
    source = ProseSource(settings(path=f"{tmp_path}/"), Context())
    found = take(source, 100, 21, load_tokenizer(tiny()), LENGTH, tmp_path / "cache")
    counted = Counter({split: learned(found.rows, split) for split in ("train", "heldout")})
    assert 96 < counted["train"] <= 100 and 17 < counted["heldout"] <= 21

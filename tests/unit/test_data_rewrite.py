"""Rewriting gold answers: what is asked, what is taken, what is kept and why, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compress.data.stage as stage_module
import pytest
from compress.core.errors import UserError
from compress.core.stage import Advance, Context, Inputs, Progress
from compress.data.asking import last_answer, leaks, own_prompt, rewrite_prompt
from compress.data.config import DataConfig, DatasetConfig, General, Maths
from compress.data.rewriting import WINDOW
from compress.data.rows import Row, read_rows
from compress.data.sampling import Sampled, Sampling, row_seed
from compress.data.stage import check, run
from compress.modeling.load import load_tokenizer
from pydantic import TypeAdapter, ValidationError


@pytest.fixture
def base(tiny: Callable[..., Path]) -> Path:
    return tiny(max_positions=2048)


def says(tokenizer: Any, text: str, ended: bool = True, looped: bool = False) -> Sampled:
    return Sampled(tokenizer(text)["input_ids"], ended, looped)


class Fake:
    """An engine that answers by what it is asked: `reply(prompt, how)` gives a text or a Sampled."""

    def __init__(self, tokenizer: Any, reply: Callable[[str, Sampling], str | Sampled]):
        self.tokenizer, self.reply = tokenizer, reply
        self.calls: list[list[str]] = []
        self.lengths: list[int] = []
        self.closed = 0

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: Sampling,
        *,
        stop: Collection[int],
        banned: Sequence[int] = (),
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> list[Sampled]:
        assert 2 in stop and 2 not in banned and len(prompts) == len(seeds)
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        self.calls.append(texts)
        self.lengths += [len(prompt) for prompt in prompts]
        replies = [self.reply(text, how) for text in texts]
        return [r if isinstance(r, Sampled) else says(self.tokenizer, r) for r in replies]

    def close(self) -> None:
        self.closed += 1


class Stage:
    """Runs the stage with a fake engine on records of a fresh file."""

    def __init__(self, base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.base, self.folder, self.monkeypatch, self.runs = base, folder, monkeypatch, 0
        self.tokenizer = load_tokenizer(base)
        self.opened: list[int] = []

    def __call__(
        self,
        records: list[dict[str, Any]],
        reply: Callable[[str, Sampling], str | Sampled],
        rewrite: Any = "general",
        out: Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        self.runs += 1
        (self.folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        self.out = out or self.folder / f"out{self.runs}"
        self.out.mkdir(exist_ok=True)
        self.fake = Fake(self.tokenizer, reply)

        def opens(config: Any, base: Path, context: Context, length: int, rows: int) -> Fake:
            self.opened.append(length)
            return self.fake

        self.monkeypatch.setattr("compress.data.writing.open_engine", opens)
        config = TypeAdapter(DatasetConfig).validate_python(
            {"source": "dataset", "path": "a.jsonl", "rewrite": rewrite, **options}
        )
        context = Context(seed=7, recipe_dir=self.folder, progress=progress or Progress())
        check(config, self.base, context)
        return run(config, Inputs(self.base, self.base), self.out, context)

    def rows(self) -> dict[str, Row]:
        """By the user's last words."""
        return {row.messages[-2]["content"]: row for row in read_rows(self.out) if row.messages}


@pytest.fixture
def stage(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(base, tmp_path, monkeypatch)


def request(prompt: str) -> str:
    """The request that a prompt for a general rewrite shows."""
    return prompt.partition("### Request\n")[2].partition("\n\n### Reference")[0]


def test_the_prompt_shows_request_and_gold_and_the_row_does_not(stage: Stage) -> None:
    records = [{"prompt": f"Name {i}", "response": f"gold {i}"} for i in range(3)]
    metrics = stage(records, lambda prompt, _: f"mine of {request(prompt)}")
    (texts,) = stage.fake.calls
    for i, text in enumerate(texts):
        assert f"Name {i}" in text and f"gold {i}" in text and text.endswith("<|im_start|>assistant\n")
        assert "in your own words" in text
    rows = stage.rows()
    for i in range(3):
        row = rows[f"Name {i}"]
        assert row.messages == [
            {"role": "user", "content": f"Name {i}"},
            {"role": "assistant", "content": f"mine of Name {i}"},
        ]
        assert (row.origin, row.why, row.seed) == ("rewritten", "unchecked", row_seed(7, i, "rewritten"))
    assert metrics["rewritten"] == {
        "asked": 3,
        "origins": {"rewritten": 3},
        "taken_share": 1.0,
        "gold_kept": {},
    }
    assert json.loads((stage.out / "stats.json").read_text())["rewritten"] == metrics["rewritten"]
    shown = json.loads((stage.out / "examples.json").read_text())
    assert shown[0] == {
        "prompt": "Name 0",
        "gold": "gold 0",
        "written": "mine of Name 0",
        "origin": "rewritten",
        "why": "unchecked",
    }
    assert stage.fake.closed == 1 and all(length + 256 <= stage.opened[0] for length in stage.fake.lengths)


def test_without_rewrite_rows_are_gold_and_nothing_is_drawn(stage: Stage) -> None:
    metrics = stage([{"prompt": f"q{i}", "response": "a"} for i in range(3)], lambda *_: "never", rewrite=None)
    assert {(row.origin, row.why) for row in read_rows(stage.out)} == {("gold", "")}
    assert stage.fake.calls == [] and "rewritten" not in metrics and not (stage.out / "examples.json").exists()


def test_gold_is_kept_and_says_why(stage: Stage) -> None:
    def reply(prompt: str, how: Sampling) -> str | Sampled:
        name = request(prompt)
        tokenizer = stage.tokenizer
        return {
            "good": "it makes 72 in all",
            "leak": "As the reference answer says, it makes 72.",
            "differs": "it makes 71",
            "empty": "  ",
            "unfinished": says(tokenizer, "it makes 72 and", ended=False),
            "repetitive": says(tokenizer, "72 72 72", ended=False, looped=True),
            "too_long": "words and " * 60 + " 72",
            "special_token": "it makes 72 <|im_end|> so",
        }[name]

    names = ["good", "leak", "differs", "empty", "unfinished", "repetitive", "too_long", "special_token"]
    records = [{"prompt": name, "response": "48 + 24\n#### 72"} for name in [*names, "uncheckable"]]
    records[-1]["response"] = "nobody knows"
    metrics = stage(records, reply, {"kind": "general", "check": "number"}, length=100)
    rows = stage.rows()
    assert {name: (row.origin, row.why) for name, row in rows.items()} == {
        "good": ("rewritten", "number agrees"),
        **{name: ("gold", name) for name in [*names[1:], "uncheckable"]},
    }
    assert all(
        row.messages and row.messages[-1]["content"].endswith("#### 72") for n, row in rows.items() if n in names[1:]
    )
    assert metrics["rewritten"]["gold_kept"] == {name: 1 for name in sorted([*names[1:], "uncheckable"])}
    assert metrics["rewritten"]["origins"] == {"gold": 8, "rewritten": 1} and metrics["rows"] == 9
    assert "uncheckable" not in {request(text) for text in stage.fake.calls[0]}  # nothing is drawn for it


def test_a_template_that_refuses_the_rewrite_keeps_gold(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(stage.base)
    tokenizer.chat_template = (
        "{% if 'forbidden' in messages[-1]['content'] %}{{ raise_exception('no') }}{% endif %}"
        + tokenizer.chat_template
    )
    monkeypatch.setattr(stage_module, "load_tokenizer", lambda _: tokenizer)
    stage(
        [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y"}],
        lambda prompt, _: "forbidden" if request(prompt) == "a" else "allowed",
    )
    rows = stage.rows()
    assert (rows["a"].origin, rows["a"].why) == ("gold", "template") and rows["b"].origin == "rewritten"
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        stage([{"prompt": "a", "response": "x"}] * 2, lambda *_: "")


def test_of_several_turns_the_last_answer_is_rewritten(stage: Stage) -> None:
    turns = [("user", "first"), ("assistant", "old answer"), ("user", "second"), ("assistant", "gold answer")]
    tool = [("user", "ask"), ("assistant", "call"), ("tool", "42"), ("assistant", "it is 42")]
    records = [{"m": [{"role": r, "content": c} for r, c in talk]} for talk in (turns, tool)]
    stage(records, lambda *_: "mine", messages="m")
    talk, called = read_rows(stage.out)
    assert talk.messages and [m["content"] for m in talk.messages] == ["first", "old answer", "second", "mine"]
    assert (called.origin, called.why) == ("gold", "not_asked")
    (text,) = stage.fake.calls[0]
    assert text.index("first") < text.index("old answer") < text.index("second") < text.index("gold answer")


def test_own_answers_come_first_and_only_the_others_see_gold(stage: Stage) -> None:
    def reply(prompt: str, how: Sampling) -> str:
        if "#### 7" in prompt:
            return "with help 7" if "hard" in prompt else "never right 8"
        return "alone 7" if "easy" in prompt else "alone 9"

    records = [{"prompt": name, "response": "#### 7"} for name in ("easy", "hard", "lost")]
    metrics = stage(records, reply, {"kind": "maths", "own_answer_first": True})
    found = {
        name: (row.origin, row.why, row.messages and row.messages[-1]["content"]) for name, row in stage.rows().items()
    }
    assert found == {
        "easy": ("own", "number agrees", "alone 7"),
        "hard": ("rewritten", "number agrees", "with help 7"),
        "lost": ("gold", "differs", "#### 7"),
    }
    alone, helped = stage.fake.calls
    assert len(alone) == 3 and len(helped) == 2 and not any("#### 7" in text for text in alone)
    assert all(text.rstrip().endswith("step by step.") for text in [*alone, *helped])
    assert metrics["rewritten"]["taken_share"] == round(2 / 3, 4)


def test_python_tests_and_answer_columns(stage: Stage) -> None:
    code = "```python\ndef f(x):\n    return x + {}\n```"
    records = [
        {"prompt": "right", "response": "f", "t": "assert f(1) == 2"},
        {"prompt": "wrong", "response": "f", "t": "assert f(1) == 2"},
        {"prompt": "listed", "response": "f", "t": None},
    ]
    stage(
        records,
        lambda prompt, _: code.format(1 if request(prompt) == "right" else 5),
        {"kind": "general", "check": "python"},
        tests="t",
    )
    assert {n: r.why for n, r in stage.rows().items()} == {
        "right": "python agrees",
        "wrong": "differs",
        "listed": "uncheckable",
    }
    records = [{"prompt": name, "response": "no number", "final": "5"} for name in ("five", "six")]
    stage(
        records,
        lambda prompt, _: "5" if request(prompt) == "five" else "6",
        {"kind": "general", "check": "number"},
        answer="final",
    )
    assert {n: r.origin for n, r in stage.rows().items()} == {"five": "rewritten", "six": "gold"}


def test_leaks_are_phrases_that_neither_request_nor_gold_has() -> None:
    asked = last_answer([{"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "Yes."}])
    for text in (
        "The reference answer is yes.",
        "Yes, as in the provided response.",
        "Here's a rewritten version: yes",
        "My response: yes",
        "In my own words: yes.",
        "### Now answer the request\nyes",
        "The answer you gave is yes",
        "Based on the reference, yes.",
        "The answer to the request is: yes",
        "yes\n\n### Question\nWhat else?",
    ):
        assert leaks(text, asked), text
    for text in (
        "Yes.",
        "The correct answer is yes.",
        "The expression can be rewritten as 2x.",
        "The solution is given by x = 2.",
        "With reference to the map, yes.",
        "Check your answer.",
    ):
        assert not leaks(text, asked), text
    about = last_answer(
        [{"role": "user", "content": "What is a REFERENCE  answer?"}, {"role": "assistant", "content": "x"}]
    )
    assert not leaks("A reference answer is one to compare with.", about)


def test_prompts_begin_alike(base: Path) -> None:
    """What is the same for all rows stands first, where it is computed once."""
    tokenizer = load_tokenizer(base)
    for how in (General(), Maths()):
        texts = [
            rewrite_prompt(
                tokenizer, last_answer([{"role": "user", "content": q}, {"role": "assistant", "content": a}]), how
            )
            for q, a in (("1?", "x"), ("2?", "y"))
        ]
        common = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
        assert common > 300 and texts[0][common:].startswith("1?")
    asked = last_answer([{"role": "user", "content": "1?"}, {"role": "assistant", "content": "gold"}])
    assert "gold" not in own_prompt(tokenizer, asked, Maths())


def test_batches_are_sorted_by_length_within_a_window(stage: Stage) -> None:
    count, batch = 2 * WINDOW * 2 + 3, 2
    records = [{"prompt": f"p{i} " + "a " * (i * 7 % 13), "response": "x"} for i in range(count)]
    stage(records, lambda *_: "mine", batch=batch)
    sizes = [[len(stage.tokenizer(t)["input_ids"]) for t in call] for call in stage.fake.calls]
    assert [len(call) for call in sizes] == [2] * 17 + [1]
    for start in range(0, len(sizes), WINDOW):
        window = [size for call in sizes[start : start + WINDOW] for size in call]
        assert window == sorted(window) and (len(window) < 4 or len(set(window)) > 3)
    assert [row.id for row in read_rows(stage.out)] == list(range(count))


def test_rows_too_long_for_the_model_keep_gold(stage: Stage) -> None:
    records = [{"prompt": "short", "response": "x"}, {"prompt": "long " * 900, "response": "y"}]
    stage(records, lambda *_: "mine", {"kind": "general", "max_tokens": 1000}, length=2048)
    assert [(row.origin, row.why) for row in read_rows(stage.out)] == [("rewritten", "unchecked"), ("gold", "too_long")]
    assert len(stage.fake.calls[0]) == 1 and stage.opened == [2048]


def test_sets_with_instructions_of_their_own_are_drawn_apart(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, gold in (("sums", "#### 4"), ("talk", "hello"), ("plain", "as it is")):
        lines = [json.dumps({"prompt": f"{name} {i}", "response": gold}) + "\n" for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = TypeAdapter(DataConfig).validate_python(
        {
            "source": "datasets",
            "rows": 12,
            "sets": [
                {"path": "sums.jsonl", "rewrite": {"kind": "maths", "max_tokens": 9}},
                {"path": "talk.jsonl", "rewrite": "general"},
                {"path": "plain.jsonl"},
            ],
        }
    )
    asked: list[tuple[int, int]] = []

    def reply(prompt: str, how: Sampling) -> str:
        asked.append((how.max_tokens, "expert in mathematics" in prompt))
        return "that is 4"

    fake = Fake(load_tokenizer(base), reply)
    monkeypatch.setattr("compress.data.writing.open_engine", lambda *_: fake)
    metrics = run(config, Inputs(base, base), tmp_path, Context(recipe_dir=tmp_path))
    assert sorted(asked) == [(9, True)] * 4 + [(256, False)] * 4 and len(fake.calls) == 2
    assert metrics["rewritten"]["asked"] == 8 and metrics["sets"] == {
        f"{n}.jsonl": 4 for n in ("sums", "talk", "plain")
    }
    whys = {(row.source, row.origin, row.why) for row in read_rows(tmp_path)}
    assert whys == {
        ("sums.jsonl", "rewritten", "number agrees"),
        ("talk.jsonl", "rewritten", "unchecked"),
        ("plain.jsonl", "gold", ""),
    }


def test_where_nothing_can_be_taken_no_engine_is_opened(stage: Stage) -> None:
    metrics = stage([{"prompt": f"q{i}", "response": "no number"} for i in range(3)], lambda *_: "", "maths")
    assert metrics["rewritten"]["gold_kept"] == {"uncheckable": 3} and stage.opened == []
    assert "tokens_per_second" not in metrics


class Interrupted(Exception):
    pass


class Stops(Progress):
    """Interrupts while the rewriting bar advances for the nth time."""

    def __init__(self, after: int):
        self.left = after

    @contextmanager
    def bar(self, label: str, total: int | None = None) -> Iterator[Advance]:
        def advance(n: int = 1, note: str = "") -> None:
            self.left -= label == "rewriting"
            if self.left < 0:
                raise Interrupted

        yield advance


def artifact(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_an_interrupted_run_ends_with_the_same_bytes(base: Path, tmp_path: Path) -> None:
    """With the real engine on a random model."""
    texts = (
        "the water",
        "a sound of it",
        "so many words in a row",
        "why",
        "that is",
        "no",
        "and then they",
        "yes or no",
    )
    lines = [json.dumps({"prompt": t, "response": "it is so " * (1 + i % 3)}) + "\n" for i, t in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = TypeAdapter(DatasetConfig).validate_python(
        {
            "source": "dataset",
            "path": "a.jsonl",
            "batch": 3,
            "rewrite": {"kind": "general", "max_tokens": 24, "temperature": 1.0, "top_p": 1.0},
        }
    )
    outs = {}
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
        outs[name] = tmp_path / name
    inputs = Inputs(base, base)

    def go(name: str, progress: Progress | None = None) -> dict[str, Any]:
        return run(config, inputs, outs[name], Context(3, recipe_dir=tmp_path, progress=progress or Progress()))

    metrics = go("whole")
    assert metrics["tokens_per_second"] > 0 and metrics["rewritten"]["origins"].get("rewritten", 0) >= 2
    for attempt in range(2):
        with pytest.raises(Interrupted):
            go("resumed", Stops(attempt))
        assert not (outs["resumed"] / "rows.parquet").exists()
    (outs["resumed"] / ".work/rewrites/00002.tmp").write_text("half a batch")
    go("resumed")
    assert artifact(outs["resumed"]) == artifact(outs["whole"])
    assert set(artifact(outs["whole"])) == {"rows.parquet", "stats.json", "examples.json"}


def test_finished_batches_open_no_engine(stage: Stage) -> None:
    records = [{"prompt": f"q{i}", "response": "a"} for i in range(5)]
    stage(records, lambda *_: "mine", batch=2)
    before = artifact(stage.out)
    stage(records, lambda *_: "other", batch=2, out=stage.out)
    assert stage.fake.calls == [] and stage.fake.closed == 0 and artifact(stage.out) == before


def test_rows_of_another_version_are_refused(stage: Stage) -> None:
    import pyarrow.parquet as pq

    stage([{"prompt": f"q{i}", "response": "a"} for i in range(3)], lambda *_: "mine")
    table = pq.read_table(stage.out / "rows.parquet")
    pq.write_table(table.drop_columns(["origin", "why"]), stage.out / "rows.parquet")
    with pytest.raises(UserError, match="another version of compress; run its data stage again"):
        read_rows(stage.out)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"text": "t", "rewrite": "general"}, "plain text has no answer"),
        ({"rewrite": {"kind": "general", "check": "python"}}, "needs tests: name the column"),
        ({"rewrite": {"kind": "general", "own_answer_first": True}}, "own_answer_first needs a check"),
        ({"rewrite": "generel"}, "general"),
        ({"rewrite": True}, "rewrite"),
        ({"rewrite": "maths", "engine": "llama.cpp"}, "gguf"),
        ({"rewrite": {"kind": "maths", "check": "letter"}}, "check"),
        ({"prompt": "p", "context": "c", "messages": "m"}, "give only one of"),
    ],
)
def test_wrong_sections(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(DataConfig).validate_python({"source": "dataset", "path": "a.jsonl", **section})


def test_context_follows_the_prompt(stage: Stage) -> None:
    records = [
        {"i": "Sum up.", "c": "A long text.", "o": "x"},
        {"i": "Say hello.", "c": "", "o": "y"},
        {"i": "Wave.", "c": None, "o": "z"},
    ]
    stage(records, lambda *_: "mine", prompt="i", context="c", response="o")
    assert list(stage.rows()) == ["Sum up.\n\nA long text.", "Say hello.", "Wave."]


def test_answers_with_calls_keep_gold_and_tools_are_shown(stage: Stage) -> None:
    template = (
        "{% if tools %}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif %}"
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    stage.tokenizer.chat_template = template
    stage.monkeypatch.setattr(stage_module, "load_tokenizer", lambda _: stage.tokenizer)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    tools = [{"type": "function", "function": {"name": "look"}}]
    asked = {"role": "user", "content": "ask"}
    said = {"role": "assistant", "content": "gold"}
    result = {"role": "tool", "content": "found"}
    records = [
        {"messages": [asked, call], "tools": tools},
        {"messages": [asked, call, result, said], "tools": tools},
        {"messages": [asked, call, result, said, {**asked, "content": "more"}, said], "tools": tools},
        {"messages": [asked, {**said, "weight": 0}, asked, said]},
    ]
    records.append({"messages": [asked, said, {**asked, "content": "other"}, {**said, "weight": 0}]})
    stage(records, lambda prompt, how: "mine", messages="messages")
    assert [(row.origin, row.why) for row in read_rows(stage.out)] == [
        ("gold", "calls_tools"),
        ("gold", "not_asked"),
        ("rewritten", "unchecked"),
        ("rewritten", "unchecked"),
        ("gold", "not_learned"),
    ]
    shown = [text for texts in stage.fake.calls for text in texts if "### Request\nmore" in text]
    assert len(shown) == 1 and shown[0].startswith("<|im_start|>tools") and "look{}" in shown[0]

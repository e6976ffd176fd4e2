"""Conversations in the shapes people have them, what is dropped and how it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.core.stage import Context, Inputs
from compress.data.config import DatasetConfig
from compress.data.readers import advise
from compress.data.rows import Messages, Row, read_rows, write_rows
from compress.data.stage import check, run
from compress.data.turns import Unusable, conversation, tool_definitions
from compress.modeling.random import CHAT_TEMPLATE, build_tokenizer

PLAIN = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "say"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "n": 3}}}
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for c in "
    "m.tool_calls or [] %}{{ '[call ' + c.function.name + ' ' + c.function.arguments | tojson + ']' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def text(words: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": words}


@pytest.mark.parametrize(
    "value",
    [
        PLAIN,
        json.dumps(PLAIN),
        [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "say"}],
        [{"from": "human", "value": "ask", "extra": 3}, {"from": "model", "value": "say"}],
        [turn("User", "ask"), turn("bot", "say")],
        [turn("user", [text("ask")]), turn("assistant", [text("s"), "ay"])],
        [turn("user", text("ask", "input_text")), turn("assistant", [text("say", "output_text")])],
        {"role": ["user", "assistant"], "content": ["ask", "say"]},
    ],
)
def test_the_same_conversation_in_many_shapes(value: Any) -> None:
    assert conversation(value) == PLAIN


def test_roles_and_what_goes_with_messages() -> None:
    found = conversation(
        [
            turn("developer", "be so"),
            turn("human", "ask"),
            turn("assistant", None, tool_calls=[{**CALL, "function": {"name": "look", "arguments": '{"x": 1}'}}]),
            turn("tool", [text("found")], tool_call_id="c1", name="look"),
            turn("assistant", "say", reasoning_content="muse"),
        ]
    )
    assert found == [
        turn("system", "be so"),
        turn("user", "ask"),
        turn("assistant", None, tool_calls=[CALL]),
        turn("tool", "found", tool_call_id="c1", name="look"),
        turn("assistant", "say", reasoning_content="muse"),
    ]
    bare = {"role": "assistant", "tool_calls": json.dumps([{"name": "look", "arguments": {"x": 1}}])}
    former = turn("assistant", None, function_call={"name": "look", "arguments": '{"x": 1}'})
    sharegpt = {"from": "function_call", "value": '{"name": "look", "arguments": {"x": 1}}'}
    call = {key: CALL[key] for key in ("type", "function")}
    for message in (bare, former, sharegpt):
        assert conversation([message]) == [turn("assistant", None, tool_calls=[call])]
    assert conversation([{"from": "observation", "value": "found"}]) == [turn("tool", "found")]
    assert conversation([turn("tool", {"t": 2})]) == [turn("tool", '{"t": 2}')]
    thought = [{"type": "thinking", "thinking": "muse"}, text("say")]
    assert conversation([turn("assistant", thought)]) == [turn("assistant", "say", reasoning_content="muse")]
    assert conversation([turn("assistant", "say", weight=0)]) == [turn("assistant", "say", weight=0)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([turn("narrator", "x")], "role 'narrator'"),
        ([turn("user", [text("x"), {"type": "image_url", "image_url": {}}])], "image_url part"),
        ([turn("user", [3])], "part"),
        ([{"role": "user"}], "messages"),
        ([{"who": "user", "said": "x"}], "messages"),
        (["ask", "say"], "messages"),
        ("hello", "messages"),
        (3, "messages"),
        ([turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": "{x"}}])], "tool_call"),
        ([turn("assistant", None, tool_calls=[{"function": {"arguments": "{}"}}])], "tool_call"),
        ([turn("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}])], "tool_call"),
    ],
)
def test_what_is_no_conversation_says_why(value: Any, reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        conversation(value)
    assert caught.value.reason == reason and caught.value.detail


def test_tool_definitions() -> None:
    for value in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL):
        assert tool_definitions(value) == [TOOL]
    assert tool_definitions(None) is None and tool_definitions("") is None and tool_definitions([]) is None
    for wrong in ("hammer", ["hammer"], [3], "3"):
        with pytest.raises(Unusable):
            tool_definitions(wrong)


class Stage:
    """Runs the stage on rows."""

    def __init__(self, noted: Callable[[], Any], base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.noted, self.base, self.folder, self.runs = noted, base, folder, 0
        self.tokenizer = build_tokenizer()
        monkeypatch.setattr("compress.data.stage.load_tokenizer", lambda _: self.tokenizer)

    def __call__(self, rows: list[Any], template: str = TOOLS_TEMPLATE, **options: Any) -> dict[str, Any]:
        self.tokenizer.chat_template = template
        self.runs += 1
        self.out = self.folder / f"out{self.runs}"
        self.out.mkdir()
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        (self.folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
        config = DatasetConfig(source="dataset", path="a.jsonl", **options)
        self.progress = self.noted()
        context = Context(seed=7, recipe_dir=self.folder, progress=self.progress)
        check(config, self.base, context)
        return run(config, Inputs(self.base, self.base), self.out, context)

    def learned(self) -> list[str]:
        from compress.data.chat import encode_row

        found = []
        for row in read_rows(self.out):
            encoded = encode_row(self.tokenizer, row)
            tokens = [i for i, m in zip(encoded.input_ids, encoded.loss_mask, strict=True) if m]
            found.append(self.tokenizer.decode(tokens))
        return found


@pytest.fixture
def stage(
    noted: Callable[[], Any], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Stage:
    return Stage(noted, tiny(), tmp_path, monkeypatch)


def called(number: int) -> Messages:
    return [
        turn("user", f"ask {number}"),
        turn("assistant", None, tool_calls=[CALL]),
        turn("tool", "found", tool_call_id="c1"),
        turn("assistant", f"say {number}"),
    ]


def test_calls_and_tools_reach_the_rows_and_the_template(stage: Stage) -> None:
    rows = [{"messages": called(i), "tools": json.dumps([TOOL]) if i else [TOOL]} for i in range(3)]
    assert stage(rows, messages="messages")["dropped"] == {}
    assert [row.messages for row in read_rows(stage.out)] == [called(i) for i in range(3)]
    assert [row.tools for row in read_rows(stage.out)] == [[TOOL]] * 3
    assert stage.learned()[0] == '[call look {"x": 1}]<|im_end|>say 0<|im_end|>'
    without = stage([{"messages": called(i)} for i in range(3)], messages="messages")
    assert without["tokens"] < stage(rows, messages="messages")["tokens"]
    named = [{"messages": called(i), "functions": [TOOL]} for i in range(3)]
    assert stage(named, messages="messages", tools="functions")["dropped"] == {}
    assert [row.tools for row in read_rows(stage.out)] == [[TOOL]] * 3
    with pytest.raises(UserError, match=r"data\.tools: nothing: a\.jsonl has no such column"):
        stage(named, messages="messages", tools="nothing")


def test_a_template_without_calls_loses_the_rows_and_says_so(stage: Stage) -> None:
    for template, reason in ((CHAT_TEMPLATE, "tool_call"), (TOOLS_TEMPLATE.replace("tojson + ']'", "tojson"), "")):
        rows = [{"messages": called(i)} for i in range(2)] + [
            {"messages": called(9)[:1] + called(i)[-1:]} for i in range(8)
        ]
        dropped = stage(rows, template, messages="messages")["dropped"]
        assert dropped == ({reason: 2} if reason else {})
    with pytest.raises(UserError, match=r"omits tool calls \(look\)"):
        stage(rows[:2], CHAT_TEMPLATE, messages="messages")


def test_a_turn_that_the_template_leaves_out_is_no_silence(stage: Stage) -> None:
    template = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    rows = [{"messages": [turn("system", "be so"), *PLAIN[:1], turn("assistant", f"{i}")]} for i in range(3)]
    with pytest.raises(
        UserError, match=r"3 left_out\), more than .*; the first: left_out: line 1 of .* \(role system\): 'be so'"
    ):
        stage(rows, template, messages="messages")


def test_prompts_and_responses_may_be_messages(stage: Stage) -> None:
    rows = [
        {"prompt": PLAIN[:1], "completion": PLAIN[1:]},
        {"prompt": "ask more", "completion": PLAIN[1:]},
        {"prompt": [turn("system", "be so"), turn("user", "ask")], "completion": "say"},
    ]
    stage(rows, response="completion")
    assert [row.messages for row in read_rows(stage.out)] == [
        PLAIN,
        [turn("user", "ask more"), PLAIN[1]],
        [turn("system", "be so"), *PLAIN],
    ]
    with pytest.raises(UserError, match=r"no such column.*set `prompt: prompt, response: completion`"):
        stage(rows)


@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (["id", "conversations"], "`messages: conversations`"),
        (["instruction", "input", "output"], "`prompt: instruction, response: output` and `context: input`"),
        (["question", "answer"], "`prompt: question, response: answer`"),
        (["text"], "`text: text`"),
        (["a", "b"], ""),
    ],
)
def test_the_key_that_would_read_the_columns_is_named(stage: Stage, names: list[str], advice: str) -> None:
    assert advise(names) == advice
    with pytest.raises(UserError) as caught:
        stage([dict.fromkeys(names, "x")] * 3)
    assert advice in str(caught.value) and ("To read it" in str(caught.value)) == bool(advice)


def test_dropped_rows_are_told_and_too_many_stop_the_stage(stage: Stage) -> None:
    def row(number: int) -> dict[str, Any]:
        return {"prompt": f"ask {number}", "response": f"say {number}"}

    good = [row(i) for i in range(8)]
    surrogate = r'{"prompt": "bad \ud83d", "response": "x"}'
    assert stage([*good, surrogate, row(0)])["dropped"] == {"duplicate": 1, "not_unicode": 1}
    assert "a.jsonl: 2 of 10 rows dropped (1 duplicate, 1 not_unicode)" in stage.progress.texts
    many = [*good, surrogate, surrogate, {"prompt": "x", "response": ""}, *good]
    with pytest.raises(UserError) as caught:
        stage(many)
    message = str(caught.value)
    assert "3 of 11 rows of a.jsonl cannot be used (2 not_unicode, 1 empty)" in message
    assert (
        "line 9 of a.jsonl has half of a surrogate pair" in message
        and "correct the rows; or set data.max_dropped to 0.28 to drop them" in message
    )
    assert "a.jsonl: 11 of 19 rows dropped (8 duplicate, 2 not_unicode, 1 empty)" in stage.progress.texts
    assert stage(many, max_dropped=0.28)["rows"] == 8
    assert stage(good)["dropped"] == {} and not any("dropped" in note for note in stage.progress.texts)


def test_unknown_roles_are_counted_by_name(stage: Stage) -> None:
    rows = [{"c": [turn("user", f"ask {i}"), turn("assistant", "x")]} for i in range(9)]
    assert stage([*rows, {"c": [turn("narrator", "x")]}], messages="c")["dropped"] == {"role 'narrator'": 1}


def test_rows_keep_what_messages_have(tmp_path: Path) -> None:
    rows = [Row(0, "train", called(0), tools=[TOOL]), Row(1, "heldout", PLAIN), Row(2, "train", text="x")]
    write_rows(tmp_path, rows)
    assert read_rows(tmp_path) == rows

"""What clients send to compress serve: taken where it asks for nothing that is not served, else refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.runtime.chat import ChatTemplate
from compress.runtime.serve.protocol import ChatRequest, CompletionRequest, read_request
from compress.runtime.serve.refusal import Refused

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"city": "Ulm", "days": 2}'}}


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, json.dumps(ASK | fields).encode())


def refused(body: bytes | None = None, kind: type[Any] = ChatRequest, **fields: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        read_request(kind, json.dumps(ASK | fields).encode() if body is None else body)
    assert caught.value.status == 400
    return caught.value


def said(*messages: Any) -> list[dict[str, Any]]:
    return chat(messages=list(messages)).messages


NOTHING: list[dict[str, Any]] = [
    {"n": 1},
    {"n": 1.0},
    {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
    {"logit_bias": {"50": 0}},
    {"tools": [], "tool_choice": "none", "parallel_tool_calls": False},
    {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True, "functions": [], "function_call": "none"},
    {"tools": [TOOL], "tool_choice": "none"},
    {"logprobs": False, "top_logprobs": 0},
    {"logprobs": None, "top_logprobs": None},
    {"response_format": {"type": "text"}},
    {"reasoning_effort": "none"},
    {"stream": None, "stream_options": None, "stop": None, "seed": None, "temperature": None, "max_tokens": None},
    {"stream_options": {"include_usage": True, "include_obfuscation": False, "continuous_usage_stats": False}},
    {"stop": []},
    {"stop": ""},
    {"user": "u", "metadata": {"a": "b"}, "store": False, "safety_identifier": "s", "service_tier": "auto"},
    {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "service_tier": "default"},
    {"verbosity": "medium", "modalities": ["text"], "audio": None, "prediction": None, "web_search_options": None},
    {"prediction": {"type": "content", "content": "a guess"}},
    {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1, "typical_p": 1, "mirostat": 0},
    {"top_k": -1, "repeat_last_n": 64, "dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0},
    {"ignore_eos": False, "skip_special_tokens": True, "stop_token_ids": [], "guided_json": None, "grammar": ""},
    {"cache_prompt": True, "keep_alive": "5m", "some_future_option": None, "another": {}},
    {"enable_thinking": False, "chat_template_kwargs": {}},
]


@pytest.mark.parametrize("fields", NOTHING, ids=str)
def test_options_that_ask_for_nothing_change_nothing(fields):
    plain, asked = chat(seed=1), chat(**({"seed": 1} | fields))
    if "seed" in fields:
        asked = asked.model_copy(update={"seed": 1})
    assert asked.settings(4, 300) == plain.settings(4, 300)
    assert asked.messages == plain.messages and asked.stream is False
    assert {name: value for name, (value, _) in asked.variables().items()} in ({}, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"n": 2}, "n", "only one answer per request"),
        ({"n": True}, "n", "one answer"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "penalties are not supported"),
        ({"presence_penalty": -0.1}, "presence_penalty", "penalties are not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "biases are not supported"),
        ({"tools": [TOOL]}, "tools", "tool calls are not supported"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools", "tool_choice: none"),
        ({"tool_choice": "required"}, "tool_choice", "tool calls are not supported"),
        ({"logprobs": True, "top_logprobs": 2}, "logprobs", "token log-probabilities are not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "probabilities"),
        ({"response_format": {"type": "json_object"}}, "response_format", "structured output is not supported"),
        ({"verbosity": "low"}, "verbosity", "only medium"),
        ({"modalities": ["text", "audio"]}, "modalities", "only text"),
        ({"store": True}, "store", "storing answers is not supported"),
        ({"top_k": 40}, "top_k", "temperature and top_p are"),
        ({"min_p": 0.05}, "min_p", "this sampling option is not supported"),
        ({"repeat_penalty": 1.1}, "repeat_penalty", "only 1 is"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats", "at the end"),
        ({"stream_options": {"include_usages": 1}}, "stream_options.include_usages", "did you mean include_usage"),
        ({"stream_options": True}, "stream_options", ""),
        ({"max_token": 5}, "max_token", "unknown parameter; did you mean max_tokens?"),
        ({"horoscope": 5}, "horoscope", "unknown parameter; leave it out"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": -1}, "max_tokens", "leave it out to use all the room in the context"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens", "valid integer"),
        ({"temperature": "0.5"}, "temperature", "valid number"),
        ({"temperature": 2.1}, "temperature", "must be less than or equal to 2"),
        ({"top_p": -1}, "top_p", "greater than or equal to 0"),
        ({"seed": "x"}, "seed", "integer"),
        ({"stop": 5}, "stop", "a string or a list of strings"),
        ({"stop": ["a", 5]}, "stop", "a string or a list of strings"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"model": None}, "model", "this field is required"),
        ({"messages": None}, "messages", "this field is required"),
    ],
    ids=str,
)
def test_what_would_change_the_answer_is_refused_by_its_name_and_reason(fields, param, reason):
    error = refused(**fields)
    assert error.param == param and str(error).startswith(f"{param}: ") and reason in str(error), str(error)


def test_values_are_served_as_they_are_meant():
    settings = chat(max_tokens=4.0, seed=-1, temperature=1, stop=["a", ""]).settings(3, 300)
    assert (settings.max_tokens, settings.seed, settings.stop, settings.depth) == (4, 2**32 - 1, ("a",), 3)
    assert chat(seed=2**63 + 5).settings(3, 300).seed == 5
    assert chat(top_p=0, temperature=1.5).settings(3, 300).temperature == 0  # nothing but the likeliest token
    assert chat(max_tokens=9, max_completion_tokens=2).settings(3, 300).max_tokens == 2
    assert chat().settings(3, 300).max_tokens == 300 and chat().settings(3, 300).temperature == 1
    assert chat(reasoning_effort="high").variables() == {"reasoning_effort": ("high", "reasoning_effort")}
    told = chat(chat_template_kwargs={"enable_thinking": True}, reasoning_effort="none").variables()
    assert told == {"enable_thinking": (True, "chat_template_kwargs.enable_thinking")}


def test_messages_in_every_form_that_clients_send():
    user = {"role": "user", "content": "a"}
    assert said({"role": "developer", "content": "s"}, user) == [{"role": "system", "content": "s"}, user]
    parts = [{"type": "text", "text": "hi ", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "you"}]
    assert said({"role": "user", "content": parts}) == [{"role": "user", "content": "hi you"}]
    for empty in ({"role": "assistant"}, {"role": "assistant", "content": None}, {"role": "assistant", "content": []}):
        assert said(user, empty, user)[1] == {"role": "assistant", "content": ""}
    own = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "function_call": None}
    assert said(user, own | {"annotations": [], "audio": None, "id": "x"}, user)[1] == {
        "role": "assistant",
        "content": "b",
    }
    assert said(user | {"name": "bob"}) == [user | {"name": "bob"}]
    assert said(user, {"role": "assistant", "content": None, "refusal": "No."})[1]["content"] == "No."


def test_tool_calls_come_as_templates_read_them():
    user = {"role": "user", "content": "a"}
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {"city": "Ulm", "days": 2}}}
    found = said(
        user,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    )
    assert found[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "rain", "tool_call_id": "call_1"},
    ]
    older = said(
        user,
        {"role": "assistant", "content": None, "function_call": {"name": "look", "arguments": ""}},
        {"role": "function", "name": "look", "content": "x"},
    )
    assert older[1]["tool_calls"] == [{"type": "function", "function": {"name": "look", "arguments": {}}}]
    assert older[2] == {"role": "tool", "content": "x", "name": "look"}


@pytest.mark.parametrize(
    ("message", "param", "reason"),
    [
        ({"role": "user"}, "messages.0.content", "with role user needs content"),
        ({"role": "user", "content": None}, "messages.0.content", "a message with role user needs content"),
        ({"role": "tool", "content": None}, "messages.0.content", "a message with role tool needs content"),
        ({"role": "user", "content": 5}, "messages.0.content", "a string or a list of text parts"),
        ({"role": "user", "content": ["hi"]}, "messages.0.content.0", "must be a part"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
            "messages.0.content.0.type",
            "only parts of type text are supported, not 'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text", "must be a string"),
        ({"role": "robot", "content": "x"}, "messages.0.role", "must be one of system, developer, user"),
        ({"content": "x"}, "messages.0.role", "must be one of"),
        ("hi", "messages.0", "must be an object"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages.0.audio", "only text"),
        ({"role": "assistant", "tool_calls": 5}, "messages.0.tool_calls", "must be a list"),
        ({"role": "assistant", "tool_calls": [{"type": "custom"}]}, "messages.0.tool_calls.0.type", "not 'custom'"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages.0.tool_calls.0.function", "must be an object"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{no"}}]},
            "messages.0.tool_calls.0.function.arguments",
            "must be JSON",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "messages.0.tool_calls.0.function.arguments",
            "must be a JSON object",
        ),
        ({"role": "assistant", "function_call": {"name": ""}}, "messages.0.function_call.name", "the function's name"),
    ],
    ids=str,
)
def test_a_wrong_message_is_named_to_the_field(message, param, reason):
    error = refused(messages=[message])
    assert error.param == param and reason in str(error)


@pytest.mark.parametrize(
    ("body", "param", "reason"),
    [
        (b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', None, "not UTF-8: byte 51 is 0xff"),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud83d"}]}', "messages.0.content", "surrogate"),
        (b'{"model":"m","messages":[],"\\udc00":1}', "the body", "surrogate"),
        (json.dumps(ASK).encode("utf-16"), None, "not UTF-8"),
        (b'{"temperature": NaN}', None, "NaN is not a JSON number"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"", None, "not valid JSON"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_bodies_that_are_no_text_or_no_json_say_why(body, param, reason):
    error = refused(body)
    assert error.param == param and reason in str(error)


def test_a_byte_order_mark_and_escaped_pairs_are_read():
    body = b'\xef\xbb\xbf{"model":"m","messages":[{"role":"user","content":"\\ud83d\\ude00"}]}'
    assert read_request(ChatRequest, body).messages[0]["content"] == "\U0001f600"


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([1.0, 2], [1, 2]), ("", "")],
)
def test_prompts_of_completions(prompt, found):
    body = json.dumps({"model": "m", "prompt": prompt, "echo": False, "logprobs": None, "suffix": "", "best_of": 1})
    assert read_request(CompletionRequest, body.encode()).prompt == found


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"prompt": ["a", "b"]}, "prompt", "only one prompt per request is supported, not 2"),
        ({"prompt": [[1], [2]]}, "prompt", "one prompt"),
        ({"prompt": [1, "a"]}, "prompt", "must be a string, a list of token ids"),
        ({"prompt": [True]}, "prompt", "must be a string, a list of token ids"),
        ({"prompt": None}, "prompt", "this field is required"),
        ({"echo": True, "max_tokens": 0}, "echo", "repeating the prompt in the answer is not supported"),
        ({"logprobs": 1}, "logprobs", "probabilities"),
        ({"suffix": "x"}, "suffix", "before a suffix is not supported"),
        ({"best_of": 2}, "best_of", "only one answer per request"),
    ],
    ids=str,
)
def test_completions_that_are_not_served(fields, param, reason):
    error = refused(json.dumps({"model": "m", "prompt": "a"} | fields).encode(), CompletionRequest)
    assert error.param is not None and error.param.split(".")[0] == param and reason in str(error)


CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
WITH_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}</>{% endfor %}"
)
TALK = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Ulm"}}}],
    },
    {"role": "tool", "content": "rain"},
]


def template(folder: Path, text: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(text)
    return ChatTemplate(folder)


def test_a_template_that_leaves_tools_out_refuses_them(tmp_path):
    written = template(tmp_path, WITH_TOOLS).render(TALK)
    assert written == '<user>a</><assistant>look({"city": "Ulm"})</><tool>rain</>'
    with pytest.raises(UserError, match="ignores the tool calls of message 1"):
        template(tmp_path, CHATML).render(TALK)
    deaf = "{% for m in messages if m.role != 'tool' %}" + WITH_TOOLS.partition("%}")[2]
    with pytest.raises(UserError, match="ignores the tool's result in message 2"):
        template(tmp_path, deaf).render(TALK)


def test_a_templates_variables_are_known_and_told(tmp_path):
    thinking = template(tmp_path, "{{ bos_token }}{{ messages[0].content }}{% if enable_thinking %}!{% endif %}")
    assert thinking.variables == {"enable_thinking"}
    assert thinking.render(TALK[:1]) == "a"
    assert thinking.render(TALK[:1], variables={"enable_thinking": True, "messages": []}) == "a!"


@pytest.mark.parametrize("text", ["{{ messages[9].content.x }}", "{{ 1 // 0 }}", "{{ [].append.__globals__ }}"])
def test_whatever_a_broken_template_raises_is_one_error(tmp_path, text):
    with pytest.raises(UserError, match="refuses a conversation with the turns user"):
        template(tmp_path, text).render(TALK[:1])

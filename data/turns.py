"""Converts conversations from the formats people use into one.

A message is {role, content}, optionally with tool_calls, tool_call_id, name, reasoning_content. Roles are system, user,
assistant and tool; content is text, or None beside tool calls. The `arguments` of a call are an object, as the chat
templates of Hugging Face models expect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date, time
from decimal import Decimal
from typing import Any

from ..core.files import parse, plain
from .rows import Message, Messages

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython"), "tool"),
}
TEXTS = ("text", "input_text", "output_text")  # types of content parts that are text
UNICODE = "not_unicode"


class Unusable(Exception):
    """Why a row cannot be used: a short reason to count, and a detail that says what is wrong where."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(detail or reason)
        self.reason, self.detail = reason, detail


def literal(value: object) -> str | None:
    """The exact text form of a single value; None for lists, objects and other values without one."""
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return None


def conversation(value: object, *, pads: bool = False) -> Messages:
    """The messages of a conversation: a list of {role, content} or {from, value}, or that list as JSON.

    With `pads`, None in a nested object marks a key that was missing before Arrow, and is removed. Empty values give an
    empty list. Raises `Unusable`.
    """
    if isinstance(value, str) and value.strip():
        value = _json(value, "messages", "holds text, not a list of messages; read it with `text: COLUMN`")
    if value is None or value in ("", [], {}) or isinstance(value, str):
        return []
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = _transposed(value)  # `datasets` stores a sequence of objects as an object of lists
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Unusable("messages", "must hold a list of {role, content}")
    if pads:
        value = [without_none(message) for message in value]
    return [_message(message) for message in value]


def tool_definitions(value: object, *, pads: bool = False) -> list[Any] | None:
    """The tools of a row, from a list of objects or that list as JSON; None if there are none. Raises `Unusable`."""
    if isinstance(value, str):
        value = _json(value, "tools", "is not valid JSON") if value.strip() else None
    if not value:
        return None
    listed: Any = [value] if isinstance(value, dict) else value
    tools = [_json(tool, "tools", "is not valid JSON") if isinstance(tool, str) else tool for tool in listed]
    if not all(isinstance(tool, dict) for tool in tools):
        raise Unusable("tools", "must hold tool definitions: a list of objects")
    return [plain(without_none(tool) if pads else tool) for tool in tools]


def words(message: Message) -> Iterator[str]:
    """All texts of a message: content, reasoning, and strings in tool calls."""
    for key in ("content", "reasoning_content"):
        if message.get(key):
            yield message[key]
    yield from strings(message.get("tool_calls") or [])


def strings(value: object) -> Iterator[str]:
    """All strings in a JSON value, without keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def is_unicode(value: object) -> bool:
    """Whether all strings of a JSON value, keys included, are valid Unicode (no unpaired surrogates)."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def without_none(value: object) -> Any:
    """A nested value without keys whose value is None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def _json(text: str, reason: str, wrong: str) -> Any:
    try:
        return parse(text, literal=True)
    except (ValueError, RecursionError) as error:
        raise Unusable(reason, f"{wrong} ({error})") from error


def _transposed(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    if len({len(column) for column in columns.values()}) > 1:
        raise Unusable("messages", "must hold a list of {role, content}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _message(given: dict[str, Any]) -> Message:
    role_key = next((key for key in ("role", "from") if key in given), None)
    content_key = next((key for key in ("content", "value") if key in given), None)
    calls = _calls(given)
    if role_key is None or (content_key is None and calls is None):
        raise Unusable(
            "messages", f"must hold a list of {{role, content}}, but a message has the keys {', '.join(given)}"
        )
    said = str(given[role_key])
    role = ROLES.get(said.strip().casefold())
    if role is None:
        raise Unusable(f"role {said[:40]!r}", f"has the unknown role {said[:40]!r}; known: {', '.join(sorted(ROLES))}")
    content, reasoning = _content(given.get(content_key or ""), role)
    if said.strip().casefold() == "function_call" and calls is None:  # ShareGPT: the content is the call itself
        calls, content = [_call(_json(content or "", "tool_call", "has a function call that is not JSON"))], None
    message: Message = {"role": role, "content": content}
    reasoning = reasoning or given.get("reasoning_content") or given.get("reasoning")
    if role == "assistant" and isinstance(reasoning, str) and reasoning.strip():
        message["reasoning_content"] = reasoning
    if calls is not None:
        message["tool_calls"] = calls
        message["content"] = content or None
    for key in ("tool_call_id", "name"):
        if isinstance(given.get(key), str) and given[key]:
            message[key] = given[key]
    if role == "assistant" and (str(given.get("weight")) in ("0", "0.0") or given.get("train") is False):
        message["weight"] = 0  # OpenAI's convention: not trained on, only context
    return message


def _content(value: object, role: str) -> tuple[str | None, str]:
    """A message's content and reasoning; raises `Unusable` for parts that are not text."""
    if value is None:
        return None, ""
    if isinstance(value, list):
        pieces = [_part(part) for part in value]
        return "".join(said for said, _ in pieces), "".join(thought for _, thought in pieces)
    text = literal(value)
    if text is None and role == "tool":  # a structured result
        return json.dumps(plain(value), ensure_ascii=False), ""
    if text is None:
        said, thought = _part(value)
        return said, thought
    return text, ""


def _part(part: object) -> tuple[str, str]:
    """The text and the reasoning of a content part; one of them is empty."""
    if isinstance(part, str):
        return part, ""
    if isinstance(part, dict):
        kind = part.get("type")
        if (kind is None or kind in TEXTS) and isinstance(part.get("text"), str):
            return part["text"], ""
        if kind == "thinking":
            thought = part.get("thinking")
            if isinstance(thought, list):
                thought = "".join(_part(each)[0] for each in thought)
            if isinstance(thought, str):
                return "", thought
        if isinstance(kind, str):
            raise Unusable(f"{kind[:40]} part", f"has a part of type {kind[:40]!r}; only text is supported")
    raise Unusable("part", "has a message part that is not text")


def _calls(given: dict[str, Any]) -> list[dict[str, Any]] | None:
    value = given.get("tool_calls")
    if value is None and given.get("function_call"):  # OpenAI's older format
        value = [given["function_call"]]
    if isinstance(value, str):
        value = _json(value, "tool_call", "has tool_calls that are not JSON") if value.strip() else None
    if not value:
        return None
    return [_call(call) for call in (value if isinstance(value, list) else [value])]


def _call(call: object) -> dict[str, Any]:
    """A call in OpenAI's format, its arguments as an object."""
    if isinstance(call, str):
        call = _json(call, "tool_call", "has a tool call that is not JSON")
    values: dict[str, Any] = call if isinstance(call, dict) else {}
    function = values.get("function", values)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise Unusable("tool_call", "has a tool call without a function name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = (
            _json(arguments, "tool_call", "has a tool call whose arguments are not JSON") if arguments.strip() else {}
        )
    if not isinstance(arguments, dict | None):
        raise Unusable("tool_call", "has a tool call whose arguments are not an object")
    identity: dict[str, Any] = {"id": values["id"]} if isinstance(values.get("id"), str) and values["id"] else {}
    return identity | {"type": "function", "function": {"name": function["name"], "arguments": plain(arguments or {})}}

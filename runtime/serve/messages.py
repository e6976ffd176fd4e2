"""Converts conversations from clients' JSON to the messages that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from .refusal import wrong

# OpenAI's role -> the template's
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # its older name
}
_OPTIONAL = ("assistant", "function")  # roles whose messages may have no content
_KEPT = ("name", "tool_call_id", "reasoning_content")  # texts that templates may read; other fields are dropped


def read_messages(values: Any) -> list[dict[str, Any]]:
    """Messages with `role`, `content` and optionally `tool_calls` with parsed arguments, as Hugging Face's templates
    expect. `Refused` names the wrong field."""
    if not isinstance(values, list) or not values:
        raise wrong("messages", "must be a list of at least one message")
    return [_message(value, f"messages.{number}") for number, value in enumerate(values)]


def _message(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(at, "must be an object with role and content")
    given = value.get("role")
    if not isinstance(given, str) or given not in ROLES:
        raise wrong(f"{at}.role", f"must be one of {', '.join(ROLES)}" + _not(given))
    role = ROLES[given]
    message: dict[str, Any] = {"role": role, "content": _content(value.get("content"), given, f"{at}.content")}
    if role == "assistant":
        if value.get("audio"):
            raise wrong(f"{at}.audio", "only text is supported")
        if isinstance(value.get("refusal"), str) and not message["content"]:
            message["content"] = value["refusal"]
        if calls := _tool_calls(value, at):
            message["tool_calls"] = calls
    return message | {key: value[key] for key in _KEPT if isinstance(value.get(key), str)}


def _content(value: object, role: str, at: str) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        if role in _OPTIONAL:
            return ""
        raise wrong(at, f"a message with role {role} needs content: a string or a list of text parts")
    if not isinstance(value, list):
        raise wrong(at, "must be a string or a list of text parts")
    return "".join(_part(part, f"{at}.{number}") for number, part in enumerate(value))


def _part(value: object, at: str) -> str:
    if not isinstance(value, dict):
        raise wrong(at, 'must be a part such as {"type": "text", "text": "…"}')
    part_type = value.get("type")
    if part_type not in ("text", "refusal"):
        raise wrong(f"{at}.type", "only parts of type text are supported" + _not(part_type))
    if not isinstance(value.get(part_type), str):
        raise wrong(f"{at}.{part_type}", "must be a string")
    return value[part_type]


def _tool_calls(value: dict[str, Any], at: str) -> list[dict[str, Any]]:
    calls = value.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise wrong(f"{at}.tool_calls", "must be a list")
    calls_out = [_tool_call(call, f"{at}.tool_calls.{number}") for number, call in enumerate(calls or [])]
    if value.get("function_call") is not None:  # OpenAI's older name for tool calls
        calls_out.append({"type": "function", "function": _function(value["function_call"], f"{at}.function_call")})
    return calls_out


def _tool_call(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(at, "must be an object with a function")
    if value.get("type", "function") != "function":
        raise wrong(f"{at}.type", "only calls of type function are supported" + _not(value["type"]))
    call: dict[str, Any] = {"type": "function", "function": _function(value.get("function"), f"{at}.function")}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def _function(value: object, at: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong(at, "must be an object with name and arguments")
    if not isinstance(value.get("name"), str) or not value["name"]:
        raise wrong(f"{at}.name", "must be the function's name")
    arguments = value.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise wrong(f"{at}.arguments", f"must be JSON: {error}") from error
    arguments = {} if arguments in (None, "") or isinstance(arguments, str) else arguments
    if not isinstance(arguments, dict):
        raise wrong(f"{at}.arguments", "must be a JSON object")
    return {"name": value["name"], "arguments": arguments}


def _not(value: object) -> str:
    return f", not {value!r}" if isinstance(value, (str, int, float)) else ""

"""Rendering a conversation with the model's chat template, as transformers' `apply_chat_template` does, without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..core.chat_templates import TOKENIZER_CONFIG, chat_templates
from ..core.errors import UserError
from ..core.files import read_json_if_there

# Each has role and content, optionally tool_calls: `{"type": "function", "function": {"name", "arguments"}}`.
Messages = Sequence[Mapping[str, Any]]
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # variables that every template gets
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat template of a bundle or checkpoint folder. `UserError` if it has none, or a broken one."""

    def __init__(self, folder: Path):
        config = read_json_if_there(folder / TOKENIZER_CONFIG)
        source = chat_templates(folder).get("default")
        if not source:
            raise UserError(f"{folder} has no chat template: give the model plain text (--raw)")
        self.special = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
            undeclared = meta.find_undeclared_variables(environment.parse(source))
        except Exception as error:  # a template is a program; a broken one can raise anything
            raise UserError(f"the chat template of {folder} is broken: {error}") from error
        # Variables that it reads besides the standard ones, such as enable_thinking.
        self.variables = frozenset(undeclared - set(environment.globals) - set(_SPECIAL) - set(_GIVEN))

    def render(self, messages: Messages, *, answer: bool = True, variables: Mapping[str, Any] | None = None) -> str:
        """The conversation as text; with `answer`, up to where the assistant's next turn begins.

        `variables` are the template's own, such as enable_thinking. Raises `UserError` if the template refuses the
        conversation, or would omit a tool call or its result.
        """
        if not messages:
            raise UserError("a conversation needs at least one message")
        text = self._render(messages, answer, variables)
        marked, marks = _marked(messages)
        if marks:
            seen = self._render(marked, answer, variables)
            missing = next((missing_part for mark, missing_part in marks if mark not in seen), None)
            if missing is not None:
                raise UserError(f"the model's chat template ignores {missing}: remove it from the conversation")
        return text

    def _render(self, messages: Messages, answer: bool, variables: Mapping[str, Any] | None) -> str:
        given = dict(zip(_GIVEN, ([dict(message) for message in messages], None, None, answer), strict=True))
        try:
            return self._template.render(**{**(variables or {}), **self.special, **given})
        except Exception as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise UserError(f"the chat template refuses a conversation with the turns {roles}: {error}") from error


def _marked(messages: Messages) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The conversation with marks in place of tool calls and results; (mark, what it stands for)."""
    marks: list[tuple[str, str]] = []

    def mark(what: str) -> str:
        marks.append((f"mark{len(marks)}x", what))
        return marks[-1][0]

    marked = []
    for number, message in enumerate(messages):
        message = dict(message)
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [_marked_call(call, mark(f"the tool calls of message {number}")) for call in calls]
        if message.get("role") == "tool" and message.get("content"):
            message["content"] = mark(f"the tool's result in message {number}")
        marked.append(message)
    return marked, marks


def _marked_call(call: Mapping[str, Any], mark: str) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": mark}}


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, which marks an assistant's words in templates; rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _content(token: object) -> str:
    return str(token.get("content", "") if isinstance(token, dict) else token)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which no chat template is trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)

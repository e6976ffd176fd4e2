"""A conversation as the model's chat template writes it: what transformers' `apply_chat_template` gives, without it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import UserError

Messages = Sequence[Mapping[str, Any]]  # each with role and content
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat template of a bundle or checkpoint folder. `UserError` where it has none, or a broken one."""

    def __init__(self, folder: Path):
        config = _read_config(folder / "tokenizer_config.json")
        source = _source(folder, config)
        self.special = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template of {folder} is broken: {error}") from error

    def render(self, messages: Messages, *, answer: bool = True) -> str:
        """The conversation as text; with `answer`, up to where the assistant's next turn begins.

        Raises `UserError` where the template refuses the conversation.
        """
        if not messages:
            raise UserError("a conversation needs at least one message")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=answer,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise UserError(f"the chat template refuses a conversation with the turns {roles}: {error}") from error


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}, by which templates mark an assistant's words; rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several templates by name
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    if not found:
        raise UserError(f"{folder} has no chat template: give the model plain text (--raw)")
    return str(found)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # jinja2's own filter escapes HTML, which no chat template is trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)

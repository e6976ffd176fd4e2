"""The supported part of OpenAI's requests and answers. An unsupported option that would change the text is rejected."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, NoReturn, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from ..generator import Finish
from ..session import Settings, Usage
from .messages import read_messages
from .options import CHAT, COMPLETION, STREAM, served
from .refusal import Refused, wrong

_SURROGATE = re.compile("[\ud800-\udfff]")


def _whole(value: object) -> Any:
    """Accept a whole number that a client's JSON writes with a decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    include_usage: bool = False

    @model_validator(mode="before")
    @classmethod
    def _served(cls, values: Any) -> Any:
        return served(values, cls.model_fields, STREAM, "stream_options.") if isinstance(values, dict) else values


class _Request(_Model):
    """The options of both endpoints; `options` lists what else is accepted, and with which values."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0  # OpenAI's default
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    stop: str | list[str] = ""
    seed: Whole | None = None  # None: a random one

    def settings(self, depth: int, context: int) -> Settings:
        """The session's settings for the answer."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        greedy = self.top_p == 0  # only the most likely token is left
        return Settings(
            max_tokens=self.limit() or context,
            depth=depth,
            temperature=0.0 if greedy else self.temperature,
            top_p=1.0 if greedy else self.top_p,
            seed=secrets.randbits(31) if self.seed is None else self.seed % 2**32,
            stop=tuple(text for text in stop if text),
        )

    def limit(self) -> int | None:
        """Maximum number of new tokens; None: as many as the context has room for."""
        return self.max_tokens


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], BeforeValidator(read_messages)]
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def variables(self) -> dict[str, tuple[Any, str]]:
        """Variables for the chat template besides the messages: name -> (value, the field it comes from)."""
        variables = {
            name: (value, f"chat_template_kwargs.{name}")
            for name, value in self.chat_template_kwargs.items()
            if value is not None
        }
        if self.enable_thinking is not None:
            variables.setdefault("enable_thinking", (self.enable_thinking, "enable_thinking"))
        if self.reasoning_effort == "none":
            variables.setdefault("enable_thinking", (False, "reasoning_effort"))
        elif self.reasoning_effort:
            variables.setdefault("reasoning_effort", (self.reasoning_effort, "reasoning_effort"))
        return variables


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[Whole]

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, value: object) -> Any:
        """The single prompt of a list: a text, or a list of token ids."""
        if not isinstance(value, list) or not value or not isinstance(value[0], (str, list)):
            return value
        if len(value) > 1:
            raise wrong(
                "prompt", f"only one prompt per request is supported, not {len(value)}; send each in its own request"
            )
        return value[0]

    def limit(self) -> int:
        return self.max_tokens or 16  # OpenAI's default


R = TypeVar("R", ChatRequest, CompletionRequest)


def read_request(kind: type[R], body: bytes) -> R:
    """The request, or `Refused` (400) that names the first field that is wrong."""
    values = read_body(body)
    options = served(values, kind.model_fields, CHAT if kind is ChatRequest else COMPLETION)
    try:
        return kind.model_validate(options)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        path = _path(detail["loc"])
        raise wrong(path, _says(path, detail)) from error


def _path(loc: tuple[int | str, ...]) -> str:
    """A field's path without the type names that pydantic inserts for unions."""
    return ".".join(str(part) for part in loc if not re.search(r"[^A-Za-z0-9_]", str(part)) and part not in _TYPES)


_TYPES = ("str", "int")


def _says(path: str, detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "this field is required"
    if path in ("max_tokens", "max_completion_tokens") and detail["type"] == "greater_than_equal":
        return "must be at least 1; leave it out to use all the room in the context"
    if path == "stop" or path.startswith("stop."):
        return "must be a string or a list of strings"
    if path == "prompt" or path.startswith("prompt."):
        return "must be a string, a list of token ids, or a list with one of them"
    return detail["msg"].replace("Input should be", "must be")


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. `Refused` if it is not one, or a string in it is not valid Unicode."""
    try:
        values = json.loads(body.decode("utf-8-sig"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Refused(
            400, f"the body is not UTF-8: byte {error.start} is 0x{body[error.start]:02x}; send JSON as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise Refused(400, "the body must be a JSON object")
    if path := _broken_text(values):
        raise wrong(path, "it has half of a surrogate pair (\\ud800 to \\udfff), which is not a valid character")
    return values


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _broken_text(body: dict[str, Any]) -> str | None:
    """The path of a string that is not valid Unicode, if there is one."""
    left: list[tuple[str, Any]] = [("", body)]
    while left:
        path, value = left.pop()
        if isinstance(value, str) and _SURROGATE.search(value):
            return path
        if isinstance(value, dict):
            left += [(path or "the body", name) for name in value]
            left += [(f"{path}.{name}".lstrip("."), each) for name, each in value.items()]
        elif isinstance(value, list):
            left += [(f"{path}.{number}", each) for number, each in enumerate(value)]
    return None


class ResponseBuilder:
    """Builds the response to one request, whole or in chunks; with `counted` a last chunk has the usage."""

    def __init__(self, model: str, chat: bool, counted: bool = False):
        self._chat, self._counted = chat, counted
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: Finish, usage: Usage) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {**self._outer(""), "choices": [_choice(said, finish)], "usage": counts(usage)}

    def opening(self) -> dict[str, Any] | None:
        """The first chunk, with the role; completions have none."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._chat else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text}, None)

    def closing(self, finish: Finish) -> dict[str, Any]:
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._outer(".chunk"), "choices": [], "usage": counts(usage)}

    def _chunk(self, said: Mapping[str, Any], finish: Finish | None) -> dict[str, Any]:
        usage = {"usage": None} if self._counted else {}  # null until the last chunk
        return {**self._outer(".chunk"), "choices": [_choice(said, finish)], **usage}

    def _outer(self, suffix: str) -> dict[str, Any]:
        return {"object": "chat.completion" + suffix if self._chat else "text_completion", **self._head}


def _choice(said: Mapping[str, Any], finish: Finish | None) -> dict[str, Any]:
    return {"index": 0, **said, "logprobs": None, "finish_reason": finish}


def counts(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
    }

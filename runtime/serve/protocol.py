"""OpenAI's requests and answers, as far as they are served. What would change the text and is not served is refused."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..generator import Finish
from ..session import Settings, Usage

_Empty = Annotated[list[Any] | dict[str, Any], Field(max_length=0)]


class Refused(Exception):
    """A request that is answered with an error of OpenAI's shape."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Model):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # pads OpenAI's own streams against eavesdroppers; nothing to do here


class TextFormat(_Model):
    type: Literal["text"]


class _Request(_Model):
    """What both endpoints take. A field that is not served is there with the values that mean nothing is wanted."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: _Empty | None = None
    user: str | None = None

    def settings(self, depth: int, context: int) -> Settings:
        """OpenAI's defaults: temperature 1, another seed each time."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Settings(
            max_tokens=self.limit() or context,
            depth=depth,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbits(31) if self.seed is None else self.seed % 2**32,
            stop=tuple(text for text in stop if text),
        )

    def limit(self) -> int | None:
        """At most so many tokens; None: as many as the context has room for."""
        return self.max_tokens


class Part(_Model):
    type: Literal["text"]
    text: str


class Message(_Model):
    # Clients send an answer back as they got it, with fields that are empty there.
    model_config = ConfigDict(extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    tool_calls: _Empty | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    tools: _Empty | None = None
    response_format: TextFormat | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> list[dict[str, str]]:
        return [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in self.messages
        ]


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    def limit(self) -> int:
        return self.max_tokens or 16  # OpenAI's default

    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


R = TypeVar("R", bound=_Request)


def read_request(kind: type[R], body: bytes) -> R:
    """The request, or `Refused` (400) that names the first field that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_context=False)[0]
        if detail["type"] == "json_invalid":
            raise Refused(400, f"the body is not valid JSON: {detail['msg']}") from error
        path = ".".join(str(part) for part in detail["loc"]) or None
        first = str(detail["loc"][0]) if detail["loc"] else None
        message = detail["msg"]
        if detail["type"] == "extra_forbidden":
            message = "this parameter is not supported here"
        elif first not in ("model", "messages", "prompt"):
            message += "; anything else is not supported here"
        raise Refused(400, f"{path or 'the body'}: {message}", param=path) from error


class Answer:
    """Builds what is sent for one request, whole or in chunks."""

    def __init__(self, model: str, chat: bool):
        self._chat = chat
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: Finish, usage: Usage) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {**self._outer(""), "choices": [_choice(said, finish)], "usage": counts(usage)}

    def opening(self) -> dict[str, Any] | None:
        """The chunk that says who speaks; completions have none."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}}, None) if self._chat else None

    def piece(self, text: str) -> dict[str, Any]:
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text}, None)

    def closing(self, finish: Finish) -> dict[str, Any]:
        return self._chunk({"delta": {}} if self._chat else {"text": ""}, finish)

    def usage(self, usage: Usage) -> dict[str, Any]:
        return {**self._outer(".chunk"), "choices": [], "usage": counts(usage)}

    def _chunk(self, said: Mapping[str, Any], finish: Finish | None) -> dict[str, Any]:
        return {**self._outer(".chunk"), "choices": [_choice(said, finish)]}

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

"""Finds the assistant's own text in a conversation rendered by a chat template.

Templates are only rendered, never parsed, so any template works. A turn's text is located by rendering the
conversation again with other text in its place: the common prefix and suffix of both renderings are not the turn's
own. So text that the template itself adds to a turn, such as an empty reasoning block, does not count as its own, and
templates may render an earlier turn differently from the last one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from ..core.errors import UserError
from .rows import Message, Messages

Render = Callable[..., str]  # (messages, answer=False)
CLOSED = "</think>"
# Rare characters. One that does not occur in the text is used to write the placeholder for a turn's text.
_STRANGERS = "ꙮꙭꚙꚗꚕꚓꚑ"


class TemplateError(UserError):
    """A row that the chat template cannot express; `reason` is the name it is counted under."""

    def __init__(self, message: str, reason: str = "template"):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Span:
    """A range of characters in a text."""

    begin: int  # where training starts
    end: int  # end of the turn's own text
    limit: int  # end of everything that belongs to the turn
    spaces: bool = False  # whether `begin` is where the text starts, so spaces before it may be in the first token


def answer_span(render: Render, messages: Messages, number: int, text: str) -> Span:
    """The span of assistant turn `number` in `text`, the whole conversation rendered by the template.

    Raises `TemplateError` if the template changes the turn's text.
    """
    if number == 0:
        raise TemplateError("a conversation starts with an assistant turn; it must start with a user or system message")
    last = number == len(messages) - 1
    turn = text if last else render(messages[: number + 1])
    alone = _own(render, messages[: number + 1], number, turn)
    own = alone if last else _in_whole(render, messages, number, text, turn, alone)
    if own is not None and not all(name in text[slice(*own)] for name in called(messages[number])):
        raise TemplateError(leaves_out(messages), "tool_call")
    if own is None or not _written(messages[number], text[slice(*own)]):
        said = (messages[number]["content"] or "").strip() or f"the call to {' and '.join(called(messages[number]))}"
        raise TemplateError(
            "the model's chat template changes the assistant's turn "
            f"({said[:60]!r} is not in the rendered text), so it cannot be trained on unchanged"
        )
    begin, end = own
    assert alone is not None
    limit = end + common(text[end:], turn[alone[1] :])
    end = begin + len(text[begin:end].rstrip())
    begin = _with_opening(messages[number], text, begin, end)
    header = _header(render, messages, number, text, begin)
    reasoning = _squeezed(messages[number].get("reasoning_content") or "")
    thinks = reasoning and reasoning in _squeezed(text[begin:end])  # then its tags belong to the assistant too
    if header is not None and (thinks or not text[header:begin].strip()):
        return Span(header, end, limit)
    return Span(begin + len(text[begin:end]) - len(text[begin:end].lstrip()), end, limit, spaces=True)


def _own(render: Render, messages: Messages, number: int, text: str) -> tuple[int, int] | None:
    """Begin and end of turn `number`'s own text in `text`: the part that changes with it. None if no placeholder can
    be rendered in its place."""
    stranger = next((c for c in _STRANGERS if c not in text), None)
    if stranger is None:
        return None
    said, thought = messages[number]["content"] or "", messages[number].get("reasoning_content")
    words = stranger * 3
    # A turn with reasoning gets a placeholder with reasoning, so both renderings have the template's reasoning tags.
    other: Message = {"role": "assistant", "content": f"<think>{words}</think>{words}" if CLOSED in said else words}
    if thought:
        other["reasoning_content"] = words
    try:
        changed = render([*messages[:number], other, *messages[number + 1 :]])
    except TemplateError:
        return None
    if stranger not in changed:
        return None
    begin = common(text, changed)
    if messages[number].get("tool_calls"):  # where text before the calls would be
        try:
            spoken = render([*messages[:number], messages[number] | {"content": words}, *messages[number + 1 :]])
            begin = min(begin, common(text, spoken)) if stranger in spoken and not said.strip() else begin
        except TemplateError:
            pass
    return begin, max(begin, len(text) - common(text[::-1], changed[::-1]))


def _in_whole(
    render: Render, messages: Messages, number: int, text: str, turn: str, alone: tuple[int, int] | None
) -> tuple[int, int] | None:
    """The own text of a turn that others follow, in the whole text.

    Without its calls the following turns may be rendered differently, or rejected. So the text found must also occur
    in the turn rendered as the last one; if not, that rendering's text is searched for in the whole.
    """
    if alone is None:
        return None
    own = _own(render, messages, number, text)
    if own is not None and text[slice(*own)].strip() and text[slice(*own)].strip() in turn[: alone[1]]:
        return own
    words = turn[slice(*alone)].strip()
    after = common(text, render(messages[:number]))
    begin = text.find(words, after)
    return (begin, begin + len(words)) if words and begin >= 0 else None


def _written(message: Message, own: str) -> bool:
    """Whether the turn's own text contains the whole content; reasoning may be missing, since templates drop that of
    earlier turns."""
    said = (message["content"] or "").strip()
    return any(answer in own for answer in (said, said.rpartition(CLOSED)[2].strip()))


def leaves_out(messages: Messages) -> str:
    """The error message for a template that omits tool calls."""
    names = ", ".join(dict.fromkeys(name for message in messages for name in called(message)))
    return f"the model's chat template omits tool calls ({names})"


def called(message: Message) -> list[str]:
    """Names of the functions that a turn calls."""
    return [call["function"]["name"] for call in message.get("tool_calls") or []]


def _header(render: Render, messages: Messages, number: int, text: str, begin: int) -> int | None:
    """Where the header of turn `number` ends, i.e. the end of the model's prompt for this turn. None if the template
    renders the preceding conversation differently, so this is unknown."""
    try:
        shown = render(messages[:number], answer=True)
        end = min(common(text, shown), begin)
        known = end in (len(shown), begin) or text.startswith(render(messages[:number]))
    except TemplateError:  # it rejects a conversation without an answer
        return None
    return end if known else None


def _with_opening(message: Message, text: str, begin: int, end: int) -> int:
    """Where a turn's text begins, including a reasoning tag before it that is part of the content."""
    content = _squeezed(message["content"] or "")
    place = content.find(_squeezed(text[begin:end]))
    opening = content[:place] if CLOSED in content and place > 0 else ""
    start = begin
    for character in reversed(opening):
        start = len(text[:start].rstrip()) - 1
        if start < 0 or text[start] != character:
            return begin
    return start


def _squeezed(text: str) -> str:
    return "".join(text.split())


def common(a: str, b: str) -> int:
    """Length of the common prefix of two texts."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low], a[:high] != b[:high]
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low


def unwritten(text: str, messages: Messages) -> str:
    """An error message naming the first turn of another role that the rendered text omits; empty if none."""
    text = _squeezed(text)
    for number, message in enumerate(messages, 1):
        said = message["content"] or ""
        if message["role"] != "assistant" and not any(_squeezed(form) in text for form in _forms(said)):
            return f"the model's chat template omits message {number} (role {message['role']}): {said[:60]!r}"
    return ""


def _forms(said: str) -> list[str]:
    """A text unchanged, and escaped as in a JSON string."""
    return [said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]]

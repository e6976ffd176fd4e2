"""From rows to tokens: the chat template, and the loss mask (spans.py finds the tokens to train on)."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..modeling.config import eos_ids
from ..modeling.types import ModelTokenizer
from .rows import Message, Messages, Row, Split, read_rows
from .spans import Span, TemplateError, answer_span, leaves_out, unwritten

# Some templates (Llama 3.1, 3.2) print today's date. Rows must not depend on the day they are encoded, so such
# templates get a fixed date: the default of Llama 3.1's own template.
_DATE = datetime(2024, 7, 26)
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{_DATE.strftime('%' + code)}')" for code in "YymBbdAaHMS")
    + " }}{% endmacro %}"
)


@dataclass(frozen=True)
class Encoded:
    """Tokens of one row; where `loss_mask[t]` is true, token t is trained on (predicted from the tokens before it)."""

    input_ids: list[int]
    loss_mask: list[bool]
    row: int = -1  # id of the row, if known
    start: int = 0  # position of the first token in the row: a plain text may span several windows


def render(
    tokenizer: ModelTokenizer, messages: Messages, *, answer: bool = False, tools: Sequence[Any] | None = None
) -> str:
    """A conversation rendered by the model's own chat template; with `answer`, the assistant's header is appended.

    Raises `UserError` if the tokenizer has no template, and `TemplateError` if the template rejects the conversation
    or omits tool calls.
    """
    return writer(tokenizer, messages, tools)(messages, answer=answer)


def writer(tokenizer: ModelTokenizer, messages: Messages, tools: Sequence[Any] | None) -> Callable[..., str]:
    """A function of messages and `answer` that renders a conversation and its prefixes. Raises as `render` does.

    Templates differ in what they expect of a turn with tool calls: content None or empty, arguments as an object or as
    JSON text. The first combination with which the template writes the calls is used.
    """

    def form(empty: str | None, as_text: bool) -> Callable[..., str]:
        def write(turns: Messages, answer: bool = False) -> str:
            return _render(tokenizer, [_with(turn, empty, as_text) for turn in turns], answer, tools)

        return write

    if not any(message.get("tool_calls") for message in messages):
        return form("", False)
    refused: UserError | None = None
    written = False
    for as_text in (False, True):
        texts = {}
        for empty in (None, ""):
            write = form(empty, as_text)
            try:
                text, marked = write(messages), write([_marked(message) for message in messages])
            except TemplateError as error:
                refused = error
                continue
            written = True
            if _calls_are_written(messages, text, marked):
                texts[empty] = text
        # Some templates print missing content as the word None.
        if None in texts and ("" not in texts or texts[None].count("None") <= texts[""].count("None")):
            return form(None, as_text)
        if "" in texts:
            return form("", as_text)
    raise refused if refused and not written else TemplateError(leaves_out(messages), "tool_call")


def _render(tokenizer: ModelTokenizer, messages: Messages, answer: bool, tools: Sequence[Any] | None) -> str:
    import jinja2

    template = getattr(tokenizer, "chat_template", None) and tokenizer.get_chat_template(tools=tools)
    if not template:
        raise UserError(
            "the model's tokenizer has no chat template, so conversations cannot be written in its format; "
            "use plain text instead (source: dataset with `text: COLUMN`), or an instruction-tuned model"
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=_FIXED_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=answer,
            date_string=_DATE.strftime("%d %b %Y"),
        )
    except (jinja2.TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateError(
            f"the model's chat template refuses a conversation with the turns {roles}: {error}"
        ) from error


def _with(message: Message, empty: str | None, as_text: bool = False) -> Message:
    """A message in the form for templates: missing content becomes `empty`, arguments become JSON if `as_text`."""
    form = message if message["content"] else message | {"content": empty if message.get("tool_calls") else ""}
    if as_text and message.get("tool_calls"):
        calls = []
        for call in message["tool_calls"]:
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append(call | {"function": call["function"] | {"arguments": arguments}})
        form = form | {"tool_calls": calls}
    return form


def _marked(message: Message) -> Message:
    """The message with the functions it calls renamed to names found nowhere else in the conversation."""
    if not message.get("tool_calls"):
        return message
    calls = [call | {"function": call["function"] | {"name": _mark(call)}} for call in message["tool_calls"]]
    return message | {"tool_calls": calls}


def _mark(call: dict[str, Any]) -> str:
    return f"marked_{call['function']['name']}_call"


def _calls_are_written(messages: Messages, text: str, marked: str) -> bool:
    """Whether the rendered text contains every call, with arguments not written as a Python dict; `marked` is the text
    with the called functions renamed, since tool definitions contain the original names too."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    arguments = [str(call["function"]["arguments"]) for call in calls if call["function"]["arguments"]]
    return all(_mark(call) in marked for call in calls) and not any(written in text for written in arguments)


def encode_row(tokenizer: ModelTokenizer, row: Row, max_length: int | None = None) -> Encoded:
    """Tokens of a row and its loss mask, cut to `max_length` tokens.

    In a conversation every assistant turn is trained on: its own text (content, reasoning, calls) and the token that
    ends the turn. Headers, other roles, text that the template adds and whatever follows the end of the turn are not.
    A row marked `cut` ends after the last answer's content. In plain text every token but the first is trained on.
    Raises `TemplateError` for a template that changes the assistant's text.
    """
    if row.messages is None:
        windows = encode_text(tokenizer, row.text or "", max_length)
        return replace(windows[0], row=row.id) if windows else Encoded([], [], row.id)
    write = writer(tokenizer, row.messages, row.tools)
    return _encode(tokenizer, row, row.messages, write, write(row.messages), max_length)


def encode_whole(tokenizer: ModelTokenizer, row: Row) -> Encoded:
    """As `encode_row`, for a user's conversation: also raises `TemplateError` if the template omits a turn of another
    role."""
    messages = row.messages or []
    write = writer(tokenizer, messages, row.tools)
    text = write(messages)
    encoded = _encode(tokenizer, row, messages, write, text, None)
    left_out = unwritten(text, messages)
    if left_out:
        raise TemplateError(left_out, "left_out")
    return encoded


def _encode(
    tokenizer: ModelTokenizer,
    row: Row,
    messages: Messages,
    write: Callable[..., str],
    text: str,
    max_length: int | None,
) -> Encoded:
    # The template has written the beginning-of-text token where the model wants one.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoding["input_ids"])
    offsets: list[tuple[int, int]] = list(encoding["offset_mapping"])
    special = special_tokens(tokenizer)
    ends = [special.get(i, "") for i in ids]
    mask = [False] * len(ids)
    last = -1
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            span = answer_span(write, messages, number, text)
            if row.cut and number == len(messages) - 1:
                span = replace(span, limit=span.end)
            last = _last_target(ends, offsets, text, span.end, span.limit)
            if message.get("weight") != 0:
                for i, (start, end) in enumerate(offsets[: last + 1]):
                    mask[i] = mask[i] or _is_inside(start, end, span, text)
    if row.cut:
        ids, mask = ids[: last + 1], mask[: last + 1]
    if mask:
        mask[0] = False  # there is nothing to predict it from
    return Encoded(ids[:max_length], mask[:max_length], row.id)


def _is_inside(start: int, end: int, span: Span, text: str) -> bool:
    """Whether the characters of a token belong to an answer.

    A token that starts in the header and reaches into the answer does not, unless the overlap is only spaces and the
    answer was located by its text. Byte-level tokenizers give spaces an empty span at their end, hence `end > begin`.
    """
    return end > span.begin and (start >= span.begin or (span.spaces and not text[start : span.begin].strip(" ")))


def _last_target(
    special: Sequence[str], offsets: Sequence[tuple[int, int]], text: str, content_end: int, limit: int
) -> int:
    """Index of the turn's last token to train on: the special token that ends it, or else the content's last token.

    `special[i]` is token i as text if it is a special token, else empty.
    """
    last = -1
    for i, (start, _) in enumerate(offsets):
        if start < content_end:
            last = i
        elif special[i] and start + len(special[i]) <= limit:
            return last if text[content_end:start].strip() else i
        elif start >= limit:
            break
    return last


def special_tokens(tokenizer: ModelTokenizer) -> dict[int, str]:
    """Id and text of all tokens marked special: beginning and end of text or turn, roles, padding."""
    return {number: token.content for number, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}


def end_tokens(tokenizer: ModelTokenizer, base: Path) -> list[int]:
    """End tokens of the model in the folder `base`, from its configurations and its tokenizer."""
    return [*eos_ids(base), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]


def encode_text(tokenizer: ModelTokenizer, text: str, max_length: int | None = None) -> list[Encoded]:
    """Plain text split into windows of `max_length` tokens; every token but a window's first is trained on.

    The tokenizer's beginning-of-text token, if it adds one, is in the first window. A remainder of one token is
    dropped: it has nothing to predict.
    """
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    step = max_length or max(len(ids), 1)
    windows = [(i, ids[i : i + step]) for i in range(0, len(ids), step)]
    return [Encoded(w, [False] + [True] * (len(w) - 1), start=i) for i, w in windows if len(w) > 1]


def measured(row: Row, tokenizer: ModelTokenizer, length: int | None) -> Row:
    """The row with its numbers of tokens and of targets; texts are split into windows of `length` tokens."""
    windows = [encode_row(tokenizer, row)] if row.messages else encode_text(tokenizer, row.text or "", length)
    tokens = sum(len(window.input_ids) for window in windows)
    return replace(row, tokens=tokens, targets=sum(sum(window.loss_mask) for window in windows))


def load_encoded(
    folder: Path, tokenizer: ModelTokenizer, split: Split, max_length: int, without: Collection[str] = ()
) -> list[Encoded]:
    """All rows of one split of a data stage's folder but those `without` sources, encoded; a plain text may become
    several windows.

    Rows without a token to train on within `max_length` tokens are dropped; raises `UserError` if none is left.
    """
    rows = (row for row in read_rows(folder, split) if row.source not in without)
    encoded = encode_rows(tokenizer, rows, max_length)
    if not encoded:
        raise UserError(f"no {split} row of {folder.name} has a token to train on in its first {max_length} tokens")
    return encoded


def encode_rows(tokenizer: ModelTokenizer, rows: Iterable[Row], max_length: int) -> list[Encoded]:
    """Rows encoded in order, a plain text as several windows; rows without a token to train on are dropped."""
    windows: list[Encoded] = []
    for row in rows:
        if row.messages is None:
            windows += [replace(window, row=row.id) for window in encode_text(tokenizer, row.text or "", max_length)]
        else:
            windows.append(encode_row(tokenizer, row, max_length))
    return [encoded for encoded in windows if any(encoded.loss_mask)]

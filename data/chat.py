"""From rows to tokens: the chat template, and which tokens are learned.

The template is only ever rendered, never taken apart, so that any template works: an assistant turn starts where
the conversation before it, rendered with `add_generation_prompt`, ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import UserError
from .rows import Messages, Row, Split, read_rows

# Some templates (Llama 3.1, 3.2) print today's date. Rows must not depend on the day they were encoded on, so such
# templates are given a day that stays: the one that Llama 3.1's own template falls back on.
_DATE = datetime(2024, 7, 26)
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f" | replace('%{code}', '{_DATE.strftime('%' + code)}')" for code in "YymBbdAaHMS")
    + " }}{% endmacro %}"
)


@dataclass(frozen=True)
class Encoded:
    """Tokens of one row; `loss_mask[t]` says that token t is learned (predicted from the tokens before it)."""

    input_ids: list[int]
    loss_mask: list[bool]
    row: int = -1  # id of the row they are of, where known
    start: int = 0  # the number of the first token in the row: a plain text may be several windows


def render(tokenizer: Any, messages: Messages, *, answer: bool = False) -> str:
    """A conversation as the model's own chat template writes it; with `answer`, up to the assistant's header.

    Raises `UserError` where the tokenizer has no template, or the template refuses the conversation.
    """
    import jinja2

    template = getattr(tokenizer, "chat_template", None) and tokenizer.get_chat_template()
    if not template:
        raise UserError(
            "the model's tokenizer has no chat template, so conversations cannot be written in its format; "
            "use plain text instead (source: dataset with `text: COLUMN`), or an instruction-tuned model"
        )
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=_FIXED_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=answer,
            date_string=_DATE.strftime("%d %b %Y"),
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the model's chat template refuses a conversation with the turns {roles}: {error}") from error


def encode_row(tokenizer: Any, row: Row, max_length: int | None = None) -> Encoded:
    """Tokens of a row and its loss mask, cut to `max_length` tokens.

    In a conversation every assistant turn is learned: its content and the token that ends the turn; headers,
    other roles and whatever the template writes after the end of the turn are not. Of a row that is `cut` nothing
    after the last answer's content is kept. In plain text every token but the first is learned.
    Raises `UserError` for a template that does not extend a conversation turn by turn.
    """
    if row.messages is None:
        windows = encode_text(tokenizer, row.text or "", max_length)
        return replace(windows[0], row=row.id) if windows else Encoded([], [], row.id)
    text = render(tokenizer, row.messages)
    # The template has written the beginning-of-text token where the model wants one.
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(encoding["input_ids"])
    offsets: list[tuple[int, int]] = list(encoding["offset_mapping"])
    special = special_tokens(tokenizer)
    mask = [False] * len(ids)
    last = -1
    for number, message in enumerate(row.messages):
        if message["role"] == "assistant":
            begin, content_end, limit = _answer_span(tokenizer, row.messages, number, text)
            if row.cut and number == len(row.messages) - 1:
                limit = content_end
            last = _last_target([special.get(i, "") for i in ids], offsets, text, content_end, limit)
            for i, (start, end) in enumerate(offsets[: last + 1]):
                # A token that reaches into the answer from its header is not learned. Byte-level tokenizers give
                # spaces an empty span at their end, hence the second condition.
                mask[i] = mask[i] or (start >= begin and end > begin)
    if row.cut:
        ids, mask = ids[: last + 1], mask[: last + 1]
    if mask:
        mask[0] = False  # nothing comes before it
    return Encoded(ids[:max_length], mask[:max_length], row.id)


def _answer_span(tokenizer: Any, messages: Messages, number: int, text: str) -> tuple[int, int, int]:
    """Characters of `text` where assistant turn `number` begins, where its content ends, and where the turn ends."""
    if number == 0:
        raise UserError("a conversation starts with the assistant; it has to start with a user or system message")
    before = render(tokenizer, messages[:number], answer=True)
    if not text.startswith(before):
        raise UserError(
            "the model's chat template writes an answer's header differently once the answer is there, so what is "
            "to be learned cannot be told from what is given; use rows of plain text (`text: COLUMN`)"
        )
    begin = len(before)
    # Templates may close the conversation as a whole (Phi-3): only what stays when turns follow belongs to the turn.
    turn = text if number == len(messages) - 1 else render(tokenizer, messages[: number + 1])
    limit = next((i for i, (a, b) in enumerate(zip(text, turn, strict=False)) if a != b), min(len(text), len(turn)))
    content = messages[number]["content"].strip()
    found = text.find(content, begin, limit)
    if found < 0:
        raise UserError(
            "the model's chat template rewrites the assistant's words "
            f"({content[:60]!r} is not in what it makes of them), so they cannot be learned as they stand"
        )
    return begin, found + len(content), limit


def _last_target(
    special: Sequence[str], offsets: Sequence[tuple[int, int]], text: str, content_end: int, limit: int
) -> int:
    """Index of the turn's last learned token: the special token that ends it, or else the content's last token.

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


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Id and text of all tokens marked special: beginning and end of text or turn, roles, padding."""
    return {number: token.content for number, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}


def encode_text(tokenizer: Any, text: str, max_length: int | None = None) -> list[Encoded]:
    """Plain text cut into windows of `max_length` tokens; every token but a window's first is learned.

    The tokenizer's own beginning-of-text token, if it adds one, stands in the first window. A rest of one token
    is left out: nothing could be learned from it.
    """
    ids: list[int] = list(tokenizer(text, verbose=False)["input_ids"])
    step = max_length or max(len(ids), 1)
    windows = [(i, ids[i : i + step]) for i in range(0, len(ids), step)]
    return [Encoded(w, [False] + [True] * (len(w) - 1), start=i) for i, w in windows if len(w) > 1]


def load_encoded(folder: Path, tokenizer: Any, split: Split, max_length: int) -> list[Encoded]:
    """All rows of one split of a data stage's folder, encoded; plain texts as many windows.

    Rows with nothing to learn within `max_length` tokens are left out; if none is left, that is a `UserError`.
    """
    found = encode_rows(tokenizer, read_rows(folder, split), max_length)
    if not found:
        raise UserError(f"no {split} row of {folder.name} has anything to learn in its first {max_length} tokens")
    return found


def encode_rows(tokenizer: Any, rows: Iterable[Row], max_length: int) -> list[Encoded]:
    """Rows encoded in order, plain texts as many windows; without those that have nothing to learn."""
    found: list[Encoded] = []
    for row in rows:
        if row.messages is None:
            found += [replace(window, row=row.id) for window in encode_text(tokenizer, row.text or "", max_length)]
        else:
            found.append(encode_row(tokenizer, row, max_length))
    return [encoded for encoded in found if any(encoded.loss_mask)]

"""Text to tokens and back with a bundle's tokenizer.json; needs only `tokenizers`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json_if_there

_HALF = "\ufffd"  # replacement character: what an incomplete character decodes to
_LONGEST = 3  # most replacement characters that the beginning of one character decodes to
_WINDOW = 32  # tokens decoded again for each new one
_OVERLAP = 8  # tokens kept when the window moves; more than one character can span


class Tokenizer:
    """The tokenizer of a bundle or checkpoint folder."""

    def __init__(self, folder: Path):
        import tokenizers

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{folder} has no tokenizer.json, so text cannot be tokenized")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise UserError(
                f"{file} could not be loaded as a tokenizer: {' '.join(str(error).split())[:200]}"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str, *, begin: bool = False) -> list[int]:
        """Token ids; special tokens in the text are recognised. `begin` adds the tokenizer's begin-of-text tokens.

        Raises `UserError` for a text with half of a surrogate pair, as invalid UTF-8 bytes become.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text is not valid Unicode: character {error.start + 1} is half of a surrogate pair"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=begin).ids

    @property
    def size(self) -> int:
        """The vocabulary's size; all ids are below it."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special tokens."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def number(self, token: str) -> int | None:
        """The id of a token."""
        return self._tokenizer.token_to_id(token)


class TextStream:
    """Tokens one by one to pieces of text: joined, they equal decoding all at once, and none splits a character."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        """The text that is final now."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        held = min(len(text) - len(text.rstrip(_HALF)), _LONGEST)
        piece = text[self._shown : len(text) - held]
        self._shown = max(self._shown, len(text) - held)
        if not held and len(self._ids) > _WINDOW:
            self._ids = self._ids[-_OVERLAP:]
            self._shown = len(self._tokenizer.decode(self._ids))
        return piece

    def rest(self) -> str:
        """The rest that was held back, at the end of the text."""
        text = self._tokenizer.decode(self._ids)
        piece, self._shown = text[self._shown :], len(text)
        return piece


class StopTexts:
    """Pieces of text, up to the first occurrence of a stop text; then `found` is set.

    What may be the start of a stop text is held back until that is certain.
    """

    def __init__(self, texts: Collection[str]):
        self._texts = [text for text in texts if text]
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is final now; none after a stop."""
        if self.found:
            return ""
        text = self._held + piece
        starts = [start for stop in self._texts if (start := text.find(stop)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        longest = max((_overlap(text, stop) for stop in self._texts), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def rest(self) -> str:
        """The rest that was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the start of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stop_tokens(folder: Path) -> frozenset[int]:
    """The tokens that end an answer: `eos_token_id` of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        value = read_json_if_there(folder / name).get("eos_token_id")
        if value is not None:
            return frozenset(value if isinstance(value, list) else [value])
    return frozenset()

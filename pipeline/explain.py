"""Errors of libraries and of the system, turned into one line for the user."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
# Libraries' errors for a broken file: (module, class) → what is broken.
BROKEN = {
    ("jinja2", "TemplateError"): "a chat template",
    ("safetensors", "SafetensorError"): "a safetensors file",
    ("pyarrow.lib", "ArrowException"): "a Parquet file",
}
_LONGEST = 600  # characters
_NO_CODE = (
    "Code that comes with a model is never run: if the checkpoint has a tokenizer.json, remove auto_map from its "
    "tokenizer_config.json."
)


@contextmanager
def readable_errors(where: str) -> Iterator[None]:
    """Turn a full disk, too little memory or a missing permission into a `UserError`, whichever library raised it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = readable(error, where)
        if known is None:
            raise
        raise known from error


def readable(error: Exception, where: str) -> UserError | None:
    """The `UserError` for a full disk, too little memory or a missing permission; None for other errors."""
    text, number = str(error), getattr(error, "errno", None)
    if number in FULL or any(os.strerror(code) in text for code in FULL):
        return UserError(f"the disk is full ({where}); free some space and run the same command again")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return UserError(f"out of memory ({where}): {text.splitlines()[0] if text else 'no details'}")
    if isinstance(error, OSError) and number in FORBIDDEN:
        return UserError(f"{_file(error) or where}: {os.strerror(number)}; choose a folder you may write to")
    return None


def explained(error: Exception, where: str) -> UserError | None:
    """The `UserError` for an error caused by a file, a name or the machine; None for a bug in the program."""
    if known := readable(error, where):
        return known
    if isinstance(error, OSError):
        why = error.strerror or one_line(str(error)) or type(error).__name__
        return UserError(f"{_file(error) or where}: {why}")
    if isinstance(error, UnicodeDecodeError):
        return UserError(
            f"a file that was read is not {error.encoding} text: {error.reason} at byte {error.start} ({where})"
        )
    if isinstance(error, UnicodeEncodeError):
        characters = ascii(error.object[error.start : error.end])
        return UserError(
            f"a text contains {characters}, which is not a character and cannot be written as {error.encoding} "
            f"({where})"
        )
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"a file that was read is not valid JSON: {error} ({where})")
    for (module, name), subject in BROKEN.items():
        error_class = getattr(sys.modules.get(module), name, None)
        if isinstance(error_class, type) and isinstance(error, error_class):
            return UserError(f"{subject} that was read is broken: {one_line(str(error))} ({where})")
    return None


def _file(error: OSError) -> str:
    """The files that a system error is about."""
    names = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return " → ".join(os.fsdecode(name) for name in names)


def one_line(text: str) -> str:
    """A library's message in one line, cut to a readable length."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


def without_foreign_advice(message: str) -> str:
    """A message without transformers' advice to run a model's own code, which is never done here."""
    if "trust_remote_code" not in message:
        return message
    sentences = re.split(r"(?<=[.!?])\s+|\n+", message)
    kept = [s for s in sentences if "trust_remote_code" not in s and "can inspect the repository" not in s]
    return one_line(" ".join([*kept, _NO_CODE]))

"""Checks of command-line input before any work: names, texts, and paths to read from or write to.

Places to write to are checked by writing there; nothing is left behind.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from ..core.errors import UserError
from ..core.files import json_lines, read_text, why_not_utf8
from .explain import FULL

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # of runs and bundles, and with that of files
LONGEST_NAME = 100  # file names add a type, a depth and a part, and are limited to 255 bytes
_PROBE = ".compress-probe"


def check_name(name: str, option: str = "--name") -> None:
    """`UserError` for a name that is not a valid file name on every system."""
    if not re.fullmatch(NAME, name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"{option} {name!r}: a name consists of letters, digits, '.', '_' and '-', begins with a letter or "
            f"a digit, and has at most {LONGEST_NAME} characters; give the folder with --out"
        )


def bundle_name(name: str) -> str:
    """A bundle's name from a file's or folder's name: characters that file names should not have become '-'."""
    plain = re.sub(r"[^\w.+()\[\] -]", "-", name).strip(" .-")[:LONGEST_NAME]
    return plain or "model"


def check_text(text: str | None, option: str) -> None:
    """`UserError` for a text from the command line whose bytes are not UTF-8."""
    if text is None:
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        decode(os.fsencode(text) if sys.platform != "win32" else text.encode("utf-8", "surrogatepass"), option)


def decode(data: bytes, where: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark and with newlines as line ends."""
    try:
        return StringIO(data.decode("utf-8-sig"), newline=None).read()
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {why_not_utf8(data, error)}") from error


def read_standard_input() -> str:
    """All of standard input."""
    return decode(sys.stdin.buffer.read(), "standard input")


def check_file(path: Path, option: str) -> None:
    """`UserError` unless a file of text, or of JSON Lines by its name, can be read."""
    if path.suffix == ".jsonl":
        for _ in json_lines(path, f"{option}: "):
            pass
    else:
        read_text(path, f"{option}: ")


def check_new(path: Path, option: str = "--out") -> None:
    """`UserError` unless a file or folder can be created at `path`, where there is nothing or an empty folder."""
    if path.name in ("", ".."):
        raise UserError(f"{option} {path}: give the name of the file or folder to create")
    with _refusing(path, option):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{option} {path}: it is a broken link; choose another path")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists already; give another {option}, or remove it")
        with _made([*_missing(path.parent), path.with_name(f".{path.name}.partial")]) as partial:
            _write_in(partial)


def check_file_place(path: Path, option: str = "--out") -> None:
    """`UserError` unless a file can be written at `path`, possibly replacing an older one."""
    if path.name in ("", "..") or path.is_dir():
        raise UserError(f"{option} {path}: give the name of a file")
    with _refusing(path, option), _made([*_missing(path.parent), path.with_name(f"{path.name}.probe")]) as probe:
        _write_in(probe)


def check_folder(path: Path, option: str) -> None:
    """`UserError` unless files can be written in a folder, which need not exist yet."""
    with _refusing(path, option), _made(_missing(path)):
        _write_in(path)


@contextmanager
def _refusing(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        place = f" ({os.fsdecode(error.filename)})" if error.filename not in (None, str(path)) else ""
        why = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(f"{option} {path}: {why}{place}; choose a folder you may write to") from error


def _missing(folder: Path) -> list[Path]:
    """The missing folders on the way to `folder`, itself included, outermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    return missing[::-1]


@contextmanager
def _made(folders: list[Path]) -> Iterator[Path]:
    """Create missing folders inside the context, and remove them again; yields the last one."""
    created: list[Path] = []
    try:
        for folder in folders:
            if not folder.is_dir():
                folder.mkdir()
                created.append(folder)
        yield folders[-1] if folders else Path()
    finally:
        for folder in reversed(created):
            folder.rmdir()


def _write_in(folder: Path) -> None:
    probe = folder / _PROBE
    try:
        probe.write_bytes(b"x")
    finally:
        probe.unlink(missing_ok=True)

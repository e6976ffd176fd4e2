"""Reading of text and JSON files with errors that name file and line, and atomic writing. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


class Number(str):
    """A JSON number as spelt in the file: 0.10 stays 0.10."""


def plain(value: object) -> Any:
    """A value read with `literal`, its numbers converted to int and float."""
    if isinstance(value, Number):
        try:
            return json.loads(value)
        except ValueError:  # more digits than Python converts
            return str(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def read_text(path: Path, what: str = "") -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises `UserError` for a file that is missing, unreadable or not UTF-8; `what`, such as "evaluate.text: ", begins
    the message.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}{path} is not UTF-8 text: {why_not_utf8(path.read_bytes(), error)}") from error
    except OSError as error:
        raise unreadable(path, error, what) from error


def unreadable(path: Path, error: OSError, what: str = "") -> UserError:
    """The error for a file that cannot be opened: it does not exist, it is a folder, or the system's reason."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
        check_file_exists(path, what)
    return UserError(f"{what}{path} could not be read: {error.strerror or error}")


def check_file_exists(path: Path, what: str = "", advice: str = "") -> None:
    """`UserError`, ending with `advice`, unless `path` is a file."""
    if not path.is_file():
        there = "is a folder, but a file is needed" if path.is_dir() else "is not a regular file"
        state = there if path.exists() else "does not exist"
        raise UserError(f"{what}{path} {state}{advice}")


def check_folder_exists(path: Path, what: str = "") -> None:
    """`UserError` unless `path` is a folder."""
    if not path.is_dir():
        state = "is a file, but a folder is needed" if path.exists() else "does not exist"
        raise UserError(f"{what}{path} {state}")


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` if it cannot be read, is not JSON or is not an object."""
    value = read_json_value(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what}{path} holds a JSON {kind_of(value)} where an object is needed")
    return value


def read_json_value(path: Path, what: str = "") -> Any:
    """The value in a JSON file. Raises `UserError` if it cannot be read or is not JSON."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}{path} is not valid JSON: {error}") from error


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty object if the file does not exist."""
    return read_json(path) if path.is_file() else {}


def json_lines(path: Path, what: str = "", *, literal: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) for every non-blank line of a JSON Lines file.

    Only a newline ends a line: strings may contain U+2028 and other Unicode line separators. With `literal` numbers
    stay text (`Number`). Raises `UserError`, naming the line, for anything but a UTF-8 JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                value = parse_line(line, number, path, what, literal=literal)
                if value is not None:
                    yield number, value
    except OSError as error:
        raise unreadable(path, error, what) from error


def parse_line(line: bytes, number: int, path: Path, what: str = "", *, literal: bool = False) -> dict[str, Any] | None:
    """The object in line `number` of a JSON Lines file, None for a blank line. Raises as `json_lines` does."""
    where = f"{what}line {number} of {path}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 text: {why_not_utf8(line, error)}") from error
    if not text:
        return None
    try:
        value = parse(text, literal=literal)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is a JSON {kind_of(value)} where an object is needed")
    return value


def parse(text: str, *, literal: bool = False) -> Any:
    """The value of a JSON text; with `literal` numbers stay text (`Number`)."""
    numbers: dict[str, Any] = {"parse_int": Number, "parse_float": Number, "parse_constant": Number}
    return json.loads(text, **(numbers if literal else {}))


def why_not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """Why `data` is not UTF-8, and what to do about it."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "its byte order mark says UTF-16; save it as UTF-8"
    return f"byte {error.start} is 0x{error.object[error.start]:02x} ({error.reason}); save it as UTF-8"


def kind_of(value: object) -> str:
    """The JSON name of a value's type."""
    if isinstance(value, Number):
        return "number"
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def write_json(path: Path, value: object, *, indent: int | None = 2, ascii: bool = False) -> None:
    """Write JSON atomically, keys in their order; with `ascii` non-ASCII characters as \\uXXXX."""
    write_whole(path, json_text(value, indent=indent, ascii=ascii))


def json_text(value: object, *, indent: int | None = 2, ascii: bool = False) -> str:
    """The text that `write_json` writes."""
    return json.dumps(value, indent=indent, ensure_ascii=ascii) + "\n"


def printable(path: Path) -> str:
    """A path as text that can be encoded: bytes that are not UTF-8 become \\udcXX."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, through a temporary file beside it.

    Lone surrogates, which is how Python holds bytes of file names that are not UTF-8, are written as \\udcXX, as in
    JSON.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    temporary.replace(path)


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

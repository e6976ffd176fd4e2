"""Reading files that people made: every message names the file, and nothing is guessed.

And writing files whole. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError


class Number(str):
    """A JSON number, as the text that the file has for it: 0.10 stays 0.10."""


def plain(value: object) -> Any:
    """A value read with `literal`, its numbers as Python's own."""
    if isinstance(value, Number):
        try:
            return json.loads(value)
        except ValueError:  # more digits than Python takes
            return str(value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def read_text(path: Path, what: str = "") -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises `UserError` for a file that is missing, unreadable or not UTF-8; `what` (such as "evaluate.text: ") comes
    first in the message.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}{path} is not UTF-8 text: {why_not_utf8(path.read_bytes(), error)}") from error
    except OSError as error:
        raise UserError(f"{what}{path} could not be read: {error.strerror or error}") from error


def read_json(path: Path, what: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` where it cannot be read, is not JSON, or holds no object."""
    value = read_json_value(path, what)
    if not isinstance(value, dict):
        raise UserError(f"{what}{path} holds a JSON {kind_of(value)} where an object is needed")
    return value


def read_json_value(path: Path, what: str = "") -> Any:
    """Whatever a JSON file holds. Raises `UserError` where it cannot be read or is not JSON."""
    text = read_text(path, what)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}{path} is not valid JSON: {error}") from error


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty object where there is no such file."""
    return read_json(path) if path.is_file() else {}


def json_lines(path: Path, what: str = "", *, literal: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of every line of a JSON Lines file that is not blank.

    Lines end at a newline and nowhere else: U+2028 and its like may stand in a string. With `literal` a number is the
    text that the file has for it (`Number`). Raises `UserError`, with the line, for what is not a UTF-8 JSON object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                value = parse_line(line, number, path, what, literal=literal)
                if value is not None:
                    yield number, value
    except OSError as error:
        raise UserError(f"{what}{path} could not be read: {error.strerror or error}") from error


def parse_line(line: bytes, number: int, path: Path, what: str = "", *, literal: bool = False) -> dict[str, Any] | None:
    """The object in line `number` of a JSON Lines file, None for a blank line; errors as `json_lines` has them."""
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
    """The value of a JSON text; with `literal` a number is the text that stands there (`Number`)."""
    numbers: dict[str, Any] = {"parse_int": Number, "parse_float": Number, "parse_constant": Number}
    return json.loads(text, **(numbers if literal else {}))


def why_not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """What the bytes of a text probably are instead of UTF-8, and what to do."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "its byte order mark says UTF-16; save it as UTF-8"
    return f"byte {error.start} is 0x{error.object[error.start]:02x} ({error.reason}); save it as UTF-8"


def kind_of(value: object) -> str:
    """What JSON calls a value."""
    if isinstance(value, Number):
        return "number"
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def write_json(path: Path, value: object, *, indent: int | None = 2, ascii: bool = False) -> None:
    """Write JSON, keys in their order, so that the file is never seen half-written; with `ascii` other characters as
    \\uXXXX."""
    write_whole(path, json_text(value, indent=indent, ascii=ascii))


def json_text(value: object, *, indent: int | None = 2, ascii: bool = False) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=indent, ensure_ascii=ascii) + "\n"


def printable(path: Path) -> str:
    """A path as text that can be encoded: a byte of it that is no text is written as \\udcXX."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8 so that it is never seen half-written.

    A byte of a file's name that is no text, which Python holds as half of a surrogate pair, is written as \\udcXX, as
    JSON has it.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    temporary.replace(path)


def sha256(path: Path) -> str:
    """A file's hash, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

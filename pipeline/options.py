"""Options given as Python values or on the command line, checked like the sections of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..core.errors import UserError
from ..core.stage import Section
from .problems import describe_problems

S = TypeVar("S", bound=Section)


def as_json(values: Any) -> str:
    """Values as JSON, as a recipe file would have them: sections as their keys, paths as text."""
    return json.dumps(values, default=_plain)


def _plain(value: object) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def choose_section(section: type[S], given: S | None, keys: Mapping[str, object], name: str) -> S:
    """The section that was given as an object, or as its keys."""
    if given is None:
        return checked(section, keys, name)
    if keys:
        raise UserError(f"{name}: give a {type(given).__name__} or its keys ({', '.join(keys)}), not both")
    return given


def checked(section: type[S], values: Mapping[str, Any], name: str = "") -> S:
    """The section with these keys; None values are left out, except where null turns off what is otherwise done.

    Raises `UserError` with a recipe's message in one line: "prune.block: unknown key 'block'; did you mean 'blocks'?".
    `name` is the section's name, if the message needs it to be clear.
    """
    text = as_json({key: value for key, value in values.items() if value is not None or _turns_off(section, key)})
    try:
        return section.model_validate_json(text, strict=True)
    except ValidationError as error:
        problems = describe_problems(error, json.loads(text), section)
    prefix = (name,) if name else ()
    lines = [": ".join([".".join(map(str, (*prefix, *problem.path))), problem.message]) for problem in problems]
    raise UserError("; ".join(line.removeprefix(": ") for line in lines))


def _turns_off(section: type[Section], key: str) -> bool:
    """Whether a key may be null and is something else by default, as `speed` of the evaluate section."""
    field = section.model_fields.get(key)
    return (
        field is not None
        and NoneType in get_args(field.annotation)
        and field.get_default(call_default_factory=True) is not None
    )

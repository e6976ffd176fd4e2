"""Problems in a recipe: what is wrong, where, and the key that was probably meant."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from ..core.registry import UNUSABLE
from ..core.suggest import did_you_mean, nearest


@dataclass(frozen=True)
class Problem:
    """One problem at one key path."""

    path: tuple[str | int, ...]
    message: str

    def render(self, file: str, tree: object, origins: dict[tuple[Any, ...], str]) -> str:
        """ "file:line: key.path: message"; for an overridden key the option instead of file and line."""
        key = ".".join(str(part) for part in self.path) or "(the whole file)"
        for length in range(len(self.path), 0, -1):
            origin = origins.get(tuple(str(part) for part in self.path[:length]))
            if origin:
                return f"{origin}: {key}: {self.message}"
        return f"{file}:{_line(tree, self.path)}: {key}: {self.message}"


def _line(tree: object, path: tuple[str | int, ...]) -> int:
    """The line, from 1, of the deepest key on the path that is in the file."""
    line = 1
    for part in path:
        if isinstance(tree, CommentedMap):
            key = next((key for key in tree if str(key) == part), None)  # a key may be a number
            if key is None:
                break
            line = tree.lc.data[key][0] + 1 if key in (tree.lc.data or {}) else line
            tree = tree[key]
        elif isinstance(tree, CommentedSeq) and isinstance(part, int) and part < len(tree):
            line = tree.lc.data[part][0] + 1 if part in (tree.lc.data or {}) else line
            tree = tree[part]
        else:
            break
    return line


def describe_problems(error: ValidationError, plain: object, model: type[BaseModel]) -> list[Problem]:
    """pydantic's errors in the recipe's terms, each misspelt key with its nearest valid one."""
    # Options of a kind that does not exist, or whose package is broken, cannot be checked.
    unusable = [_real_path(d, plain) for d in error.errors() if d["type"] in (UNUSABLE, "union_tag_invalid")]
    unknown = [
        found
        for found in unknown_keys(plain, [model], ())
        if not any(found[0].path[: len(path)] == path for path in unusable)
    ]
    problems = [problem for problem, _ in unknown]
    # A key that is missing because it was misspelt is reported once, as the misspelling.
    meant = {(*problem.path[:-1], guess) for problem, guess in unknown if guess}
    covered = {problem.path for problem in problems}
    found: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for detail in error.errors():
        path, kind = _real_path(detail, plain), detail["type"]
        if kind == "extra_forbidden" and path in covered:
            continue
        if kind == "missing" and path in meant:
            continue
        if kind == "union_tag_not_found" and any(p[:-1] == path for p in covered):
            continue
        found.setdefault(path, []).append(detail)
    paths = [problem.path for problem in problems] + list(found)
    for path, details in found.items():
        # A problem further inside shows which member of a union was meant; problems of the others are dropped.
        deeper = any(len(other) > len(path) and other[: len(path)] == path for other in paths)
        if not (deeper and all(detail["type"].endswith("_type") for detail in details)):
            messages = dict.fromkeys(_message(detail) for detail in details)
            problems.append(Problem(path, "; or ".join(messages) + _given(details[0])))
    return problems


def unknown_keys(
    value: object, models: list[type[BaseModel]], path: tuple[str | int, ...]
) -> Iterator[tuple[Problem, str | None]]:
    """Keys that no candidate model has, with the nearest valid key."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from unknown_keys(item, models, (*path, number))
        return
    if not isinstance(value, dict) or not models:
        return
    candidates = _by_tag(value, models)
    known = {name: info for model in candidates for name, info in model.model_fields.items()}
    for key, child in value.items():
        if key in known:
            kinds = [model.model_fields[key].annotation for model in candidates if key in model.model_fields]
            below = [model for option in kinds for model in _models(option)]
            named = isinstance(child, dict) and any(
                get_origin(option) is dict for option in kinds
            )  # the user may choose keys freely
            for name, item in child.items() if named else [(None, child)]:
                yield from unknown_keys(item, below, (*path, key, name) if named else (*path, key))
            continue
        # A key of another kind is spelt correctly but does not belong here; list the valid ones in either case.
        near = nearest(key, known, value)
        hint = f"did you mean {near!r}?" if near else f"valid keys: {', '.join(sorted(known))}"
        yield Problem((*path, key), f"unknown key {key!r}; {hint}"), near


def _by_tag(value: dict[str, Any], models: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """The member of a tagged union that the value's tag (a Literal field) names; without one, all members."""
    for model in models:
        for name, info in model.model_fields.items():
            if get_origin(info.annotation) is Literal and value.get(name) in get_args(info.annotation):
                return [model]
    return models


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The model classes within a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _real_path(detail: ErrorDetails, plain: object) -> tuple[str | int, ...]:
    """pydantic's location without the tags and type names that it inserts for members of unions."""
    path: list[str | int] = []
    loc = detail["loc"]
    absent = detail["type"] in ("missing", "extra_forbidden")  # then the last part is a key that `plain` may not have
    for position, part in enumerate(loc):
        if isinstance(plain, dict) and part in plain:
            plain = plain[part]
        elif isinstance(plain, list) and isinstance(part, int) and part < len(plain):
            plain = plain[part]
        elif not (absent and position == len(loc) - 1):
            continue
        path.append(part)
    return tuple(path)


def _message(detail: ErrorDetails) -> str:
    given, context, kind = detail.get("input"), detail.get("ctx", {}), detail["type"]
    if kind == "missing":
        return "this key is required"
    if kind == "union_tag_not_found":
        return f"needs the key {context.get('discriminator')}"
    if kind == "union_tag_invalid":
        names = str(context.get("expected_tags"))
        return f"{context.get('tag')!r} is not one of {names}{_meant(context.get('tag'), names)}"
    if kind == "literal_error":
        names = str(context.get("expected", ""))
        return f"must be {names}{_meant(given, names)}"
    message = detail["msg"].removeprefix("Value error, ")
    return message[0].lower() + message[1:]


def _given(detail: ErrorDetails) -> str:
    """The given value, if it is a single one and the message does not contain it."""
    given = detail.get("input")
    if isinstance(given, (dict, list)) or detail["type"].startswith(("union_tag", "missing", UNUSABLE)):
        return ""
    return f" (it is {given!r})"


def _meant(given: object, names: str) -> str:
    """The nearest of the names that pydantic lists, as a question; nothing if none is near."""
    return did_you_mean(str(given), [part.strip().strip("'") for part in names.replace(" or ", ",").split(",")])

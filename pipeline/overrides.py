"""Applies `--set` KEY=VALUE to the tree of a recipe or of one of its sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq

from ..core.errors import UserError
from .stages import STAGES


def apply_override(
    tree: CommentedMap, override: str, origins: dict[tuple[Any, ...], str], option: str = "--set"
) -> None:
    """Put KEY=VALUE into a recipe's tree, in place, and record in `origins` which keys came from it."""
    given = f"{option} {override}"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"{given}: write it as key.path=value, such as --set prune.blocks=4")
    try:
        value = YAML(typ="safe").load(text) if text.strip() else None
    except Exception as error:  # as above
        raise UserError(f"{given}: the value is not valid YAML") from error
    _make_room(tree, parts[0])
    node: Any = tree
    for depth, part in enumerate(parts[:-1], start=1):
        child = _child(node, part)
        if isinstance(child, str):  # a shorthand such as `objective: asft`, about to get options
            child = CommentedMap({"kind": child})
        elif child is None:
            child = CommentedMap()
            origins[tuple(parts[:depth])] = given
        elif not isinstance(child, (CommentedMap, CommentedSeq, dict, list)):
            raise UserError(f"{given}: {'.'.join(parts[:depth])} is a value, not a section")
        _put(node, part, child, given)
        node = child
    _put(node, parts[-1], _from_here(value), given)
    origins[tuple(parts)] = given


def _make_room(tree: CommentedMap, stage: str) -> None:
    """Insert a new stage before the first stage that reads its output."""
    if stage in STAGES and stage not in tree:
        readers = [i for i, name in enumerate(tree) if name in STAGES and stage in STAGES[name].reads]
        tree.insert(min(readers, default=len(tree)), stage, None)


def _child(node: CommentedMap | CommentedSeq, part: str) -> Any:
    if isinstance(node, list):
        return node[int(part)] if part.isdigit() and int(part) < len(node) else None
    return node.get(part)


def _put(node: CommentedMap | CommentedSeq, part: str, value: object, given: str) -> None:
    if not isinstance(node, list):
        node[part] = value
    elif part.isdigit() and int(part) < len(node):
        node[int(part)] = value
    else:
        raise UserError(f"{given}: the list has no entry {part} (it has 0 to {len(node) - 1})")


def _from_here(value: object) -> Any:
    """Paths from the command line are relative to the current folder, not to the recipe's."""
    if isinstance(value, list):
        return [_from_here(item) for item in value]
    if isinstance(value, str) and ("/" in value or "." in value) and Path(value).exists():
        return str(Path(value).resolve())
    return value

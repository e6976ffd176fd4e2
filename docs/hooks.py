"""Tables of recipe keys, commands and JSON outputs, added to their pages from the code while the site is built.

mkdocs calls `on_page_markdown` (mkdocs.yml).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

OUTPUTS = ("plan", "validate", "recipes", "inspect", "eval", "bench", "fit")  # commands that take --json


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Add the tables to a page of the reference, whose file has only the text above them."""
    from compress.cli.main import app
    from compress.pipeline.outputs import output_schema
    from compress.pipeline.recipe import recipe_schema
    from typer.main import get_command

    tables: dict[str, Callable[[], str]] = {
        "reference/recipe.md": lambda: recipe_tables(recipe_schema()),
        "reference/cli.md": lambda: cli_tables(get_command(app)),
        "reference/json.md": lambda: json_tables({name: output_schema(name) for name in OUTPUTS}),
    }
    path = page.file.src_uri
    return f"{markdown.rstrip()}\n\n{tables[path]()}" if path in tables else markdown


# --- recipe keys -------------------------------------------------------------------------------------------------


def recipe_tables(schema: Mapping[str, Any]) -> str:
    """All recipe keys, from the JSON schema: a table per section, sections of sections below it."""
    page = _SchemaPage(schema["$defs"])
    lines = [*page.section("The recipe", schema, "", 2)]
    for name, node in schema["properties"].items():
        lines += page.nested(name, node, 2)
    return "\n".join(lines) + "\n"


class _SchemaPage:
    """Sections of a page; one that several keys share is written where it first occurs, and linked after that."""

    def __init__(self, definitions: Mapping[str, Any], defaults: bool = True):
        self.definitions = definitions
        self.defaults = defaults  # whether there is a column of defaults: for recipes, not for outputs
        self.written: set[str] = set()  # definitions that have their section
        self.anchors: dict[str, str] = {}  # definition -> the anchor of its section, by its first link

    def nested(self, path: str, node: Mapping[str, Any], level: int) -> Iterator[str]:
        """The sections that a key refers to, each followed by the sections of its own keys."""
        for name in self._sections(node):
            if name in self.written:
                continue
            definition = self.definitions[name]
            kind = _kind(definition)
            title = f"`{path}`" + (f" [{kind}]" if kind else "")
            self.written.add(name)
            anchor = self.anchors.setdefault(name, _anchor(path, kind))
            yield from self.section(f"{title} {{ #{anchor} }}", definition, path, level)
            for key, child in definition.get("properties", {}).items():
                yield from self.nested(f"{path}.{key}", child, min(level + 1, 4))

    def section(self, title: str, definition: Mapping[str, Any], path: str, level: int) -> Iterator[str]:
        yield from (f"{'#' * level} {title}", "")
        if definition.get("description"):
            yield from (_cell(definition["description"]), "")
        required = definition.get("required", [])
        rows = [
            (key, node)
            for key, node in definition.get("properties", {}).items()
            if not (key in ("kind", "source") and "const" in node)
        ]
        if not rows:
            yield from ("No keys of its own.", "")
            return
        head = ["key", "type", *["default"] * self.defaults, "meaning"]
        yield from (f"| {' | '.join(head)} |", "|---" * len(head) + "|")
        for key, node in rows:
            default = ["required" if key in required else _default(node)] * self.defaults
            meaning = _cell(node.get("description", "")) or self._meaning(node)
            yield f"| {' | '.join([f'`{key}`', self._type(node, f'{path}.{key}'.strip('.')), *default, meaning])} |"
        yield ""

    def _sections(self, node: Mapping[str, Any]) -> Iterator[str]:
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            if "properties" in self.definitions[name]:
                yield name
        for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            for option in node.get(key, []):
                yield from self._sections(option)
        for key in ("items", "additionalProperties"):
            if isinstance(node.get(key), Mapping):
                yield from self._sections(node[key])

    def _meaning(self, node: Mapping[str, Any]) -> str:
        sections = list(self._sections(node))
        return _cell(self.definitions[sections[0]].get("description", "")) if len(sections) == 1 else ""

    def _type(self, node: Mapping[str, Any], path: str) -> str:
        if "$ref" in node:
            name = node["$ref"].rpartition("/")[2]
            definition = self.definitions[name]
            if "properties" not in definition:
                return self._type(definition, path)
            kind = _kind(definition)
            return f"[{kind or 'section'}](#{self.anchors.setdefault(name, _anchor(path, kind))})"
        options = node.get("anyOf") or node.get("oneOf")
        if options:
            sections = any(True for _ in self._sections(node))  # kinds are linked: their names are not repeated
            types = [
                self._type(option, path)
                for option in options
                if option.get("type") != "null" and not (sections and "enum" in option)
            ]
            null = not self.defaults and any(option.get("type") == "null" for option in options)
            return " or ".join([*dict.fromkeys(types), *["null"] * null])
        if "enum" in node:
            return " or ".join(f"`{value}`" for value in node["enum"])
        if "const" in node:
            return f"`{node['const']}`"
        if node.get("type") == "array":
            items = node.get("items") or next(iter(node.get("prefixItems", [])), {})
            return f"list of {self._type(items, path)}" if items else "list"
        if node.get("type") == "object":
            return "mapping"
        names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
        return names.get(node.get("type", ""), "any value") + _limits(node)


def _anchor(path: str, kind: str) -> str:
    return "-".join(filter(None, [path.replace(".", "-").replace("_", "-"), kind.replace(".", "")]))


def _kind(definition: Mapping[str, Any]) -> str:
    properties = definition.get("properties", {})
    for key in ("kind", "source"):
        if "const" in properties.get(key, {}):
            return str(properties[key]["const"])
    return ""


def _limits(node: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {node[key]:g}" for key, sign in signs.items() if key in node]
    return f" ({', '.join(limits)})" if limits else ""


def _default(node: Mapping[str, Any]) -> str:
    if "default" not in node:
        return "its own defaults"
    value = node["default"]
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return f"`{value['kind']}`" if "kind" in value else "its own defaults"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- what commands print as JSON ---------------------------------------------------------------------------------


def json_tables(schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """What commands print with --json, from the same classes that print it."""
    lines: list[str] = []
    for name, schema in schemas.items():
        node = schema["items"] if schema.get("type") == "array" else schema
        lines += [f"## compress {name} --json {{ #{name} }}", ""]
        page = _SchemaPage(schema.get("$defs", {}), defaults=False)
        if node is not schema:
            lines += ["A list, each entry with these keys.", ""]
        if "properties" in node:
            lines += page.section("Keys", node, name, 3)
            for key, child in node["properties"].items():
                lines += page.nested(f"{name}.{key}", child, 3)
        else:
            lines += page.nested(name, node, 3)
    return "\n".join(lines) + "\n"


# --- command line ------------------------------------------------------------------------------------------------


def cli_tables(group: Any) -> str:
    """All commands, from typer's own description of them: what `--help` says, as tables."""
    lines: list[str] = []
    for name, command in group.commands.items():
        lines += _command(name, command)
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    parameters = [parameter for parameter in command.params if parameter.name != "help"]
    arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    usage = " ".join(f"{(a.metavar or a.name).upper()}{'…' if a.nargs == -1 else ''}" for a in arguments)
    yield from (f"## compress {name}", "")
    yield from (f"    compress {name} {usage} [OPTIONS]".replace("  [", " ["), "")
    yield from (str(command.help or "").strip(), "")
    if arguments or options:
        yield from ("| | default | |", "|---|---|---|")
        for parameter in [*arguments, *options]:
            yield _parameter(parameter)
        yield ""
    if command.epilog:
        example = command.epilog.removeprefix("Example: ")
        yield from ("Example:", "", f"    {example}", "")


def _parameter(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        label = f"`{(parameter.metavar or parameter.name).upper()}`"
    else:
        value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.upper()}"
        label = ", ".join(f"`{option}{value}`" for option in (*parameter.opts, *parameter.secondary_opts))
    if parameter.required:
        default = "required"
    elif parameter.default in (None, "", False, ()) or callable(parameter.default):
        default = "–"
    else:
        default = f"`{parameter.default}`"
    return f"| {label} | {default} | {_cell(getattr(parameter, 'help', None) or '')} |"

"""Pages that come from the code, written while the site is built: recipe keys, commands, JSON outputs.

mkdocs calls `on_files` (mkdocs.yml).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

OUTPUTS = ("plan", "validate", "recipes", "inspect", "eval", "bench", "fit")  # commands that take --json


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site's files."""
    from compress.cli.main import app
    from compress.pipeline.outputs import output_schema
    from compress.pipeline.recipe import recipe_schema
    from mkdocs.structure.files import File
    from typer.main import get_command

    files.append(File.generated(config, "reference/recipe.md", content=recipe_page(recipe_schema())))
    files.append(File.generated(config, "reference/cli.md", content=cli_page(get_command(app))))
    outputs = {name: output_schema(name) for name in OUTPUTS}
    files.append(File.generated(config, "reference/json.md", content=json_page(outputs)))
    return files


# --- recipe keys -------------------------------------------------------------------------------------------------


def recipe_page(schema: Mapping[str, Any]) -> str:
    """The page of all recipe keys, from the JSON schema: a table per section, sections of sections below it."""
    lines = [
        "# Recipe keys",
        "",
        "Every key of a recipe with its type, default and meaning, written from the schema that checks recipes. "
        "`compress schema` prints that schema for editors, `compress validate RECIPE` checks a file. "
        "Keys in `[ ]` after a section's name choose among its kinds; a kind's name alone stands for its defaults: "
        "`objective: asft` is `objective: {kind: asft}`.",
        "",
    ]
    page = _SchemaPage(schema["$defs"])
    lines += page.section("The recipe", schema, "", 2)
    for name, node in schema["properties"].items():
        lines += page.nested(name, node, 2)
    return "\n".join(lines) + "\n"


class _SchemaPage:
    """Sections of the page; one that several keys share is written where it is first met, and linked from then on."""

    def __init__(self, definitions: Mapping[str, Any], defaults: bool = True):
        self.definitions = definitions
        self.defaults = defaults  # a column of them: recipes have some, what commands print has none
        self.written: dict[str, str] = {}  # definition -> the anchor of its section

    def nested(self, path: str, node: Mapping[str, Any], level: int) -> Iterator[str]:
        """The sections behind a key, each followed by the sections of its own keys."""
        for name in self._sections(node):
            if name in self.written:
                continue
            definition = self.definitions[name]
            kind = _kind(definition)
            title = f"`{path}`" + (f" [{kind}]" if kind else "")
            self.written[name] = _anchor(path, kind)
            yield from self.section(f"{title} {{ #{self.written[name]} }}", definition, path, level)
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
            return f"[{kind or 'section'}](#{self.written.get(name) or _anchor(path, kind)})"
        options = node.get("anyOf") or node.get("oneOf")
        if options:
            sections = any(True for _ in self._sections(node))  # kinds: their names alone are not repeated
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


def json_page(schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of what commands print with --json, from the same classes that print it."""
    lines = [
        "# JSON outputs",
        "",
        "Commands with `--json` print one JSON document to standard output; progress and warnings go to standard "
        "error. `compress schema NAME` prints the JSON schema of each, and `compress schema` that of recipes. Other "
        "documents: [report.json](report.md), a bundle's [manifest.json](bundle.md).",
        "",
    ]
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


def cli_page(group: Any) -> str:
    """The page of all commands, from typer's own description of them: what `--help` says, as tables."""
    lines = [
        "# Command line",
        "",
        "What `compress COMMAND --help` says, for every command. Exit codes: 0 when all is well, 2 with one line that "
        "says what to mend, 130 after Ctrl-C.",
        "",
    ]
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

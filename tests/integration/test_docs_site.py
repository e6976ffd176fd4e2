"""The tables that docs/hooks.py adds: every recipe key, command and option is in them. CI builds the whole site."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import compress.api as api
import pytest
from compress.cli.main import app
from compress.pipeline.outputs import output_schema
from compress.pipeline.recipe import recipe_schema
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs/hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def keys(node: Mapping[str, Any]) -> Iterator[str]:
    for definition in [node, *node["$defs"].values()]:
        for key, value in definition.get("properties", {}).items():
            if not (key in ("kind", "source") and "const" in value):
                yield key


def test_every_key_of_a_recipe_has_a_row_and_every_link_a_section(hooks):
    schema = recipe_schema()
    page = hooks.recipe_tables(schema)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| (.*) \|$", page, re.M)
    assert {key for key, _, _ in rows} == set(keys(schema))
    assert len(rows) == sum(1 for _ in keys(schema))
    assert not set(re.findall(r"\]\(#([^)]+)\)", page)) - set(re.findall(r"\{ #(\S+) \}", page))


def test_every_command_and_option_is_on_the_page(hooks):
    group = get_command(app)
    page = hooks.cli_tables(group)
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        section = page.partition(f"## compress {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            label = parameter.name.upper() if parameter.param_type_name == "argument" else parameter.opts[0]
            assert f"`{label}" in section, f"{name} {label}"
            assert not getattr(parameter, "help", None) or parameter.help.split("|")[0].strip()[:40] in section


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs/reference/api.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: compress\.api\.(\w+)$", page, re.M)) == sorted(api.__all__)


def test_every_json_output_is_on_the_page(hooks):
    schemas = {name: output_schema(name) for name in hooks.OUTPUTS}
    page = hooks.json_tables(schemas)
    takes_json = {
        name
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
        if any("--json" in parameter.opts for parameter in command.params)
    }
    assert set(schemas) == takes_json
    for name, schema in schemas.items():
        section = page.partition(f"{{ #{name} }}\n")[2].partition("\n## ")[0]
        found = re.findall(r"^\| `(\w+)` \|", section, re.M)
        assert set(keys({"$defs": {}} | schema)) - {"kind"} == set(found) - {"kind"}, name
    assert not set(re.findall(r"\]\(#([^)]+)\)", page)) - set(re.findall(r"\{ #(\S+) \}", page))


def test_every_field_of_the_json_outputs_has_a_meaning(hooks):
    page = hooks.json_tables({name: output_schema(name) for name in hooks.OUTPUTS})
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (.*) \|$", page, re.M)
    assert len(rows) > 100 and not [key for key, meaning in rows if not meaning]
    for name in (*hooks.OUTPUTS, "report"):
        schema = output_schema(name)
        for definition in [schema, *schema.get("$defs", {}).values()]:
            for key, node in definition.get("properties", {}).items():
                assert "const" in node or node.get("description"), f"{name}: {definition.get('title')}.{key}"


def test_links_between_the_documents_work_without_the_site():
    pages = [*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target and not target.startswith("mailto:"):
                assert (page.parent / target).is_file(), f"{page.relative_to(ROOT)} links to {target}"
    written = {page.relative_to(ROOT / "docs").as_posix() for page in pages if page.is_relative_to(ROOT / "docs")}
    assert {"reference/recipe.md", "reference/cli.md", "reference/json.md"} <= written


def test_the_tables_are_added_below_the_text_of_their_pages(hooks):
    for name, expected in (("recipe", "| `prune` |"), ("cli", "## compress run"), ("json", "## compress plan --json")):
        text = (ROOT / f"docs/reference/{name}.md").read_text("utf-8")
        page = SimpleNamespace(file=SimpleNamespace(src_uri=f"reference/{name}.md"))
        built = hooks.on_page_markdown(text, page, None, None)
        assert built.startswith(text.rstrip()) and expected in built.removeprefix(text.rstrip())
    other = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    assert hooks.on_page_markdown("# Start", other, None, None) == "# Start"

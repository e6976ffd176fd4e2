"""The pages that docs/hooks.py writes: every recipe key, command and option is on them. CI builds the whole site."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
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
    page = hooks.recipe_page(schema)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| [^|]+ \| (.*) \|$", page, re.M)
    assert {key for key, _, _ in rows} == set(keys(schema))
    assert len(rows) == sum(1 for _ in keys(schema))
    assert not set(re.findall(r"\]\(#([^)]+)\)", page)) - set(re.findall(r"\{ #(\S+) \}", page))


def test_every_command_and_option_is_on_the_page(hooks):
    group = get_command(app)
    page = hooks.cli_page(group)
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
    page = hooks.json_page(schemas)
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

"""The JSON schema of recipes, as editors read it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from compress.pipeline.recipe import Recipe, recipe_schema, shipped
from ruamel.yaml import YAML

SHIPPED = shipped()


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a JSON value satisfies a JSON schema, as far as pydantic's vocabulary goes."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    kinds: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return False
    for name, count in (("anyOf", None), ("oneOf", 1)):
        if name in schema:
            hits = sum(accepts(option, value, root) for option in schema[name])
            if not hits or (count and hits != count):
                return False
    checks = [value in schema.get("enum", [value]), value == schema.get("const", value)]
    if isinstance(value, str):
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
    if isinstance(value, (int, float)) and kind in ("integer", "number"):
        checks += [value >= schema.get("minimum", value), value <= schema.get("maximum", value)]
        checks += [value > schema.get("exclusiveMinimum", value - 1), value < schema.get("exclusiveMaximum", value + 1)]
    if isinstance(value, list):
        checks += [accepts(schema.get("items", {}), item, root) for item in value]
    if isinstance(value, dict) and "properties" in schema:
        checks += [schema["additionalProperties"] is False and value.keys() <= schema["properties"].keys()]
        checks += [set(schema.get("required", [])) <= value.keys()]
        checks += [accepts(schema["properties"].get(key, {}), item, root) for key, item in value.items()]
    return all(checks)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_accepts_the_shipped_recipes(name):
    schema = json.loads(json.dumps(recipe_schema()))
    recipe = YAML(typ="safe").load(SHIPPED[name])
    assert accepts(schema, recipe, schema)
    assert not accepts(schema, recipe | {"prunne": {}}, schema)
    assert not accepts(schema, recipe | {"prune": {"blocks": "2"}}, schema)
    learns, key, wrong = next(
        entry
        for entry in (("distill", "objective", "asfd"), ("sort", "objective", "asfd"), ("retain", "steps", "many"))
        if entry[0] in recipe
    )
    assert not accepts(schema, recipe | {learns: recipe[learns] | {key: wrong}}, schema)


def test_the_schema_takes_sizes_for_types():
    schema = json.loads(json.dumps(recipe_schema()))
    start = {"name": "x", "model": "random:llama"}
    for good in (["Q8_0", "80MB", {"size": "1.5GB"}, {"bits": 4.3}], {"size": 80_000_000}, ["4.3bits"]):
        assert accepts(schema, start | {"export": {"gguf": good}}, schema), good
    for bad in (["Q9_0"], ["80"], [{"bits": 0}], [{"bits": "4"}], {"bytes": 3}, {"size": "big"}):
        assert not accepts(schema, start | {"export": {"gguf": bad}}, schema), bad


@pytest.mark.parametrize("key", ["prune.heal", "prune.search", "distill.objective", "distill.tune", "distill.teacher"])
def test_the_schema_knows_the_shorthands_that_the_recipe_takes(key):
    schema = recipe_schema()
    section, name = key.split(".")
    node = schema["$defs"][{"prune": "PruneConfig", "distill": "DistillConfig"}[section]]["properties"][name]
    (names,) = [option["enum"] for option in node["anyOf"] if "enum" in option]
    assert names
    for kind in names:
        overrides = ["data.teacher.top_k=8", f"{key}={kind}"]  # without a written teacher none can be read
        assert getattr(Recipe.load("tiny_random", overrides).section(section), name).kind == kind

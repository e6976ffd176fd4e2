"""Recipes: every wrong key, type and value is named with its place; overrides."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compress.core.errors import UserError
from compress.pipeline.recipe import Recipe, shipped
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

SHIPPED = shipped()
SMALL = "name: x\nmodel: random:llama\n"
VARIANTS = """data: {source: magpie}
distill:
  variants:
  - {name: a, seed: 1}
  - {name: b, rows: [0, 0.5]}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> str:
        file = tmp_path / "r.yaml"
        file.write_text(text)
        return str(file)

    return write


def problems(recipe: str, *overrides: str) -> list[str]:
    """The lines of the refusal, without the headline."""
    with pytest.raises(UserError) as caught:
        Recipe.load(recipe, overrides)
    headline, *lines = str(caught.value).splitlines()
    assert re.search(r"has (1 problem|\d+ problems):$", headline)
    assert len(lines) == (1 if "1 problem:" in headline else int(re.findall(r"\d+", headline)[-1]))
    return [line.strip() for line in lines]


def keys(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int, int]]:
    """(key path, line, column), counted from 0, of every key of a recipe, nested ones included."""
    if isinstance(node, CommentedMap):
        for key, value in node.items():
            yield (*path, key), *node.lc.key(key)
            yield from keys(value, (*path, key))
    elif isinstance(node, list):
        for number, item in enumerate(node):
            yield from keys(item, (*path, str(number)))


def every_key() -> list[Any]:
    return [
        pytest.param(file, path, line, column, id=f"{name}-{'.'.join(path)}")
        for name, file in SHIPPED.items()
        for path, line, column in keys(YAML().load(file.read_text(encoding="utf-8")))
        if path[:2] != ("merge", "parameters")  # mergekit's own; refused once its registry is read (test_merge.py)
    ]


def test_the_shipped_recipes_are_valid():
    own = {"smollm2_135m_24L", "smollm2_135m_sorted", "smollm2_135m_locret", "tiny_random"}
    assert set(SHIPPED) == own | {"llama8b_26L", "llama70b_64L"}
    assert len(every_key()) > 60
    for name in SHIPPED:
        loaded = Recipe.load(name)
        learns = {
            "llama8b_26L": ("prune", "distill", "merge"),
            "smollm2_135m_sorted": ("prune", "sort"),
            "smollm2_135m_locret": ("retain",),
        }.get(name, ("prune", "distill"))
        assert loaded.order == ("data", *learns, "export", "evaluate")
        assert Recipe.load(f"{name}.yaml") == Recipe.load(str(loaded.path)) == loaded


@pytest.mark.parametrize("misspell", [lambda k: k + k[-1], lambda k: k[0] + "x" + k[1:]], ids=["doubled", "inserted"])
@pytest.mark.parametrize(("file", "path", "line", "column"), every_key())
def test_every_misspelt_key_is_named(write, file, path, line, column, misspell):
    key, wrong = path[-1], misspell(path[-1])
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[line][column:].startswith(key)
    lines[line] = lines[line][:column] + wrong + lines[line][column + len(key) :]
    recipe = write("\n".join(lines))
    where = ".".join((*path[:-1], wrong))
    expected = f"{recipe}:{line + 1}: {where}: unknown key {wrong!r}; did you mean {key!r}?"
    found = problems(recipe)
    assert expected in found
    # A section that is gone because it was misspelt may be missed by a later stage; nothing else is reported.
    assert [f for f in found if f != expected and "needs a stage" not in f] == []


def test_all_problems_are_reported_at_once(write):
    recipe = write(
        "name: ''\nmodell: random:llama\nseed: -1\nprune:\n  block: 2\n  heal: {kind: linear, ridge: []}\n"
        "  calibration: {tokens: many}\nexport: {gguf: [Q5_X]}\n"
    )
    found = problems(recipe)
    assert [line.removeprefix(recipe).split(": ")[:2] for line in found] == [
        [":2", "modell"],
        [":5", "prune.block"],
        [":1", "name"],
        [":3", "seed"],
        [":6", "prune.heal.ridge"],
        [":7", "prune.calibration.tokens"],
        [":8", "export.gguf.0"],
    ]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("prune: {blocks: '2'}", 3, "prune.blocks: input should be a valid integer; or must be 'auto' (it is '2')"),
        ("prune: {blocks: 2.5}", 3, "prune.blocks: input should be a valid integer"),
        ("prune: {blocks: true}", 3, "prune.blocks: input should be a valid integer; or must be 'auto' (it is True)"),
        (
            "prune: {blocks: -1}",
            3,
            "prune.blocks: input should be greater than or equal to 0; or must be 'auto' (it is -1)",
        ),
        ("prune: {}", 3, "prune.blocks: this key is required"),
        ("prune: 3", 3, "prune: input should be an object (it is 3)"),
        (
            "prune:\n  blocks: 1\n  search: windows",
            5,
            "'windows' is not one of 'window', 'lowest', 'greedy', 'beam'; did you mean 'window'?",
        ),
        (
            "prune:\n  blocks: 1\n  heal: linnear",
            5,
            "prune.heal: 'linnear' is not one of 'none', 'linear', 'cosine', 'patch', 'refit'; did you mean 'linear'?",
        ),
        ("prune:\n  blocks: 1\n  heal: {ridge: [1]}", 5, "prune.heal: needs the key 'kind'"),
        ("prune:\n  blocks: 1\n  heal: {kind: none, ridge: [1]}", 5, "prune.heal.ridge: unknown key 'ridge'"),
        ("data: {source: magic}", 3, "data: 'magic' is not one of 'magpie', 'texts', 'dataset'"),
        ("data:\n  source: magpie\n  path: x.jsonl", 5, "data.path: unknown key 'path'"),
        ("data: {source: dataset, path: x, text: t, messages: m}", 3, "data: give only one of: prompt and response"),
        ("export: {}", 3, "export: name at least one type under gguf or onnx"),
        ("export: {gguf: [F16, F16]}", 3, "lists a type twice"),
        ("export:\n  gguf:\n  - F16\n  - q8_0", 6, "export.gguf.1: must be 'F16', 'BF16', 'Q8_0'"),
        (
            "export:\n  gguf:\n  - F16\n  - IQ2_XS",
            6,
            "export.gguf.1: IQ2_XS needs an importance matrix, and",
        ),
        ("export: {gguf: [F16], imatrix: true}", 3, "export.imatrix: is true, but there are no rows"),
        ("distill: {}", 3, "distill: the stage distill needs a stage data before it"),
        ("prune: {blocks: 1}\ndata: {source: magpie}", 3, "reads the output of data, so data must come before it"),
        ("data: {source: texts}\ndistill: {teacher: cached}", 4, "distill.teacher: cached reads predictions"),
        ("data: {source: texts}\ndistill: {teacher: shared, tune: full}", 4, "teacher: shared needs LoRA"),
        ("seed: null", 3, "seed: input should be a valid integer (it is None)"),
        ("polish: {method: slerp}", 3, "polish: unknown key 'polish'"),
        ("7: seven", 3, "7: unknown key '7'"),
        ("data: {source: magpie}\nmerge: {method: slerp}", 4, "merge: the stage merge needs a stage distill before it"),
        ("data: {source: magpie}\ndistill: {}\nmerge: {method: slerp}", 5, "merge: it needs distill.variants: two or"),
        (VARIANTS + "merge: {method: slerp, base_model: b1}", 8, "no variant is named 'b1'; did you mean 'b'"),
        (VARIANTS + "merge:\n  method: ties\n  models:\n  - model: a\n  - model: sta", 12, "did you mean 'start'"),
        (
            VARIANTS + "merge: {method: slerp, parameters: {t: {value: 1, fitler: mlp}}}",
            8,
            "unknown key 'fitler'; did you mean 'filter'?",
        ),
        (VARIANTS + "merge: {metod: slerp}", 8, "merge.metod: unknown key 'metod'; did you mean 'method'?"),
        (VARIANTS.replace("rows", "row"), 7, "distill.variants.1.row: unknown key 'row'; did you mean 'rows'?"),
        (VARIANTS.replace("name: b", "name: a"), 5, "distill.variants: two variants are named 'a'"),
    ],
)
def test_wrong_types_and_values(write, text, line, message):
    recipe = write(SMALL + text)
    (found,) = problems(recipe)
    assert found.startswith(f"{recipe}:{line}: ")
    assert message in found


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (SMALL + "name: y\n", 3, "duplicate key"),
        (SMALL + "prune:\n  blocks: 1\n  blocks: 2\n", 5, "duplicate key"),
        ("name: [x\nmodel: y\n", 2, "expected ',' or ']'"),
        ("name: x\n\tmodel: y\n", 2, "cannot start any token"),
        ("- name\n", None, "a recipe is a mapping"),
        ("just text\n", None, "a recipe is a mapping"),
        ("", None, "a recipe is a mapping"),
        (SMALL + "---\nname: y\n", 3, "expected a single document"),
        (SMALL + "data: *nothing\n", 3, "nothing"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_line(write, text, line, message):
    recipe = write(text)
    with pytest.raises(UserError) as caught:
        Recipe.load(recipe)
    assert message in str(caught.value)
    assert f"{recipe}:{line}:" in str(caught.value) if line else recipe in str(caught.value)


@pytest.mark.parametrize("name", [".", "..", "a/b", "", "-x", "a b", "ü"])
def test_names_that_are_no_folder_names_are_refused(write, name):
    assert ":1: name: " in problems(write(f"name: {name!r}\nmodel: random:llama\n"))[0]


def test_a_missing_recipe_lists_the_shipped_ones(tmp_path):
    with pytest.raises(
        UserError,
        match=r"'tiny' does not exist.*llama8b_26L, smollm2_135m_24L, smollm2_135m_locret, smollm2_135m_sorted, tiny",
    ):
        Recipe.load("tiny")
    with pytest.raises(UserError, match="is a folder"):
        Recipe.load(str(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.yaml is not UTF-8 text: its byte order mark says UTF-16"):
        Recipe.load(str(tmp_path / "b.yaml"))


def test_overrides_are_yaml_and_reach_every_depth(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    sets = ["seed=9", "prune.heal.ridge=[0.1, 2]", "distill.objective.kl_weight=0.5", "evaluate.speed=null"]
    sets += ["export.gguf.0=F16", "data.topics=['a b', c]"]
    sets += ["prune.calibration={tokens: 64, text: text.txt}", "evaluate.tokens=64", "evaluate.tokens=128"]
    loaded = Recipe.load("tiny_random", sets)
    recipe: Any = loaded
    assert (recipe.seed, recipe.prune.heal.ridge, recipe.evaluate.speed) == (9, [0.1, 2], None)
    assert (recipe.distill.objective.kind, recipe.distill.objective.kl_weight) == ("asft", 0.5)  # from the shorthand
    assert (recipe.export.gguf, recipe.data.topics, recipe.evaluate.tokens) == (["F16"], ["a b", "c"], 128)
    assert all(f"# --set {override}" in loaded.text for override in sets)
    top = Recipe.load("tiny_random", ["evaluate.text=./text.txt"])  # where it was typed, not beside the recipe
    assert top.evaluate is not None and top.evaluate.text == str(tmp_path / "text.txt")


def test_an_override_adds_and_removes_stages(write):
    recipe = write(SMALL)
    assert Recipe.load(recipe, ["prune.blocks=2", "prune.heal=none"]).order == ("prune",)
    assert Recipe.load("tiny_random", ["export=null"]).order == ("data", "prune", "distill", "evaluate")
    added = Recipe.load("tiny_random", ["retain.steps=8", "export=null"])  # before what reads it
    assert added.order == ("data", "prune", "distill", "retain", "evaluate")
    assert Recipe.load(recipe, ["evaluate={}", "retain={}", "data={source: magpie}"]).order == (
        "data",
        "retain",
        "evaluate",
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.block=2", "prune.block: unknown key 'block'; did you mean "),
        ("prunne.blocks=2", "prunne: unknown key 'prunne'"),
        ("nonsense={a: 1}", "nonsense: unknown key 'nonsense'; valid keys: data, distill"),
        ("distill.objective.kl_wait=1", "unknown key 'kl_wait'; did you mean 'kl_weight'?"),
        ("prune.blocks=many", "prune.blocks: input should be a valid integer; or must be 'auto' (it is 'many')"),
        ("export.gguf=[F16, F15]", "export.gguf.1: must be"),
        ("model=5", "model: input should be a valid string; or input should be an object (it is 5)"),
        ("model={source: 5}", "model.source: input should be a valid string (it is 5)"),
        ("distill.tune.targets=5", "input should be a valid array; or must be 'all-linear' (it is 5)"),
        ("data=null", "the stage distill needs a stage data before it"),
    ],
)
def test_wrong_overrides_are_named_like_wrong_keys(override, message):
    found = problems("tiny_random", override)
    assert len(found) == 1
    assert message in found[0]
    if "needs a stage" not in message:
        assert found[0].startswith(f"--set {override}: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.blocks", "write it as key.path=value"),
        ("=4", "write it as key.path=value"),
        ("prune..blocks=4", "write it as key.path=value"),
        ("prune.blocks=[1", "not valid YAML"),
        ("seed.x=1", "seed is a value, not a section"),
        ("export.gguf.7=F16", "has no entry 7"),
        ("export.gguf.7.x=1", "has no entry 7"),
        ("export.gguf.first=F16", "has no entry first"),
    ],
)
def test_malformed_overrides(override, message):
    with pytest.raises(UserError) as caught:
        Recipe.load("tiny_random", [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert message in str(caught.value)


def test_validating_reads_no_model_and_no_torch(write):
    recipe = write("name: x\nmodel: ./not-there.gguf\nprune: {blocks: 2}\n")
    code = (
        "import sys\nfrom compress.cli.main import app\n"
        f"app(['validate', {recipe!r}], standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{recipe}: valid; stages: prune\n"

"""The layout and its import rules, read from the sources (docs/explanation/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import compress
import pytest

ROOT = Path(str(compress.__file__)).parent
NO_CODE = {"tests", "benchmarks", "docs", "build", "runs", "dist", "node_modules"}
FOREIGN = {"optimum.commands.register": "cli/optimum"}  # a namespace of another package to which we add a file
# Rooms from the ground up: each may import from those before it. Stages stand side by side.
GROUND = ("core", "kv", "records", "modeling", "runtime", "data", "training")
STAGES = ("prune", "distill", "merge", "sort", "retain", "export", "evaluation")
TOP = ("pipeline", "fit", "api", "cli", "__main__")
MAY_IMPORT = {
    **{room: set(GROUND[:number]) for number, room in enumerate(GROUND)},
    **{stage: set(GROUND) for stage in STAGES},
    **{room: {*GROUND, *STAGES, "recipes", *TOP[:number]} for number, room in enumerate(TOP)},
    # Weights that are trained rounded are rounded as export does it: one door.
    "distill": {*GROUND, "export.rounding"},
    # Rivals of artifacts are made as export makes artifacts: one door, and what it costs.
    "evaluation": {*GROUND, "export.rivals", "export.cost"},
    # Runs where torch is not installed: of modeling it takes what a configuration says, which needs none.
    "runtime": {"core", "records", "kv", "modeling.families", "modeling.shape"},
    "recipes": set(),
    "__init__": set(),
}
LINES = 450


def sources() -> list[Path]:
    """Every Python file of the package, tests and benchmarks left out."""
    found = []
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).parts
        if "/".join(parts[:-1]) in FOREIGN.values():
            continue
        if not any(part.startswith(".") or part in NO_CODE or part.endswith(".egg-info") for part in parts):
            found.append(file)
    return found


def area(file: Path) -> str:
    """prune/heal.py → prune; __main__.py → __main__."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, wherever it stands in the file."""
    package = ["compress", *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = [*start, *(node.module or "").split(".")] if node.module else start
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def breaches(file: Path) -> list[str]:
    """Imports of our own that the rules do not allow."""
    own = area(file)
    allowed = MAY_IMPORT.get(own)
    assert allowed is not None, f"{file}: the rules do not know the package {own!r}"
    found = []
    for line, name in imports(file):
        parts = name.split(".")
        if parts[0] == "compress" and not {parts[1], ".".join(parts[1:3])} & (allowed | {own, "__version__"}):
            found.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    return found


def test_there_is_something_to_read():
    areas = {area(file) for file in sources()}
    assert {"pipeline", "modeling", "data", "prune", "distill", "merge", "export", "runtime", "evaluation"} <= areas


def test_imports_run_one_way():
    assert [breach for file in sources() for breach in breaches(file)] == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("prune/x.py", "from ..distill.variants import choose"),
        ("modeling/x.py", "from ..data import rows"),
        ("runtime/x.py", "def f():\n    from ..modeling.load import resolve"),
        ("kv/x.py", "from ..modeling.blocks import Decoder"),
        ("data/x.py", "from ..pipeline.store import lock"),
        ("evaluation/x.py", "from .. import export"),
        ("sort/x.py", "from ..distill.stage import run"),
        ("training/x.py", "from ..sort.config import SortConfig"),
        ("pipeline/x.py", "from ..cli.main import main"),
        ("pipeline/x.py", "from ..fit.run import fit"),
        ("fit/x.py", "from ..cli.main import main"),
    ],
)
def test_the_rules_notice_a_breach(tmp_path, monkeypatch, place, line):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / place
    file.parent.mkdir()
    file.write_text(line)
    assert len(breaches(file)) == 1


def test_imports_inside_the_package_are_relative():
    """So that pyright follows them, and the folder's name does not matter."""
    found = [
        f"{file}:{node.lineno}"
        for file in sources()
        for node in ast.walk(tree(file))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "compress" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "compress")
    ]
    assert found == []


def test_no_two_public_classes_share_a_name():
    found: dict[str, list[str]] = {}
    for file in sources():
        for node in tree(file).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    twice = {name: files for name, files in found.items() if len(files) > 1}
    assert not twice


def untyped(source: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """(line, name, whether it is Any and nothing else) of every annotated parameter."""
    for node in ast.walk(source):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            for parameter in every:
                if parameter is not None and parameter.annotation is not None:
                    yield parameter.lineno, parameter.arg, ast.unparse(parameter.annotation) == "Any"


def test_hardly_any_parameter_is_any():
    """Any is for objects of other packages that have no type: less than 2 % of the annotated parameters."""
    found = [(file, *entry) for file in sources() for entry in untyped(tree(file))]
    loose = [f"{file.relative_to(ROOT)}:{line} {name}" for file, line, name, is_any in found if is_any]
    assert len(found) > 3000 and len(loose) < 0.02 * len(found), loose


def test_the_count_of_any_sees_every_parameter():
    source = ast.parse("def f(a: Any, b: int, /, c, *d: Any, e: list[Any], **g: Any): pass")
    assert [is_any for _, _, is_any in untyped(source)] == [True, False, False, True, True]


def test_no_folder_shadows_a_library():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not folders & {"evaluate", "datasets"}


def dangers(source: ast.Module) -> Iterator[tuple[int, str]]:
    """Ways to run code that came with a file or an argument."""
    for node in ast.walk(source):
        if isinstance(node, ast.keyword):
            value = node.value.value if isinstance(node.value, ast.Constant) else ...
            if node.arg in ("trust_remote_code", "shell", "allow_pickle") and value is not False:
                yield node.value.lineno, str(node.arg)
            if node.arg == "weights_only" and value is not True:
                yield node.value.lineno, "weights_only"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in {("os", "system"), ("os", "popen"), ("torch", "load")}:
                yield node.lineno, f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            yield node.lineno, node.func.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, n) for n in names if n.split(".")[0] in ("pickle", "cPickle", "dill", "marshal"))


def test_nothing_runs_code_from_data():
    found = [f"{file}:{line} {what}" for file in sources() for line, what in dangers(tree(file))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "subprocess.run(c, shell=True)",
        "import os\nos.system('x')",
        "from pickle import load",
        "import torch\ntorch.load(p)",
        "eval('1')",
    ],
)
def test_the_search_for_dangers_finds_them(text):
    assert list(dangers(ast.parse(text)))


def alone(source: ast.Module) -> Iterator[tuple[int, str]]:
    """JSON files read or written, and likeness of names, in other ways than core has them."""
    for node in ast.walk(source):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from ((node.lineno, "difflib") for name in names if name == "difflib")
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        inner = {
            n.func.attr
            for a in node.args
            for n in ast.walk(a)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        }
        if node.func.attr in ("loads", "load") and inner & {"read_text", "read_bytes", "open"}:
            yield node.lineno, "reads JSON"
        if node.func.attr in ("write_text", "write_bytes") and "dumps" in inner:
            yield node.lineno, "writes JSON"


def test_files_of_json_and_likeness_of_names_have_one_place():
    found = [f"{file.relative_to(ROOT)}:{line} {what}" for file in sources() for line, what in alone(tree(file))]
    assert [breach for breach in found if not breach.startswith(("core/files.py", "core/suggest.py"))] == []


@pytest.mark.parametrize(
    "text",
    ["import difflib", "from difflib import ndiff", "json.loads(f.read_text())", "f.write_text(json.dumps(1) + 'x')"],
)
def test_what_is_done_in_another_place_is_noticed(text):
    assert list(alone(ast.parse(text)))


def test_pyproject_lists_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {file.parent for file in sources()}
    existing = {".".join(["compress", *folder.relative_to(ROOT).parts]) for folder in folders}
    assert sorted(settings["packages"]) == sorted(existing | FOREIGN.keys())
    assert all((folder / "__init__.py").exists() for folder in folders)
    assert settings["package-dir"] == {"compress": "."} | FOREIGN
    assert not any((ROOT / folder / "__init__.py").exists() for folder in FOREIGN.values())


def test_every_data_file_is_package_data():
    """A template or a recipe that pyproject does not name would be missing from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    shipped = {
        file
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")[1:]).glob(pattern)
    }
    folders = {file.parent for file in sources()} - {ROOT}
    data = {
        file
        for folder in [*folders, ROOT / "recipes" / "configs"]
        for file in folder.iterdir()
        if file.is_file() and file.suffix in (".yaml", ".json", ".j2", ".css", ".js", ".jinja", ".txt")
    }
    assert data | {ROOT / "py.typed"} == shipped  # which tells type checkers that our types are meant for users, too


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_files_are_short_and_say_what_they_are(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LINES
    assert ast.get_docstring(tree(file)), "a module begins with what it is for"


def test_recipes_plans_and_command_line_load_without_torch():
    """Finding out that nothing is to be done costs no torch, nor does what a stage says of itself."""
    light = [f for f in sources() if f.name in ("config.py", "cost.py") or area(f) == "core"]
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in light]
    assert {f"{stage}.cost" for stage in (*STAGES, "data", "training")} <= set(modules)
    names = [*modules, "pipeline.recipe", "pipeline.plan", "pipeline.runner", "cli.main", "pipeline.summary"]
    assert len(names) > 8
    code = (
        "import importlib, sys\n"
        f"for name in {names}:\n"
        "    importlib.import_module('compress.' + name)\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'onnx', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_runtime_loads_without_torch_and_transformers():
    names = [
        ".".join(f.relative_to(ROOT).with_suffix("").parts)
        for room in ("kv", "runtime")
        for f in (ROOT / room).rglob("*.py")
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {sorted(names)}:\n"
        "    importlib.import_module('compress.' + name.removesuffix('.__init__'))\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules), name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

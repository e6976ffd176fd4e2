"""The typed recipe: reading, checking and overriding it. No weights are read, torch is not imported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError

from ..core.errors import UserError
from ..core.files import read_text
from ..core.stage import Section
from ..data.config import DataConfig
from ..distill.config import DistillConfig
from ..evaluation.config import EvaluateConfig
from ..export.config import ExportConfig
from ..merge.config import MergeConfig
from ..prune.config import PruneConfig
from ..retain.config import RetainConfig
from ..sort.config import SortConfig
from ..training.config import needs_teacher
from .explain import one_line
from .places import LONGEST_NAME, NAME
from .problems import Problem, describe_problems
from .stages import STAGES


class ModelSpec(Section):
    """A model source with what cannot be written in one string."""

    source: str = Field(description="Hub id, folder, .gguf file, package:NAME/FILE or random:FAMILY")
    config: str | None = Field(
        None,
        description="a local config.json with the model's shape, for `compress plan` where the Hub is out of reach",
    )


class Recipe(Section):
    """A whole pipeline: what is done to which model. Stages run in the order in which the file has them."""

    name: str = Field(pattern=NAME, max_length=LONGEST_NAME, description="names the run's folder and the artifacts")
    model: str | ModelSpec = Field(description="Hub id, folder, .gguf file, package:NAME/FILE or random:FAMILY")
    seed: int = Field(0, ge=0, description="every random draw of the run derives from it")
    data: DataConfig | None = Field(None, description="rows to calibrate on, learn from and measure with")
    prune: PruneConfig | None = Field(None, description="which blocks go and how the gap is healed")
    distill: DistillConfig | None = Field(None, description="recovery by learning from the unpruned model")
    merge: MergeConfig | None = Field(None, description="the recovered variants become one model")
    sort: SortConfig | None = Field(None, description="one set of weights learns to run at several depths")
    retain: RetainConfig | None = Field(None, description="heads that say which keys and values to keep")
    export: ExportConfig | None = Field(None, description="GGUF and ONNX artifacts in one bundle")
    evaluate: EvaluateConfig | None = Field(None, description="measurements for the report")

    @field_validator("name")
    @classmethod
    def _no_dots_only(cls, value: str) -> str:
        if set(value) == {"."}:
            raise ValueError("a name needs a letter or a digit")
        return value


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe. Where a section has a `kind`, that word alone is short for it."""
    schema = Recipe.model_json_schema()
    for section in schema["$defs"].values():
        for name, node in section.get("properties", {}).items():
            kinds = _kinds(node, schema["$defs"])
            if kinds:
                section["properties"][name] = {"anyOf": [{"type": "string", "enum": kinds}, node]}
    return schema


def _kinds(node: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """The names of the kinds that a schema node chooses from; none if it chooses from nothing."""
    for option in node.get("anyOf", []):  # of a key that may be left out
        if "$ref" not in option and (kinds := _kinds(option, definitions)):
            return kinds
    if node.get("discriminator", {}).get("propertyName") == "kind":
        return sorted(node["discriminator"]["mapping"])
    kind = definitions.get(node.get("$ref", "").rpartition("/")[2], {}).get("properties", {}).get("kind", {})
    return [kind["const"]] if "const" in kind else []


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe with where it came from."""

    recipe: Recipe
    path: Path
    order: tuple[str, ...]  # the stages in the file, in its order
    text: str  # the file's text, with overrides as comments at the end
    overrides: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def source(self) -> str:
        model = self.recipe.model
        return model if isinstance(model, str) else model.source

    def section(self, stage: str) -> Any:
        return getattr(self.recipe, stage)


def shipped() -> dict[str, Path]:
    """The recipes in the package, by name."""
    folder = Path(str(files("compress.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(text: str) -> Path:
    """The file of a recipe given by path or by the name of a shipped one."""
    path = Path(text).expanduser()
    if path.is_file():
        return path.resolve()
    known = shipped()
    name = text.removesuffix(".yaml")
    if name in known:
        return known[name]
    if path.is_dir():
        raise UserError(f"{text} is a folder; give a recipe file (.yaml) or one of: {', '.join(known)}")
    raise UserError(f"no recipe file {text!r}, and no shipped recipe of that name; shipped: {', '.join(known)}")


def load_recipe(text: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and check a recipe; all problems are reported at once in one `UserError`."""
    path = find_recipe(text)
    content = read_text(path)
    tree = _parse(path, content)
    origins: dict[tuple[Any, ...], str] = {}
    for override in overrides:
        apply_override(tree, override, origins)
    plain = _plain(tree)
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        # JSON mode, strict: "6" is no number and true no count, but a YAML list may fill a tuple.
        recipe = Recipe.model_validate_json(json.dumps(plain, default=str), strict=True)
    except ValidationError as error:
        problems = describe_problems(error, plain, Recipe)
    order = tuple(name for name in plain if name in STAGES and plain[name] is not None)
    problems += _order_problems(order) + _teacher_problems(recipe) + _retain_problems(recipe)
    if recipe is not None and recipe.merge is not None:
        names = [variant.name for variant in (recipe.distill and recipe.distill.variants) or []]
        problems += _merge_problems(recipe.merge, names, "distill" in order)
        recipe = recipe.model_copy(update={"merge": recipe.merge.among(names)})
    if problems or recipe is None:
        lines = [problem.render(str(path), tree, origins) for problem in problems]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError(f"{path.name} has {count}:\n" + "\n".join(f"  {line}" for line in lines))
    noted = content + "".join(f"# --set {override}\n" for override in overrides)
    return LoadedRecipe(recipe, path, order, noted, tuple(overrides))


def _parse(path: Path, content: str) -> CommentedMap:
    try:
        tree = YAML(typ="rt").load(content)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        parts = [" ".join(part.split()) for part in (error.context, error.problem) if part]
        raise UserError(f"{place}: {', '.join(parts) or 'not valid YAML'}") from error
    except Exception as error:  # the parser has errors of every kind for what it does not expect
        raise UserError(f"{path}: not valid YAML: {one_line(str(error))}") from error
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}: a recipe is a mapping of keys such as name, model, prune")
    return tree


def apply_override(tree: CommentedMap, override: str, origins: dict[tuple[Any, ...], str]) -> None:
    """Put KEY=VALUE into a recipe's tree in place, and note in `origins` which keys came from it."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: write it as key.path=value, such as --set prune.blocks=4")
    try:
        value = YAML(typ="safe").load(text) if text.strip() else None
    except Exception as error:  # as above
        raise UserError(f"--set {override}: the value is not valid YAML") from error
    _make_room(tree, parts[0])
    node: Any = tree
    for depth, part in enumerate(parts[:-1], start=1):
        child = _child(node, part)
        if isinstance(child, str):  # a shorthand such as `objective: asft`, about to get options
            child = CommentedMap({"kind": child})
        elif child is None:
            child = CommentedMap()
            origins[tuple(parts[:depth])] = f"--set {override}"
        elif not isinstance(child, (CommentedMap, CommentedSeq, dict, list)):
            raise UserError(f"--set {override}: {'.'.join(parts[:depth])} is a value, not a section")
        _put(node, part, child, override)
        node = child
    _put(node, parts[-1], _from_here(value), override)
    origins[tuple(parts)] = f"--set {override}"


def _make_room(tree: CommentedMap, stage: str) -> None:
    """A stage that the recipe does not have gets its place before the first stage that reads what it makes."""
    if stage in STAGES and stage not in tree:
        readers = [i for i, name in enumerate(tree) if name in STAGES and stage in STAGES[name].reads]
        tree.insert(min(readers, default=len(tree)), stage, None)


def _child(node: Any, part: str) -> Any:
    if isinstance(node, list):
        return node[int(part)] if part.isdigit() and int(part) < len(node) else None
    return node.get(part)


def _put(node: Any, part: str, value: Any, override: str) -> None:
    if not isinstance(node, list):
        node[part] = value
    elif part.isdigit() and int(part) < len(node):
        node[int(part)] = value
    else:
        raise UserError(f"--set {override}: the list has no entry {part} (it has 0 to {len(node) - 1})")


def _from_here(value: Any) -> Any:
    """Paths typed on the command line are relative to where it was typed, not to the recipe."""
    if isinstance(value, list):
        return [_from_here(item) for item in value]
    if isinstance(value, str) and ("/" in value or "." in value) and Path(value).exists():
        return str(Path(value).resolve())
    return value


def _plain(node: Any) -> Any:
    """ruamel's containers as plain ones, keys as text."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


def _order_problems(order: tuple[str, ...]) -> list[Problem]:
    problems = []
    for position, name in enumerate(order):
        spec = STAGES[name]
        for other in spec.needs:
            if other not in order:
                problems.append(Problem((name,), f"the stage {name} needs a stage {other} before it"))
        for other in spec.reads:
            if other in order[position + 1 :]:
                problems.append(
                    Problem((name,), f"the stage {name} reads what {other} makes, so {other} must come before it")
                )
    return problems


def _merge_problems(merge: MergeConfig, variants: list[str], recovers: bool) -> list[Problem]:
    if not variants:
        return [Problem(("merge",), "it needs distill.variants: two or more students to merge")] if recovers else []
    return [Problem(("merge", *path), message) for path, message in merge.unknown_names(variants)]


def _teacher_problems(recipe: Recipe | None) -> list[Problem]:
    if recipe is None or recipe.data is None or recipe.data.teacher is not None:
        return []
    message = "cached reads what the data stage writes down; add data.teacher: {top_k: 64}, or take another teacher"
    return [
        Problem((section.stage, "teacher"), message)
        for section in (recipe.distill, recipe.sort)
        if section is not None
        and section.teacher.kind == "cached"
        and any(needs_teacher(student.objective) for student in section.students)
    ]


def _retain_problems(recipe: Recipe | None) -> list[Problem]:
    if recipe is None or recipe.retain is None or recipe.data is not None or recipe.retain.dataset is not None:
        return []
    message = (
        "it makes its rows of the data stage's, and there is none; add a data section, or name a data set in dataset"
    )
    return [Problem(("retain",), message)]

"""The typed recipe: reading, checking and overriding it. No weights are read, torch is not imported."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError

from ..core.errors import UserError
from ..core.files import read_text
from ..core.stage import Section
from ..core.suggest import did_you_mean
from ..data.config import DataConfig
from ..distill.config import DistillConfig
from ..evaluation.config import EvaluateConfig
from ..export.config import ExportConfig
from ..merge.config import MergeConfig
from ..prune.config import PruneConfig
from ..retain.config import RetainConfig
from ..sort.config import SortConfig
from .explain import one_line
from .options import as_json
from .overrides import apply_override
from .places import LONGEST_NAME, NAME
from .problems import Problem, describe_problems
from .stages import STAGES


class ModelSpec(Section):
    """A model source with further settings."""

    source: str = Field(description="Hub id, folder, .gguf file, package:NAME/FILE or random:FAMILY")
    config: str | None = Field(
        default=None,
        description="a local config.json with the model's shape, for `compress plan` where the Hub cannot be reached",
    )


class Recipe(Section):
    """A checked recipe: its keys, and where they came from. Sections that it lacks are None.

    >>> recipe = Recipe.load("smollm2_135m_24L", set=["prune.blocks=4"])
    >>> recipe.order, recipe.prune.blocks
    (('data', 'prune', 'distill', 'export', 'evaluate'), 4)
    """

    model_config = ConfigDict(
        json_schema_extra={
            "description": "A pipeline: the model, and the stages that work on it. Stages run in the file's order."
        }
    )
    _path: Path = PrivateAttr(default_factory=lambda: Path.cwd() / "recipe")
    _order: tuple[str, ...] = PrivateAttr(default=())
    _content: str = PrivateAttr(default="")  # the file's text; empty for a recipe built from sections
    _overrides: tuple[str, ...] = PrivateAttr(default=())

    name: str = Field(
        pattern=NAME, max_length=LONGEST_NAME, description="name of the run's folder and of the artifacts"
    )
    model: str | ModelSpec = Field(description="Hub id, folder, .gguf file, package:NAME/FILE or random:FAMILY")
    seed: int = Field(default=0, ge=0, description="random seed of the whole run")
    data: DataConfig | None = Field(default=None, description="rows to calibrate on, learn from and measure with")
    prune: PruneConfig | None = Field(default=None, description="which blocks are removed and how the gap is healed")
    distill: DistillConfig | None = Field(default=None, description="recovery by distillation from the unpruned model")
    merge: MergeConfig | None = Field(default=None, description="merging of the recovered variants into one model")
    sort: SortConfig | None = Field(default=None, description="training of one set of weights to run at several depths")
    retain: RetainConfig | None = Field(
        default=None, description="heads that score which keys and values the KV cache keeps"
    )
    export: ExportConfig | None = Field(default=None, description="GGUF and ONNX artifacts in one bundle")
    evaluate: EvaluateConfig | None = Field(default=None, description="measurements for the report")

    @field_validator("name")
    @classmethod
    def _no_dots_only(cls, value: str) -> str:
        if set(value) == {"."}:
            raise ValueError("a name needs a letter or a digit")
        return value

    def model_post_init(self, context: Any) -> None:
        self._order = tuple(name for name in STAGES if getattr(self, name, None) is not None)

    @classmethod
    def load(cls, name: str | Path, set: Sequence[str] = ()) -> Recipe:
        """Read and check a recipe file, or a shipped recipe by its name.

        `set` are overrides such as "prune.blocks=4"; a path in them is relative to the current folder. Raises
        `UserError` with every wrong key, type and value at once, each with its line and the nearest valid key.
        """
        path = find_recipe(str(name))
        return _checked(path, read_text(path), set)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], folder: Path | None = None) -> Recipe:
        """Check a recipe of Python values, spelt as in a file; paths are relative to `folder`, or the current one.

        >>> Recipe.from_dict({"name": "cut", "model": "org/model", "prune": {"blocks": 6}})

        Raises `UserError` as `load` does.
        """
        text = io.StringIO()
        YAML(typ="rt").dump(json.loads(as_json(dict(values))), text)
        given = {(str(key),): "recipe" for key in values}
        return _checked((folder or Path.cwd()) / "recipe", text.getvalue(), (), given)

    def changed(self, set: Sequence[str]) -> Recipe:
        """The recipe with more overrides. Raises `UserError` as `load` does."""
        if not self._content:
            return Recipe.from_dict(self.model_dump(mode="json"), self.folder).changed(set)
        return _checked(self._path, self._content, [*self._overrides, *set])

    @property
    def path(self) -> Path:
        """The file; paths in the recipe are relative to its folder."""
        return self._path

    @property
    def order(self) -> tuple[str, ...]:
        """Its stages, in the order in which they run."""
        return self._order

    @property
    def overrides(self) -> tuple[str, ...]:
        """KEY=VALUE overrides of the file's text."""
        return self._overrides

    @property
    def text(self) -> str:
        """The file's text, with the overrides as comments at the end."""
        return self._content + "".join(f"# --set {override}\n" for override in self._overrides)

    @property
    def folder(self) -> Path:
        """The folder that paths in the recipe are relative to."""
        return self._path.parent

    @property
    def source(self) -> str:
        """The unpruned model."""
        return self.model if isinstance(self.model, str) else self.model.source

    def section(self, stage: str) -> Any:
        """The section of a stage by its name; None if the recipe lacks it."""
        return getattr(self, stage)


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe. A section with a `kind` may be written as that word alone."""
    schema = Recipe.model_json_schema()
    for section in schema["$defs"].values():
        for name, node in section.get("properties", {}).items():
            kinds = _kinds(node, schema["$defs"])
            if kinds:
                section["properties"][name] = {"anyOf": [{"type": "string", "enum": kinds}, node]}
    return schema


def _kinds(node: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """The names of the kinds that a schema node offers, if any."""
    for option in node.get("anyOf", []):  # an optional key
        if "$ref" not in option and (kinds := _kinds(option, definitions)):
            return kinds
    if node.get("discriminator", {}).get("propertyName") == "kind":
        return sorted(node["discriminator"]["mapping"])
    field = definitions.get(node.get("$ref", "").rpartition("/")[2], {}).get("properties", {}).get("kind", {})
    return [field["const"]] if "const" in field else []


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
    listed = ", ".join(known)
    raise UserError(
        f"the recipe file {text!r} does not exist, and no shipped recipe has that name; shipped: "
        f"{listed}{did_you_mean(name, known)}"
    )


def _checked(
    path: Path, content: str, overrides: Sequence[str], given: Mapping[tuple[Any, ...], str] | None = None
) -> Recipe:
    """`given`: the origin of keys that are not from a line of the file."""
    tree = _parse(path, content)
    origins = dict(given or {})
    for override in overrides:
        apply_override(tree, override, origins)
    plain = _plain(tree)
    problems: list[Problem] = []
    recipe: Recipe | None = None
    try:
        # Strict JSON mode: "6" is not a number and true not a count, but a YAML list may become a tuple.
        recipe = Recipe.model_validate_json(json.dumps(plain, default=str), strict=True)
    except ValidationError as error:
        problems = describe_problems(error, plain, Recipe)
    order = tuple(name for name in plain if name in STAGES and plain[name] is not None)
    problems += _order_problems(order)
    if recipe is not None:
        sections = {name: getattr(recipe, name) for name in order}
        for name, section in sections.items():
            problems += [Problem((name, *path), message) for path, message in section.misfits(sections)]
        recipe = recipe.model_copy(update={name: section.beside(sections) for name, section in sections.items()})
    if problems or recipe is None:
        lines = [problem.render(str(path), tree, origins) for problem in problems]
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError(f"{path.name} has {count}:\n" + "\n".join(f"  {line}" for line in lines))
    recipe._path, recipe._order, recipe._content, recipe._overrides = path, order, content, tuple(overrides)
    return recipe


def _parse(path: Path, content: str) -> CommentedMap:
    try:
        tree = YAML(typ="rt").load(content)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        parts = [" ".join(part.split()) for part in (error.context, error.problem) if part]
        raise UserError(f"{place}: {', '.join(parts) or 'not valid YAML'}") from error
    except Exception as error:  # the parser can raise anything for unexpected input
        raise UserError(f"{path}: not valid YAML: {one_line(str(error))}") from error
    if not isinstance(tree, CommentedMap):
        raise UserError(f"{path}: a recipe is a mapping of keys such as name, model, prune")
    return tree


def _plain(node: object) -> Any:
    """ruamel's containers as plain Python ones, keys as text."""
    if isinstance(node, dict):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if isinstance(node, bool) or node is None:
        return node
    for plain_type in (int, float, str):
        if isinstance(node, plain_type):
            return plain_type(node)
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
                    Problem((name,), f"the stage {name} reads the output of {other}, so {other} must come before it")
                )
    return problems

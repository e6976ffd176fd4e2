"""A new stage is its folder, one line in the list of stages, and one field of the recipe: a toy proves it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import compress
import gguf
import numpy as np
import pytest
from compress.cli import main as cli
from compress.core.errors import UserError
from compress.pipeline import recipe as recipes
from compress.pipeline.plan import Plan, make_plan
from compress.pipeline.recipe import Recipe, recipe_schema
from compress.pipeline.runner import Options, plan_run
from compress.pipeline.stages import STAGES, StageSpec, in_order
from pydantic import Field, create_model
from safetensors.torch import load_file

FILES = {
    "__init__.py": '"""The toy stage: the final norm, scaled."""\n',
    "config.py": '''
"""The recipe's `toy` section."""

from pydantic import Field

from ..core.stage import Section

FORMAT = 1


class ToyConfig(Section):
    factor: float = Field(2.0, gt=0, description="what the final norm is scaled by")
    copies: int = Field(4, ge=1, description="of the model in memory")

    def misfits(self, sections):
        if "prune" in sections and sections["prune"].blocks == self.factor:
            yield ("factor",), "it is the number of blocks, which brings bad luck"
''',
    "cost.py": '''
"""What the toy takes."""

from dataclasses import replace

from ..core.cost import Need, StageCost, halves, worst
from ..core.work import Work
from .config import ToyConfig


def _need(config, at):
    return Need(worst({"weights": config.copies * at.small}), disk=at.small, note=f"{at.kept} blocks are scaled")


def _work(config, at):
    return Work(at.shape.hidden)


def _leaves(config, at):
    return replace(at, measured=(*at.measured, at.kept))


def _changes(config, at):
    return ((f"toy.copies={count}",) for count in halves(config.copies, 1))


COST = StageCost[ToyConfig](_need, _work, _leaves, _changes)
''',
    "stage.py": '''
"""Scales the final norm."""

from ..modeling.checkpoint import save_checkpoint
from ..modeling.load import load_model, load_tokenizer


def run(config, inputs, out_dir, context):
    model = load_model(inputs.model)
    model.model.norm.weight.data *= config.factor
    save_checkpoint(model, load_tokenizer(inputs.model), out_dir / "model")
    return {"scaled_by": config.factor}
''',
}
RECIPE = """
name: toy
model: ./model
prune: {{blocks: 1, heal: none, calibration: {{tokens: 256, length: 32, text: text.txt}}}}
toy: {toy}
export: {{gguf: [F16], verify: {{tokens: 16, window: 16}}}}
"""


@pytest.fixture
def home(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a recipe that has a toy stage between prune and export: its folder, its line, its field."""
    package = tmp_path / "packages" / "toy"
    package.mkdir(parents=True)
    for name, text in FILES.items():
        (package / name).write_text(text.lstrip(), encoding="utf-8")
    monkeypatch.setattr(compress, "__path__", [*compress.__path__, str(package.parent)])
    before = dict(STAGES)
    lines = list(before.values())
    lines.insert(2, StageSpec("toy", "toy", makes_model=True))
    STAGES.clear()
    STAGES.update(in_order(*lines))

    from compress.toy.config import ToyConfig  # type: ignore[import-not-found]

    for name in ("planning", "running"):  # they keep the class that they find when they are imported
        import_module(f"compress.pipeline.{name}")
    field: Any = (ToyConfig | None, Field(None, description="the final norm is scaled"))
    monkeypatch.setattr(recipes, "Recipe", create_model("Recipe", __base__=recipes.Recipe, toy=field))
    (tmp_path / "model").symlink_to(tiny(blocks=3))
    (tmp_path / "text.txt").write_text("The tide comes in twice a day, and goes out again. " * 100)
    write(tmp_path, "{}")
    yield tmp_path
    STAGES.clear()
    STAGES.update(before)
    for name in [name for name in sys.modules if name.split(".")[:2] == ["compress", "toy"]]:
        del sys.modules[name]


def write(home: Path, toy: str) -> None:
    (home / "r.yaml").write_text(RECIPE.format(toy=toy))


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command prints that ends well."""
    monkeypatch.setattr(sys, "argv", ["compress", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code, out
    return out


def test_it_is_validated(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = str(home / "r.yaml")
    assert "valid; stages: prune, toy, export" in said(capsys, monkeypatch, "validate", recipe)
    assert "toy" in recipe_schema()["properties"]
    with pytest.raises(UserError, match=r"r\.yaml:5.*toy\.facter.*did you mean 'factor'"):
        write(home, "{facter: 3}")
        Recipe.load(recipe)
    write(home, "{factor: 1}")
    with pytest.raises(UserError, match=r"toy\.factor: it is the number of blocks, which brings bad luck"):
        Recipe.load(recipe)
    (home / "r.yaml").write_text("name: r\nmodel: ./model\nexport: {gguf: [F16]}\ntoy: {}\n")
    with pytest.raises(UserError, match="the stage export reads the output of toy, so toy must come before it"):
        Recipe.load(recipe)


def test_it_is_planned(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(*overrides: str, memory: int | None = None) -> Plan:
        return make_plan(Recipe.load(str(home / "r.yaml"), overrides), "float32", home / "runs", memory=memory)

    plan = planned()
    toy = plan.stages[1]
    assert toy.name == "toy" and toy.need.note == "2 blocks are scaled"
    assert toy.need.peak == 4 * 4 * plan.parameters_after == 4 * toy.need.disk
    change = planned(memory=toy.need.peak // 2).stages[1].change
    assert change is not None and change.overrides == ("toy.copies=2",) and change.memory == toy.need.peak // 2
    evaluated = planned("evaluate.tokens=64").stages[-1].need.note
    assert evaluated == "3 checkpoints, 1 artifacts, 1 rivals"  # base, pruned and the toy's
    assert planned("evaluate.tokens=64", "toy=null").stages[-1].need.note == "2 checkpoints, 1 artifacts, 1 rivals"
    assert "2 blocks are scaled" in said(capsys, monkeypatch, "plan", str(home / "r.yaml"), "--runs", str(home))


def test_it_is_run(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Later stages go on from its model, a changed key makes it and them again, and the report lists it."""
    arguments = ("run", str(home / "r.yaml"), "--runs", str(home / "runs"))
    assert "report:" in said(capsys, monkeypatch, *arguments)
    run = plan_run(Recipe.load(str(home / "r.yaml")), Options(home / "runs"))
    prune, toy, export = (stage.folder.path for stage in run.stages)
    assert not run.pending
    before, after = (load_file(path / "model" / "model.safetensors")["model.norm.weight"] for path in (prune, toy))
    assert np.array_equal(after, 2 * before)
    (file,) = (export / "bundle" / "gguf").glob("*.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    assert np.array_equal(tensors["output_norm.weight"], after)
    entry = json.loads((run.folder / "report.json").read_text())["stages"][1]
    assert entry["name"] == "toy" and entry["metrics"] == {"scaled_by": 2.0} and entry["planned_memory_bytes"]
    assert "toy" in (run.folder / "report.html").read_text(encoding="utf-8")
    changed = plan_run(Recipe.load(str(home / "r.yaml"), ["toy.factor=3"]), Options(home / "runs"))
    assert [stage.spec.name for stage in changed.pending] == ["toy", "export"]

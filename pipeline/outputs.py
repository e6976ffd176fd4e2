"""What commands print with `--json`, typed; `compress schema NAME` prints the JSON schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from ..core.errors import UserError
from ..core.files import printable
from ..core.suggest import did_you_mean
from ..records.fit import FitRecord
from ..records.models import ModelEntry
from .benchmark import BenchReport
from .inspection import Inspection
from .plan import Plan, StagePlan
from .recipe import Recipe, recipe_schema, shipped
from .report.schema import Report


class _Output(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ShippedRecipe(_Output):
    """A recipe that comes with the package."""

    name: str = Field(description="name that commands take")
    path: str = Field(description="its file")
    summary: str = Field(description="first line of the file")


class RecipeSummary(_Output):
    """A valid recipe."""

    name: str = Field(description="name of the run's folder and of the artifacts")
    path: str = Field(description="the recipe's file")
    model: str = Field(description="source of the unpruned model")
    stages: list[str] = Field(description="stages in the order in which they run")


class PlanChange(_Output):
    """The smallest change that makes a stage fit."""

    set: list[str] = Field(description="overrides, as --set takes them")
    peak_memory_bytes: int = Field(description="the stage's peak memory with them")


class PlanBeside(_Output):
    """A stage on the processors of the machine instead (--device cpu)."""

    memory_bytes: int = Field(description="memory that must be available")
    seconds: float | None = Field(description="time; null if unknown")


class PlannedStageOutput(_Output):
    """Estimates for one stage; null where the recipe does not tell."""

    name: str = Field(description="the stage")
    peak_memory_bytes: int = Field(description="peak memory on the device")
    needed_memory_bytes: int = Field(description="memory that must be available on the device")
    memory: dict[str, int] = Field(description="the peak by part, in bytes")
    host_memory_bytes: int = Field(description="host memory of a stage on a GPU")
    disk_bytes: int = Field(description="disk space of its output")
    scratch_bytes: int = Field(description="temporary disk space")
    operations: float | None = Field(description="arithmetic operations; null if the recipe does not determine them")
    seconds: float | None = Field(description="time; null if unknown or without --on")
    fits: bool = Field(description="whether the needed memory is available")
    change: PlanChange | None = Field(description="smallest change that makes it fit; null if it fits or none is known")
    on_processors: PlanBeside | None = Field(
        description="figures with --device cpu, for a stage that does not fit on the GPU"
    )
    note: str = Field(description="remark on the estimate")


class PlanOutput(_Output):
    """Estimates for a recipe."""

    name: str = Field(description="the recipe's name")
    model: str = Field(description="source of the unpruned model")
    dtype: str = Field(description="type of weights and activations")
    parameters: int = Field(description="parameters of the unpruned model")
    parameters_after: int = Field(description="parameters of the pruned model")
    blocks: int = Field(description="blocks of the unpruned model")
    blocks_after: int = Field(description="blocks of the pruned model")
    device: str | None = Field(description="device given with --on")
    cards: int = Field(description="number of such devices")
    memory_bytes: int | None = Field(description="available memory; null if unknown")
    stages: list[PlannedStageOutput] = Field(description="estimates per stage")
    seconds: float | None = Field(description="time of all stages, each on the device that it fits on; null if unknown")
    disk_bytes: int = Field(description="disk space of all outputs, plus the largest temporary one")


def plan_output(plan: Plan) -> PlanOutput:
    """A plan as it is printed."""
    return PlanOutput(
        name=plan.name,
        model=plan.source,
        dtype=plan.dtype,
        parameters=plan.parameters,
        parameters_after=plan.parameters_after,
        blocks=plan.blocks[0],
        blocks_after=plan.blocks[1],
        device=None if plan.device is None else plan.device.name,
        cards=plan.cards,
        memory_bytes=plan.memory,
        stages=[_stage(stage) for stage in plan.stages],
        seconds=plan.seconds,
        disk_bytes=plan.disk,
    )


def _stage(stage: StagePlan) -> PlannedStageOutput:
    cost, change, beside = stage.need, stage.change, stage.beside
    return PlannedStageOutput(
        name=stage.name,
        peak_memory_bytes=cost.peak,
        needed_memory_bytes=cost.needed,
        memory=dict(cost.parts),
        host_memory_bytes=cost.host,
        disk_bytes=cost.disk,
        scratch_bytes=cost.scratch,
        operations=stage.flops,
        seconds=stage.seconds,
        fits=stage.fits,
        change=change and PlanChange(set=list(change.overrides), peak_memory_bytes=change.memory),
        on_processors=beside and PlanBeside(memory_bytes=beside.memory, seconds=beside.seconds),
        note=cost.note,
    )


def recipe_summary(recipe: Recipe) -> RecipeSummary:
    """What there is to say of a valid recipe."""
    path = printable(recipe.path)
    return RecipeSummary(name=recipe.name, path=path, model=recipe.source, stages=list(recipe.order))


def shipped_recipes() -> list[ShippedRecipe]:
    """The recipes in the package, each with the first line of its file."""
    recipes = []
    for name, path in shipped().items():
        first = next(iter(path.read_text(encoding="utf-8").splitlines()), "").lstrip("# ")
        recipes.append(ShippedRecipe(name=name, path=printable(path), summary=first))
    return recipes


_SCHEMAS: dict[str, Callable[[], dict[str, Any]]] = {
    "recipe": recipe_schema,
    "recipes": TypeAdapter(list[ShippedRecipe]).json_schema,
    "validate": RecipeSummary.model_json_schema,
    "plan": PlanOutput.model_json_schema,
    "inspect": TypeAdapter(Inspection).json_schema,
    "eval": TypeAdapter(list[ModelEntry]).json_schema,
    "bench": BenchReport.model_json_schema,
    "fit": FitRecord.model_json_schema,
    "report": Report.model_json_schema,
}


def output_schema(name: str) -> dict[str, Any]:
    """The JSON schema of a recipe, of report.json, or of what a command prints with --json. `UserError` for others."""
    if name not in _SCHEMAS:
        raise UserError(f"no schema {name!r}; there are: {', '.join(_SCHEMAS)}{did_you_mean(name, _SCHEMAS)}")
    return _SCHEMAS[name]()

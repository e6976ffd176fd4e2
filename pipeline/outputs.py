"""What commands print with `--json`, typed; `compress schema NAME` prints the JSON schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

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

    name: str
    path: str
    summary: str


class RecipeSummary(_Output):
    """A valid recipe."""

    name: str
    path: str
    model: str
    stages: list[str]  # in the order in which they run


class PlanChange(_Output):
    """The smallest change that makes a stage fit."""

    set: list[str]  # overrides, as --set takes them
    peak_memory_bytes: int


class PlanBeside(_Output):
    """A stage on the processors of the machine instead (--device cpu)."""

    memory_bytes: int
    seconds: float | None


class PlannedStageOutput(_Output):
    """Estimates for one stage; null where the recipe does not tell."""

    name: str
    peak_memory_bytes: int  # of the device
    needed_memory_bytes: int  # what must be free on it
    memory: dict[str, int]  # the peak's parts, in bytes
    host_memory_bytes: int  # of the machine's own memory, beside a GPU's
    disk_bytes: int  # that it leaves
    scratch_bytes: int  # that it writes meanwhile
    operations: float | None
    seconds: float | None
    fits: bool
    change: PlanChange | None  # where it does not fit, and something known makes it
    on_processors: PlanBeside | None  # where nothing makes it fit on the card
    note: str


class PlanOutput(_Output):
    """Estimates for a recipe."""

    name: str
    model: str
    dtype: str
    parameters: int
    parameters_after: int  # of the pruned model
    blocks: int
    blocks_after: int
    device: str | None
    cards: int
    memory_bytes: int | None  # what there is to fit in
    stages: list[PlannedStageOutput]
    seconds: float | None  # all stages, each where it fits
    disk_bytes: int  # all that is left, and the most that is written meanwhile


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
    cost, change, beside = stage.found, stage.change, stage.beside
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
    return RecipeSummary(name=recipe.recipe.name, path=path, model=recipe.source, stages=list(recipe.order))


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

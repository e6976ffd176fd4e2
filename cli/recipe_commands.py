"""The commands about recipes and their runs: run, plan, validate, recipes, schema, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..core.extras import REPORT, need
from .console import console, print_json
from .option_groups import with_groups
from .options import DeviceOption, DtypeOption, JsonOption, RecipeArgument, RunsOption, SetOption
from .place_options import DEFAULT_PLACE, PlaceOptions
from .progress import ConsoleProgress

if TYPE_CHECKING:
    from ..api import DryRun


@with_groups
def run(
    recipe: RecipeArgument,
    runs: RunsOption = Path("runs"),
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
    overrides: SetOption = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    start: Annotated[str | None, typer.Option("--from", help="Redo this stage and all after it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop.")] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Shard full tuning over the processes (FSDP2).")] = False,
    at: PlaceOptions = DEFAULT_PLACE,
) -> None:
    """Run a recipe. Finished stages are skipped; an interrupted run resumes where it stopped.

    Under torchrun or accelerate launch (-m compress run …) several processes share the work.
    """
    from .. import api
    from ..pipeline.group import is_first
    from ..pipeline.summary import show

    place = at.place()
    where = {"set": overrides or [], "runs": runs, "device": device, "dtype": dtype, "until": until, "start": start}
    if dry_run:
        planned = api.dry_run(recipe, **where)
        if is_first():
            _show_stages(planned)
        return
    result = api.run(recipe, **where, shard=shard, place=place, on_progress=ConsoleProgress(console))
    if is_first():
        show(result.report, result.folder, console)


def _show_stages(planned: DryRun) -> None:
    title = f"{planned.recipe.name}: {planned.recipe.source} in {planned.dtype}, in {planned.folder}"
    console.print(title, highlight=False)
    table = Table("stage", "folder", "")
    states = {
        "to do": Text("to do"),
        "begun": Text("begun, resumes", style="yellow"),
        "complete": Text("complete", style="green"),
    }
    for stage in planned.stages:
        table.add_row(stage.name, stage.folder.name, states[stage.state])
    console.print(table)


def validate(recipe: RecipeArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Check a recipe: every wrong key, type and value at once, with its line. Reads no weights."""
    from ..api import Recipe
    from ..pipeline.outputs import recipe_summary

    loaded = Recipe.load(recipe, overrides or [])
    if as_json:
        print_json(recipe_summary(loaded))
        return
    console.print(f"{loaded.path}: valid; stages: {', '.join(loaded.order) or 'none'}", highlight=False)


def schema(
    name: Annotated[
        str, typer.Argument(help="recipe, report, or a command that has --json: plan, validate, inspect, eval …")
    ] = "recipe",
) -> None:
    """Print a JSON schema: of recipes, for editors that complete and check YAML, or of a command's JSON output."""
    from ..pipeline.outputs import output_schema

    print(json.dumps(output_schema(name), indent=2))


def recipes(as_json: JsonOption = False) -> None:
    """List the recipes that come with the package."""
    from ..pipeline.outputs import shipped_recipes

    listed = shipped_recipes()
    if as_json:
        print_json(listed)
        return
    for recipe in listed:
        console.print(f"{recipe.name:24} {recipe.summary}", highlight=False)


def plan(
    recipe: RecipeArgument,
    overrides: SetOption = None,
    on: Annotated[str | None, typer.Option("--on", help="Device to plan for: cpu-2core, rtx-4090, a100-80g …")] = None,
    memory: Annotated[str | None, typer.Option(help="Available memory, such as 24GB; default: the device's.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: float32 on a CPU, else bfloat16.")
    ] = None,
    runs: RunsOption = Path("runs"),
    shards: Annotated[
        int, typer.Option(min=1, help="Number of processes that full tuning is sharded over (run --shard).")
    ] = 1,
    cards: Annotated[int, typer.Option(min=1, help="With --on: number of such devices, one process on each.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Estimate a recipe's parameters, memory, disk, operations and time from configuration files alone."""
    from .. import api
    from ..pipeline.outputs import plan_output
    from ..pipeline.plan import show_plan

    estimates = api.plan(
        recipe, set=overrides or [], device=on, memory=memory, dtype=dtype, runs=runs, shards=shards, cards=cards
    )
    if as_json:
        print_json(plan_output(estimates))
    else:
        show_plan(estimates, console)


def report(run_folder: Annotated[Path, typer.Argument(help="A folder such as runs/NAME.")]) -> None:
    """Rewrite a run's report.json and report.html from its stage folders."""
    from ..pipeline.summary import rebuild

    need("compress report", *REPORT)
    for file in rebuild(run_folder):
        console.print(str(file), highlight=False)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(epilog="Example: compress run smollm2_135m_24L --set prune.blocks=4 --until export")(run)
    app.command(epilog="Example: compress plan llama8b_26L --on rtx-4090")(plan)
    app.command()(validate)
    app.command()(recipes)
    app.command()(schema)
    app.command()(report)

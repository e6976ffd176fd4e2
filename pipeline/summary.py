"""The end of a run: its report, and the summary that is printed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from jinja2 import UndefinedError
from rich import box
from rich.console import Console
from rich.table import Table

from ..core.errors import UserError
from ..core.files import check_folder_exists, read_json, read_text, write_json
from ..core.units import megabytes, number, percent
from ..records.bundle import BundleManifest
from ..records.manifest import StageManifest
from ..records.models import ModelEntry
from .report.collect import StageRecord, build_report
from .report.front import front_lines
from .report.html import final_model, render, smallest_artifact, write_report
from .report.retrieval import retrieval_lengths, retrieval_lines
from .report.schema import Report
from .report.tasks import task_lines
from .runner import Run

# Errors for a figure that is missing from a report, or null.
MISSING = (KeyError, IndexError, ValueError, TypeError, AttributeError, ArithmeticError, UndefinedError)
LAST = "last-run.json"  # lists the stage folders of the run's last execution


def finish(run: Run, made: int) -> Report:
    """The report of a finished run, written if anything is new."""
    stages = [[stage.spec.name, stage.folder.path.name] for stage in run.stages]
    write_json(run.folder / LAST, {"name": run.loaded.name, "stages": stages})
    report, page = _of_run(run)
    if made or not (run.folder / "report.html").exists():
        complete_card(run, report)  # first: where the report exists, nothing is written again
        write_report(report, page, run.folder)
    return report


def complete_card(run: Run, report: Report) -> None:
    """Write the bundle's card again, with what the run has measured since."""
    for stage in run.stages:
        if stage.spec.name == "export":
            from ..export.card import write_card

            bundle = stage.folder.path / "bundle"
            write_card(bundle, BundleManifest.read(bundle), report.models)


def build(run: Run) -> Report:
    """The report of a finished run."""
    return _of_run(run)[0]


def _of_run(run: Run) -> tuple[Report, str]:
    stages = [StageRecord(s.spec.name, s.folder.path, s.folder.manifest()) for s in run.stages]
    return _build(run.folder, run.loaded.name, run.loaded.text, stages)


def rebuild(folder: Path) -> list[Path]:
    """Write the report of a run folder again."""
    check_folder_exists(folder)
    try:
        last = read_json(folder / LAST)
        recipe = read_text(folder / "recipe.yaml")
        stages = [StageRecord(str(n), folder / path, StageManifest.read(folder / path)) for n, path in last["stages"]]
        name = str(last["name"])
    except (UserError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not the folder of a finished run: {error}") from error
    return write_report(*_build(folder, name, recipe, stages), folder)


def _build(folder: Path, name: str, recipe: str, stages: list[StageRecord]) -> tuple[Report, str]:
    """The report and its page. The page is always rendered, to check that all its figures exist."""
    try:
        report = build_report(name, recipe, stages)
        return report, render(report)
    except (*MISSING, UserError) as error:
        reason = (
            str(error) if isinstance(error, UserError) else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        )
        raise UserError(
            f"the stages in {folder} are damaged, or were made by another version of compress ({reason}); run its "
            "recipe again, with --from where a stage is damaged"
        ) from error


def show(report: Report, folder: Path, console: Console) -> None:
    """A small table of base, pruned, recovered and the artifacts, and the paths."""
    if report.models:
        bold = {m.role for m in (smallest_artifact(report), final_model(report)) if m is not None}
        show_models(report.models, f"{report.name}: results", console, bold)
    for stage in report.stages:
        if stage.name == "export":
            console.print(f"bundle: {folder / stage.folder / 'bundle'}", markup=False, highlight=False)
    console.print(f"report: {folder / 'report.html'}", markup=False, highlight=False)


def show_models(models: list[ModelEntry], title: str, console: Console, bold: Collection[str] = ()) -> None:
    """Figures, tasks and retrieval of all models, and whether the exported files are on the front."""
    console.print(model_table(models, title, bold))
    for line in front_lines(models):
        console.print(line, markup=False, highlight=False)
    show_tasks(models, console)
    show_retrieval(models, console)


def model_table(models: list[ModelEntry], title: str, bold: Collection[str] = ()) -> Table:
    """One row per model: blocks, size, perplexity, agreement, speed; rivals are dim, behind their artifact."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in ("blocks", "size", "perplexity", "KL to base", "top-1 agreement", "prefill", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for model in models:
        cells = (
            model.role,
            str(model.blocks),
            megabytes(model.bytes),
            number(model.perplexity),
            number(model.kl_to_base),
            percent(model.top1_agreement),
            number(model.prefill_tokens_per_second),
            number(model.tokens_per_second),
        )
        table.add_row(*cells, style="bold" if model.role in bold else "dim" if model.rival_of else "")
    return table


def show_tasks(models: list[ModelEntry], console: Console) -> None:
    """The task results: a table per task, a row per model."""
    table: Table | None = None
    for line in task_lines(models):
        if line.first:
            if table is not None:
                console.print(table)
            table = Table(title=line.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
            table.add_column("model", no_wrap=True)
            for column in ("score", "95 %\ninterval", "points\nto base", "kept", "above\nchance"):
                table.add_column(column, justify="right", no_wrap=True)
        assert table is not None  # the first row is the first of its task
        table.add_row(line.role, line.score, line.interval, line.difference, line.kept, line.kept_above_chance)
    if table is not None:
        console.print(table)


def show_retrieval(models: list[ModelEntry], console: Console) -> None:
    """Retrieval from long prompts: a table per task, a row per model, policy and budget."""
    tables: list[Table] = []
    for line in retrieval_lines(models):
        if line.first:
            tables.append(Table(title=line.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)))
            tables[-1].add_column("model", no_wrap=True)
            tables[-1].add_column("policy", no_wrap=True)
            for length in retrieval_lengths(models):
                tables[-1].add_column(f"{length} tokens", justify="right", no_wrap=True)
        tables[-1].add_row(line.role, line.way, *line.cells)
    for table in tables:
        console.print(table)

"""Whole runs of a recipe, for callers in Python and for the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

from ..core.extras import FULL, need
from ..core.place import ANYWHERE, Place
from ..core.stage import Group, Progress
from .group import in_turn, processes
from .models import check_dtype
from .places import check_folder
from .progress import OnProgress, as_progress
from .recipe import Recipe
from .report.schema import Report
from .runner import Options, PlannedStage, Run, execute, plan_run
from .summary import build, finish

T = TypeVar("T")


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    folder: Path  # `runs`/NAME
    stages: dict[str, Path]  # stage → its folder, in order
    made: tuple[str, ...]  # the stages that this call made; the others were complete
    model: Path | None  # checkpoint folder of the last stage that makes a model; None without one
    report: Report  # what report.json holds

    @cached_property
    def bundle(self) -> Path | None:
        """The exported bundle, for `Session`; None without an export stage."""
        return self.stages["export"] / "bundle" if "export" in self.stages else None

    @property
    def report_file(self) -> Path:
        """The report as a self-contained HTML page; report.json is beside it."""
        return self.folder / "report.html"


@dataclass(frozen=True)
class StageState:
    """A stage's state before a run."""

    name: str
    folder: Path
    state: Literal["to do", "begun", "complete"]


@dataclass(frozen=True)
class DryRun:
    """What a run would do."""

    recipe: Recipe
    folder: Path
    dtype: str
    stages: list[StageState]


def run(
    recipe: Recipe | Path | str,
    *,
    set: Sequence[str] = (),
    runs: str | Path = "runs",
    device: str = "cpu",
    dtype: str = "float32",
    until: str | None = None,
    start: str | None = None,
    shard: bool = False,
    place: Place = ANYWHERE,
    on_progress: OnProgress = None,
) -> RunResult:
    """Run a recipe: a `Recipe`, a file, or the name of a shipped one, with `set` as overrides.

    >>> result = run("smollm2_135m_24L", set=["prune.blocks=4"], until="export")
    >>> result.bundle

    Complete stages are skipped; an interrupted run resumes where it stopped. `until` is the last stage to run, `start`
    redoes a stage and all that follow it. `device` is cpu, cuda, cuda:1 or mps; `dtype` float32, bfloat16 or float16;
    `place` is where llama.cpp runs files. Under torchrun or accelerate launch every process calls this, and they share
    the work; `shard` then shards full tuning (FSDP2). The result is the same in all of them.

    Raises `UserError` for a wrong recipe, a missing file, and a machine that cannot run it.
    """
    need("compress run", *FULL)
    place.opens_files("compress run")
    options = Options(Path(runs), device, dtype, until, start, shard, place)

    def work(planned: Run, group: Group) -> RunResult:
        made = tuple(stage.spec.name for stage in planned.pending)
        execute(planned, as_progress(on_progress) if group.rank == 0 else Progress(), group)
        report = finish(planned, len(made)) if group.rank == 0 else build(planned)
        stages = {stage.spec.name: stage.folder.path for stage in planned.stages}
        models = [stages[stage.spec.name] / "model" for stage in planned.stages if stage.spec.makes_model]
        return RunResult(planned.folder, stages, made, models[-1] if models else None, report)

    return _planned(recipe, set, options, work)


def dry_run(
    recipe: Recipe | Path | str,
    *,
    set: Sequence[str] = (),
    runs: str | Path = "runs",
    device: str = "cpu",
    dtype: str = "float32",
    until: str | None = None,
    start: str | None = None,
) -> DryRun:
    """What `run` would do with the same arguments; only the cache of file hashes is written."""
    options = Options(Path(runs), device, dtype, until, start)

    def look(planned: Run, group: Group) -> DryRun:
        stages = [StageState(s.spec.name, s.folder.path, _state(s)) for s in planned.stages]
        return DryRun(planned.loaded, planned.folder, dtype, stages)

    return _planned(recipe, set, options, look)


def _planned(recipe: Recipe | Path | str, set: Sequence[str], options: Options, work: Callable[[Run, Group], T]) -> T:
    """Read the recipe and plan the run, in every process; then call `work`."""
    with processes(options.device) as (group, own_device):
        check_dtype(options.dtype)

        def planning() -> Run:
            loaded = recipe.changed(set) if isinstance(recipe, Recipe) else Recipe.load(recipe, set)
            if group.rank == 0:
                check_folder(options.runs / loaded.name, "--runs")  # before weights are read for their hash
            return plan_run(loaded, replace(options, device=own_device))

        return work(in_turn(group, planning), group)


def _state(stage: PlannedStage) -> Literal["to do", "begun", "complete"]:
    if not stage.pending:
        return "complete"
    return "begun" if stage.folder.partial.exists() else "to do"

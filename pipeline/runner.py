"""Runs a recipe: finds out which stages are complete and makes the others."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json, write_whole
from ..core.place import ANYWHERE, Place
from ..core.registry import packages
from ..core.stage import Context, Group, Inputs, Progress
from ..core.suggest import did_you_mean
from ..modeling.geometry import geometry_of
from ..modeling.source import fingerprint_source, parse_source
from .explain import readable_errors
from .group import check_same, check_shared, in_turn
from .making import Origin, check_device, input_hashes, make_stage, shown_name
from .plan import planned_memory, read_geometry, settings
from .recipe import Recipe
from .stages import STAGES, StageSpec
from .store import StageFolder, fingerprint, lock


@dataclass(frozen=True)
class Options:
    """How and where a recipe runs."""

    runs: Path = Path("runs")
    device: str = "cpu"
    dtype: str = "float32"
    until: str | None = None
    start: str | None = None  # make this stage and all after it again, even if complete
    shard: bool = False  # shard full tuning over the run's processes
    place: Place = ANYWHERE  # where runtimes run exported models


@dataclass(frozen=True)
class PlannedStage:
    """A stage of this run, its folder, and whether it must be made."""

    spec: StageSpec
    config: Any
    folder: StageFolder
    pending: bool
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """A recipe's stages in order, with their fingerprints."""

    loaded: Recipe
    options: Options
    folder: Path
    base: str  # fingerprint of the unpruned model
    stages: tuple[PlannedStage, ...]

    @property
    def pending(self) -> list[PlannedStage]:
        return [stage for stage in self.stages if stage.pending]

    @property
    def cache(self) -> Path:
        return self.options.runs / ".sources"


def plan_run(loaded: Recipe, options: Options) -> Run:
    """Compute fingerprints and which stages are pending; only the cache of file hashes is written."""
    order = _selected(loaded.order, options)
    source = parse_source(loaded.source, loaded.folder)
    cache = options.runs / ".sources"
    base = fingerprint_source(source, cache, loaded.folder)
    folder = options.runs / loaded.name
    context = Context(recipe_dir=loaded.folder)
    prints: dict[str, str] = {}
    stages = []
    for name in order:
        spec, config = STAGES[name], loaded.section(name)
        reads = tuple(other for other in spec.reads if other in prints)
        files = input_hashes(name, config, context, cache)
        digest = fingerprint(
            name,
            spec.format,
            config.model_dump(mode="json"),
            loaded.seed,
            options.dtype,
            base,
            [prints[r] for r in reads],
            files,
            packages(config),
        )
        prints[name] = digest
        stage = StageFolder(folder, name, digest)
        forced = options.start is not None and order.index(name) >= order.index(options.start)
        stages.append(PlannedStage(spec, config, stage, forced or not stage.complete, reads))
    return Run(loaded, options, folder, base, tuple(stages))


def _selected(order: tuple[str, ...], options: Options) -> tuple[str, ...]:
    for flag, name in (("--until", options.until), ("--from", options.start)):
        if name is not None and name not in order:
            listed = ", ".join(order) or "none"
            raise UserError(f"{flag} {name}: the recipe has no such stage; it has {listed}{did_you_mean(name, order)}")
    if options.until is None:
        return order
    order = order[: order.index(options.until) + 1]
    if options.start is not None and options.start not in order:
        raise UserError(f"--from {options.start} comes after --until {options.until}")
    return order


def execute(run: Run, progress: Progress, group: Group | None = None) -> None:
    """Make the pending stages. It can be killed at any moment and called again.

    With several processes all of them call this; rank 0 holds the lock and writes the files that belong to no stage.
    """
    group = group or Group()
    with readable_errors(f"writing to {run.folder}"), lock(run.folder) if group.rank == 0 else nullcontext():
        check_shared(run.folder, group)
        check_same("what is to be done", [[stage.folder.path.name, stage.pending] for stage in run.stages], group)
        if group.rank == 0:
            _save_recipe(run)
            for stage in run.stages:
                if not stage.pending:
                    # Find damage before anything is built on it.
                    stage.folder.manifest(run.cache if run.pending else None)
        if not run.pending:
            return
        options = run.options
        seed, folder = run.loaded.seed, run.loaded.folder
        how = (options.device, options.dtype, folder, progress, group, options.shard, options.place)
        context = Context(seed, *how)
        check_device(context)
        base = in_turn(group, lambda: _prepare(run, context))
        planned = _planned(run, base, group.world)
        done: dict[str, Path] = {}
        for number, stage in enumerate(run.stages, start=1):
            if stage.pending:
                progress.note(f"[{number}/{len(run.stages)}] {stage.spec.name}")
                _make(run, stage, base, done, context, planned.get(stage.spec.name))
            done[stage.spec.name] = stage.folder.path


def _prepare(run: Run, context: Context) -> Path:
    """The unpruned model's checkpoint folder, once the pending stages' checks have passed."""
    from ..modeling.load import resolve

    for stage in run.pending:
        ready = getattr(stage.spec.module(), "ready", None)
        if ready is not None:
            ready(stage.config, context)
    if any(getattr(run.loaded.section(name), "depths", None) for name in run.loaded.order):
        settings(run.loaded, read_geometry(run.loaded, run.cache), context.dtype, False)  # raises if depths do not fit
    base = resolve(run.loaded.source, run.cache, base_dir=run.loaded.folder, progress=context.progress)
    for stage in run.pending:
        check = getattr(stage.spec.module(), "check", None)
        if check is not None:
            check(stage.config, base, context)
    return base


def _planned(run: Run, base: Path, world: int) -> dict[str, int]:
    """The planned peak memory of every stage in bytes; on CUDA torch's allocations."""
    shape = geometry_of(read_json(base / "config.json"))
    cuda = run.options.device.startswith("cuda")
    shards = world if run.options.shard else 1
    needs = planned_memory(run.loaded, shape, run.options.dtype, cuda, shards)
    return {name: memory.peak - (memory.parts.get("runtime", 0) if cuda else 0) for name, memory in needs.items()}


def _make(
    run: Run, stage: PlannedStage, base: Path, done: dict[str, Path], context: Context, planned: int | None
) -> None:
    source = parse_source(run.loaded.source, run.loaded.folder)
    inputs = Inputs(base, _current_model(run, base, done), dict(done), shown_name(source))
    prints = {other.spec.name: other.folder.fingerprint for other in run.stages}
    origin = Origin(run.loaded.source, run.base, {other: prints[other] for other in stage.reads}, planned)
    make_stage(stage.spec, stage.config, inputs, stage.folder, context, origin, anew=run.options.start is not None)


def _current_model(run: Run, base: Path, done: dict[str, Path]) -> Path:
    """The checkpoint of the last finished stage that makes one; without one the unpruned model."""
    makers = [stage.spec.name for stage in run.stages if stage.spec.makes_model and stage.spec.name in done]
    return done[makers[-1]] / "model" if makers else base


def _save_recipe(run: Run) -> None:
    write_whole(run.folder / "recipe.yaml", run.loaded.text)

"""A recipe's plan: every stage with its memory, disk, operations and time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ...prune.config import PruneConfig
from ...stage import check_deepest
from ..recipe import LoadedRecipe
from .devices import Device
from .fit import Change, smallest_change
from .geometry import Geometry, read_geometry
from .memory import Setting, StageMemory, stage_memory
from .work import Work, heldout_targets, rows_of, stage_work


@dataclass(frozen=True)
class StagePlan:
    """Estimates for one stage."""

    name: str
    found: StageMemory
    flops: float | None  # None: cannot be told from the recipe
    seconds: float | None  # None also without a device
    fits: bool = True
    change: Change | None = None  # what makes it fit; None where it does, or nothing known would


@dataclass(frozen=True)
class Plan:
    """Estimates for a recipe."""

    name: str
    source: str
    parameters: int
    parameters_after: int
    blocks: tuple[int, int]
    dtype: str
    stages: list[StagePlan]
    device: Device | None = None
    memory: int | None = None  # what there is


def make_plan(
    loaded: LoadedRecipe,
    dtype: str,
    cache: Path,
    device: Device | None = None,
    memory: int | None = None,
    shards: int = 1,
) -> Plan:
    """Estimates for a recipe: memory on a CPU, or on the device; per process where full tuning is spread over `shards`.

    `memory` is what there is to fit in; the device's if not given. Raises `UserError` where the model's configuration
    cannot be had.
    """
    shape = read_geometry(loaded, cache)
    at = setting(loaded, shape, dtype, device is not None and device.cuda, shards)
    room = memory if memory is not None else (device.memory if device else None)
    stages = []
    for name in loaded.order:
        found = stage_memory(name, loaded.section(name), at)
        work = stage_work(name, loaded.section(name), at, rows_of(loaded.recipe.data))
        fits = room is None or found.needed <= room
        change = None if fits or room is None else smallest_change(loaded, name, at, room)
        flops, seconds = (work.flops, _seconds(work, device, dtype)) if work else (None, None)
        stages.append(StagePlan(name, found, flops, seconds, fits, change))
    parameters = shape.parameters(shape.blocks), shape.parameters(at.kept)
    return Plan(loaded.recipe.name, loaded.source, *parameters, (shape.blocks, at.kept), dtype, stages, device, room)


def planned_memory(
    loaded: LoadedRecipe, shape: Geometry, dtype: str, cuda: bool, shards: int = 1
) -> dict[str, StageMemory]:
    """The memory of every stage of a recipe, for a model whose shape is known."""
    at = setting(loaded, shape, dtype, cuda, shards)
    return {name: stage_memory(name, loaded.section(name), at) for name in loaded.order}


def setting(loaded: LoadedRecipe, shape: Geometry, dtype: str, cuda: bool, shards: int = 1) -> Setting:
    """The model of a recipe before and after pruning. Raises `UserError` where more blocks go than there are, and where
    the depths of a sorted training or those to export do not end with all that are left."""
    prune = loaded.recipe.prune
    dropped = _dropped(prune, shape) if prune else 0
    if dropped >= shape.blocks:
        raise UserError(f"prune.blocks is {dropped}, but the model has {shape.blocks} blocks")
    left, sort, export = shape.blocks - dropped, loaded.recipe.sort, loaded.recipe.export
    where = "the pruned model" if dropped else "the model"
    if prune is None or prune.blocks != "auto":
        if sort is not None:
            check_deepest("sort.depths", sort.depths, left, where)
        if export is not None and export.depths:
            check_deepest("export.depths", export.depths, left, where)
    recovered = loaded.recipe.distill is not None
    depths = tuple(sort.depths) if sort is not None else ()
    return Setting(shape, left, dtype, cuda, heldout_targets(loaded.recipe.data), recovered, shards, depths)


def _dropped(config: PruneConfig, shape: Geometry) -> int:
    """How many blocks go; of `auto` what can be told beforehand, for the rest none: an upper bound of everything."""
    if config.blocks != "auto":
        return config.blocks
    if config.goal is None or config.goal.size is None:
        return 0
    sizes = [shape.parameters(shape.blocks - n) / shape.parameters(shape.blocks) for n in range(shape.blocks)]
    return next((n for n, size in enumerate(sizes) if size <= config.goal.size), shape.blocks - 1)


def _seconds(work: Work, device: Device | None, dtype: str) -> float | None:
    return None if device is None else device.seconds(work.flops, work.read, dtype)

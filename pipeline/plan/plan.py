"""A recipe's plan: every stage with its memory, disk, operations and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.stage import check_deepest
from ...data.config import LlamaCppEngine, RowsFromData
from ...prune.config import PruneConfig
from ..recipe import Recipe
from ..stages import STAGES
from .devices import Device
from .fit import Change, smallest_change
from .geometry import Geometry, read_geometry
from .memory import Setting, StageMemory, stage_memory
from .work import heldout_targets, rows_of, stage_work


@dataclass(frozen=True)
class StagePlan:
    """Estimates for one stage."""

    name: str
    found: StageMemory
    flops: float | None  # None: cannot be told from the recipe
    seconds: float | None  # None also without a device
    fits: bool = True
    change: Change | None = None  # what makes it fit; None where it does, or nothing known would
    beside: Beside | None = None  # where nothing makes it fit on a card


@dataclass(frozen=True)
class Beside:
    """A stage on the processors of a machine that has cards: `--device cpu`, for stages that no card holds."""

    memory: int
    seconds: float | None


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
    cards: int = 1  # that share the work of the stages that can share it

    @property
    def seconds(self) -> float | None:
        """All stages, each where it fits; None where one cannot be told."""
        found = [stage.beside.seconds if stage.beside else stage.seconds for stage in self.stages]
        return None if None in found else sum(s for s in found if s is not None)

    @property
    def disk(self) -> int:
        """What all stages leave, and the most that one of them writes meanwhile."""
        left = sum(stage.found.disk for stage in self.stages)
        return left + max((stage.found.scratch for stage in self.stages), default=0)


def make_plan(
    loaded: Recipe,
    dtype: str,
    cache: Path,
    device: Device | None = None,
    memory: int | None = None,
    shards: int = 1,
    cards: int = 1,
) -> Plan:
    """Estimates for a recipe: memory on a CPU, or on the device; per process where full tuning is spread over `shards`.

    `memory` is what there is to fit in; the device's if not given. `cards` of the device share what stages can share,
    a process each; what fits on none of them is planned on the processors beside them too. Raises `UserError` where
    the model's configuration cannot be had.
    """
    shape = read_geometry(loaded, cache)
    room = memory if memory is not None else (device.memory if device else None)
    at = setting(loaded, shape, dtype, device is not None and device.cuda, shards, room)
    stages = [_stage(loaded, name, at, device, cards) for name in loaded.order]
    parameters = shape.parameters(shape.blocks), shape.parameters(at.kept)
    blocks = shape.blocks, at.kept
    return Plan(loaded.recipe.name, loaded.source, *parameters, blocks, dtype, stages, device, room, cards)


def _stage(loaded: Recipe, name: str, at: Setting, device: Device | None, cards: int) -> StagePlan:
    section, rows = loaded.section(name), rows_of(loaded.recipe.data)
    found, work = stage_memory(name, section, at), stage_work(name, section, at, rows)
    seconds = device.seconds(work, at.dtype) / _shared(name, section, cards) if work and device else None
    flops = work.total if work else None
    if at.room is None or found.needed <= at.room:
        return StagePlan(name, found, flops, seconds)
    change = smallest_change(loaded, name, at, at.room)
    beside = None
    if change is None and device is not None and device.host is not None:
        there = replace(at, cuda=False, room=device.host.memory)
        held = stage_memory(name, section, there).needed
        if held <= device.host.memory:
            work = stage_work(name, section, there, rows)
            beside = Beside(held, device.seconds(work.beside(), at.dtype) if work else None)
    return StagePlan(name, found, flops, seconds, False, change, beside)


def _shared(name: str, section: Any, cards: int) -> int:
    """How many cards make a stage faster."""
    if not STAGES[name].parallel or (name == "data" and not _writes(section)):
        return 1
    engine = getattr(section, "engine", None)
    return 1 if isinstance(engine, LlamaCppEngine) or getattr(engine, "gpus", 1) > 1 else cards


def _writes(section: Any) -> bool:
    """Whether the unpruned model writes a data stage's rows."""
    return not isinstance(section, RowsFromData) or any(part.rewrite is not None for part in section.parts)


def planned_memory(loaded: Recipe, shape: Geometry, dtype: str, cuda: bool, shards: int = 1) -> dict[str, StageMemory]:
    """The memory of every stage of a recipe, for a model whose shape is known."""
    at = setting(loaded, shape, dtype, cuda, shards)
    return {name: stage_memory(name, loaded.section(name), at) for name in loaded.order}


def setting(
    loaded: Recipe, shape: Geometry, dtype: str, cuda: bool, shards: int = 1, room: int | None = None
) -> Setting:
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
    distill = loaded.recipe.distill
    depths = tuple(sort.depths) if sort is not None else ()
    found = Setting(shape, left, dtype, cuda, heldout_targets(loaded.recipe.data), distill is not None, shards, depths)
    files = [(t, d) for t in [*export.gguf, *export.onnx] for d in found.exported(export)] if export is not None else []
    return replace(
        found,
        room=room,
        measured=_measured(loaded, shape.blocks, left),
        artifacts=tuple(files),
        variants=len(distill.students) if distill is not None else 1,
    )


def _measured(loaded: Recipe, whole: int, left: int) -> tuple[int, ...]:
    """Blocks of the checkpoints that an evaluation measures: base, pruned, healed, recovered, merged, and depths."""
    recipe = loaded.recipe
    after = 0
    if recipe.prune is not None:
        after += 1 if recipe.prune.heal.kind == "none" else 2
    after += (recipe.distill is not None) + (recipe.merge is not None)
    return (whole, *[left] * after, *(recipe.sort.depths if recipe.sort is not None else []))


def _dropped(config: PruneConfig, shape: Geometry) -> int:
    """How many blocks go; of `auto` what can be told beforehand, for the rest none: an upper bound of everything."""
    if config.blocks != "auto":
        return config.blocks
    if config.goal is None or config.goal.size is None:
        return 0
    sizes = [shape.parameters(shape.blocks - n) / shape.parameters(shape.blocks) for n in range(shape.blocks)]
    return next((n for n, size in enumerate(sizes) if size <= config.goal.size), shape.blocks - 1)

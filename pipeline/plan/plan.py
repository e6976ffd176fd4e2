"""A recipe's plan: every stage with its memory, disk, operations and time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...core.cost import Need, Setting
from ...core.geometry import Geometry
from ..recipe import Recipe
from ..stages import STAGES
from .devices import Device
from .fit import Change, smallest_change
from .geometry import read_geometry


@dataclass(frozen=True)
class StagePlan:
    """Estimates for one stage."""

    name: str
    need: Need
    flops: float | None  # None: cannot be told from the recipe
    seconds: float | None  # None also without a device
    fits: bool = True
    change: Change | None = None  # what makes it fit; None where it does, or nothing known would
    beside: Beside | None = None  # where nothing makes it fit on a card


@dataclass(frozen=True)
class Beside:
    """A stage on the CPU of a machine with GPUs (`--device cpu`), for stages that do not fit on a GPU."""

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
        """Time of all stages, each on the GPU or CPU that it fits on; None if one is unknown."""
        seconds = [stage.beside.seconds if stage.beside else stage.seconds for stage in self.stages]
        return None if None in seconds else sum(s for s in seconds if s is not None)

    @property
    def disk(self) -> int:
        """Bytes that all stages leave, plus the most that one of them writes temporarily."""
        left = sum(stage.need.disk for stage in self.stages)
        return left + max((stage.need.scratch for stage in self.stages), default=0)


def make_plan(
    loaded: Recipe,
    dtype: str,
    cache: Path,
    device: Device | None = None,
    memory: int | None = None,
    shards: int = 1,
    cards: int = 1,
) -> Plan:
    """Estimates for a recipe: memory on a CPU or on the device, per process where full tuning is sharded over `shards`.

    `memory` is the available memory in bytes (default: the device's). `cards` devices share the stages that can run in
    parallel, one process each; stages that do not fit on one are also planned on the host CPU. Raises `UserError` if
    the model's configuration cannot be read.
    """
    shape = read_geometry(loaded, cache)
    room = memory if memory is not None else (device.memory if device else None)
    finds, left = settings(loaded, shape, dtype, device is not None and device.cuda, shards, room)
    stages = [_stage(loaded, name, at, device, cards) for name, at in finds.items()]
    parameters = shape.parameters(shape.blocks), shape.parameters(left.kept)
    blocks = shape.blocks, left.kept
    return Plan(loaded.name, loaded.source, *parameters, blocks, dtype, stages, device, room, cards)


def _stage(loaded: Recipe, name: str, at: Setting, device: Device | None, cards: int) -> StagePlan:
    spec, section = STAGES[name], loaded.section(name)
    need, work = spec.cost.need(section, at), spec.cost.work(section, at)
    sharing = spec.cost.cards(section, cards) if spec.parallel else 1
    seconds = device.seconds(work, at.dtype) / sharing if work and device else None
    flops = work.total if work else None
    if at.room is None or need.needed <= at.room:
        return StagePlan(name, need, flops, seconds)
    change = smallest_change(loaded, name, at, at.room)
    beside = None
    if change is None and device is not None and device.host is not None:
        on_host = replace(at, cuda=False, room=device.host.memory)
        held = spec.cost.need(section, on_host).needed
        if held <= device.host.memory:
            work = spec.cost.work(section, on_host)
            beside = Beside(held, device.seconds(work.beside(), at.dtype) if work else None)
    return StagePlan(name, need, flops, seconds, False, change, beside)


def planned_memory(loaded: Recipe, shape: Geometry, dtype: str, cuda: bool, shards: int = 1) -> dict[str, Need]:
    """The memory of every stage of a recipe, for a model of known shape."""
    finds, _ = settings(loaded, shape, dtype, cuda, shards)
    return {name: STAGES[name].cost.need(loaded.section(name), at) for name, at in finds.items()}


def settings(
    loaded: Recipe, shape: Geometry, dtype: str, cuda: bool, shards: int = 1, room: int | None = None
) -> tuple[dict[str, Setting], Setting]:
    """The setting of each stage of a recipe, by name and in order, and the setting after the last one.

    Raises `UserError` if a section does not fit the model: it removes more blocks than there are, or its depths do not
    end with all blocks that are left.
    """
    at = Setting(shape, shape.blocks, dtype, cuda, shards, room, measured=(shape.blocks,))
    finds = {}
    for name in loaded.order:
        finds[name] = at
        at = STAGES[name].cost.leaves(loaded.section(name), at)
    return finds, at

"""The smallest change to a recipe that makes a stage fit in memory, found by planning with it.

Changes are tried in the order of what they cost: first the ones that leave the result as it is, then those that hold
weights in fewer bits, at last those that give up context. If no single one is enough, they are added up in this order,
and those that turn out not to be needed are left out again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...core.errors import UserError
from ...retain.config import RetainConfig
from ...training.config import Copy, Lora, TrainingConfig
from ..recipe import Recipe
from .memory import Setting, stage_memory

SMALLEST_CHUNK, SHORTEST = 32, 128


@dataclass(frozen=True)
class Change:
    """Overrides as `--set` takes them, and the stage's peak memory with them."""

    overrides: tuple[str, ...]
    memory: int


def smallest_change(loaded: Recipe, stage: str, at: Setting, room: int) -> Change | None:
    """The first change, or the fewest changes, with which the stage fits; None where nothing in the list is enough."""
    steps = []
    for step in _steps(stage, loaded.section(stage), at):
        memory = _peak(loaded, stage, at, step)
        if memory is not None and memory <= room:
            return Change(step, memory)
        if memory is not None:
            steps.append(step)
    taken: list[tuple[str, ...]] = []
    for step in steps:
        taken.append(step)
        memory = _peak(loaded, stage, at, _flat(taken))
        if memory is not None and memory <= room:
            return _without_needless(loaded, stage, at, room, taken)
    return None


def _without_needless(
    loaded: Recipe, stage: str, at: Setting, room: int, taken: list[tuple[str, ...]]
) -> Change | None:
    # The dearest are tried first: what came later changes more.
    for step in list(reversed(taken)):
        rest = [other for other in taken if other is not step]
        memory = _peak(loaded, stage, at, _flat(rest))
        if memory is not None and memory <= room:
            taken = rest
    overrides = _flat(taken)
    memory = _peak(loaded, stage, at, overrides)
    return None if memory is None else Change(overrides, memory)


def _flat(steps: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """All overrides, the last of each key only."""
    found: dict[str, str] = {}
    for override in (override for step in steps for override in step):
        found[override.partition("=")[0]] = override
    return tuple(found.values())


def _peak(loaded: Recipe, stage: str, at: Setting, overrides: Sequence[str]) -> int | None:
    """The stage's peak memory with these overrides; None where the recipe does not take them."""
    try:
        changed = loaded.changed(overrides)
    except UserError:
        return None
    return stage_memory(stage, changed.section(stage), at).needed


def _steps(stage: str, config: Any, at: Setting) -> Iterator[tuple[str, ...]]:
    """What may be changed in a stage, cheapest first."""
    if stage == "data" and hasattr(config, "batch"):
        yield from ((f"data.batch={size}",) for size in _halves(config.batch, 1))
    elif stage == "prune":
        yield from ((f"prune.calibration.batch={size}",) for size in _halves(config.calibration.batch, 1))
    elif stage == "evaluate":
        yield from ((f"evaluate.tokens={size}",) for size in _halves(config.tokens, 512))
    elif isinstance(config, RetainConfig):
        longest = config.longest(at.shape.positions)
        yield from ((f"retain.length={size}",) for size in _halves(longest, SHORTEST))
        yield from ((f"retain.tokens={size}",) for size in _halves(config.tokens, 2))
    elif isinstance(config, TrainingConfig):
        yield from _training_steps(config)


def _training_steps(config: TrainingConfig) -> Iterator[tuple[str, ...]]:
    section = config.stage
    yield from ((f"{section}.chunk={size}",) for size in _halves(config.chunk, SMALLEST_CHUNK))
    if not config.gradient_checkpointing:
        yield (f"{section}.gradient_checkpointing=true",)
    for size in _halves(config.batch, 1):  # the same sequences per optimizer step
        yield (f"{section}.batch={size}", f"{section}.accumulate={config.accumulate * config.batch // size}")
    if isinstance(config.teacher, Copy) and isinstance(config.tune, Lora):
        yield (f"{section}.teacher=shared",)
    if isinstance(config.teacher, Copy) and config.teacher.quantize is None:
        yield (f"{section}.teacher.kind=copy", f"{section}.teacher.quantize=nf4")
    if config.optimizer == "adamw":
        yield (f"{section}.optimizer=adamw_8bit",)
    if isinstance(config.tune, Lora) and config.tune.quantize_base is None:
        yield (f"{section}.tune.kind=lora", f"{section}.tune.quantize_base=nf4")
    yield from ((f"{section}.length={size}",) for size in _halves(config.length, SHORTEST))


def _halves(value: int, least: int) -> Iterator[int]:
    while value // 2 >= least:
        value //= 2
        yield value

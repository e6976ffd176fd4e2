"""Estimates for a recipe, for callers in Python and for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .models import cache_of, check_dtype
from .plan import Plan, find_device, make_plan, parse_size
from .recipe import Recipe


def plan(
    recipe: Recipe | Path | str,
    *,
    set: Sequence[str] = (),
    device: str | None = None,
    memory: str | int | None = None,
    dtype: str | None = None,
    runs: str | Path = "runs",
    shards: int = 1,
    cards: int = 1,
) -> Plan:
    """Parameters, memory, disk, operations and time of every stage of a recipe, from configuration files alone.

    >>> plan("llama8b_26L", device="rtx-4090").seconds / 3600

    `device` is a named one such as cpu-2core, rtx-4090 or a100-80g; without it there are no times. `memory` is the
    memory available, in bytes or as a text such as "24GB"; the device's if not given. `dtype` is float32 on a CPU, else
    bfloat16. Full tuning is sharded over `shards` processes; `cards` devices share the stages that can run in parallel.

    Memory and disk are in bytes, times in seconds. Raises `UserError` for a wrong recipe, an unknown device, and where
    the model's configuration cannot be read.
    """
    named = find_device(device) if device else None
    dtype = dtype or (named.dtype if named else "float32")
    check_dtype(dtype)
    room = parse_size(memory) if isinstance(memory, str) else memory
    loaded = recipe.changed(set) if isinstance(recipe, Recipe) else Recipe.load(recipe, set)
    return make_plan(loaded, dtype, cache_of(runs), named, room, shards, cards)

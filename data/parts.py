"""Batches sampled by one or several processes, each saved atomically as soon as it is complete."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..core.files import json_lines
from ..core.stage import Group

Records = list[dict[str, Any]]


def in_rounds(folder: Path, count: int, group: Group, draw: Callable[[int], Records]) -> Iterator[Records]:
    """The records of batches 0 … count − 1, in this order, for every process of the group.

    Batch k is produced by process k mod world with `draw(k)` and saved to its own part file in `folder`; an existing
    file is read instead. Batches must not depend on each other; then a killed run resumes at its unfinished batches,
    with any number of processes, and ends with the same records. All processes must consume the same number of
    batches: they draw in rounds of `world` batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, group.world):
        number = start + group.rank
        own = _part(folder / f"{number:05d}.jsonl", number, draw) if number < count else []
        # Gathered, not read from the others' files: these may appear late on a network file system.
        yield from group.gather(own)[: count - start]


def _part(path: Path, number: int, draw: Callable[[int], Records]) -> Records:
    if path.exists():
        return [record for _, record in json_lines(path)]
    records = draw(number)
    write_part(path, records)
    return records


def write_part(path: Path, records: Records) -> None:
    """Write JSON lines atomically."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

"""Batches that one or several processes draw, each written down, whole, as soon as it is drawn."""

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
    """The records of batches 0 … count − 1, in this order, to every process of the group.

    Batch k is drawn by process k mod world, `draw(k)`, into a part file of its own in `folder`; if that file is there,
    it is read instead. So a batch must not depend on the others, and then a run that was killed goes on with the
    batches it was in, with however many processes, and ends with the same records. All processes must take equally
    many: a round of `world` batches is drawn together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, group.world):
        number = start + group.rank
        own = _part(folder / f"{number:05d}.jsonl", number, draw) if number < count else []
        # Gathered, not read from the others' files: a network file system may take a while to show them.
        yield from group.gather(own)[: count - start]


def _part(path: Path, number: int, draw: Callable[[int], Records]) -> Records:
    if path.exists():
        return [record for _, record in json_lines(path)]
    records = draw(number)
    write_part(path, records)
    return records


def write_part(path: Path, records: Records) -> None:
    """Write JSON lines, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=True) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

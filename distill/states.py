"""Hidden states of the unpruned model around a gap, kept on disk in 16 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..core.stage import Progress
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.cuts import gaps
from ..training.weights import save_whole


@dataclass(frozen=True)
class Surroundings:
    """A gap and the kept blocks next to it, by their numbers in the unpruned model."""

    first: int  # of the gap
    last: int
    before: tuple[int, ...]
    behind: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"{self.first}-{self.last}" if self.last > self.first else str(self.first)


def surroundings(dropped: Sequence[int], blocks: int, reach: int) -> list[Surroundings]:
    """Every gap with up to `reach` kept blocks on each side; blocks behind the next gap, or before the last, are not
    taken."""
    runs = gaps(dropped)
    starts = [0, *(last + 1 for _, last in runs)]
    ends = [*(first for first, _ in runs), blocks]
    return [
        Surroundings(
            first,
            last,
            tuple(range(max(starts[number], first - reach), first)),
            tuple(range(last + 1, min(ends[number + 1], last + 1 + reach))),
        )
        for number, (first, last) in enumerate(runs)
    ]


class GapStates(NamedTuple):
    """Residual streams, (B, T, H) each."""

    start: Tensor  # the student's input of the first trained block
    gap: Tensor  # the unpruned model's after the gap
    behind: Tensor  # the unpruned model's after the last trained block


@torch.no_grad()
def write_states(
    unpruned: Decoder,
    around: Surroundings,
    batches: Sequence[Batch],
    folder: Path,
    progress: Progress,
    student: Decoder | None = None,
    kept: Sequence[int] = (),
) -> None:
    """Write the states of every batch, one file each; those that exist stay.

    `student`, whose blocks are `kept` of the unpruned model's, is needed where earlier gaps have changed the stream
    that enters the trained blocks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = around.before[0]
    with progress.bar(f"states around gap {around.label}", len(batches)) as advance:
        for number, batch in enumerate(batches):
            file = state_file(folder, number)
            if not file.exists():
                moved = batch.to(unpruned.model.device)
                positions = moved.position_ids
                start = unpruned.run(unpruned.embed(moved.input_ids), range(first), positions)
                gap = unpruned.run(start, range(first, around.last + 1), positions)
                behind = unpruned.run(gap, around.behind, positions)
                if student is not None:
                    upstream = range(list(kept).index(first))
                    start = student.run(student.embed(moved.input_ids), upstream, positions)
                states = GapStates(start, gap, behind)
                save_whole({k: v.to("cpu", torch.bfloat16) for k, v in states._asdict().items()}, file)
            advance()


def read_states(folder: Path, number: int, device: str | torch.device) -> GapStates:
    """The states of a batch, float32."""
    states = load_file(state_file(folder, number))
    return GapStates(**{name: value.to(device).float() for name, value in states.items()})


def state_file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.safetensors"

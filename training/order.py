"""The order of batches, independent of the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import Sampler

from ..data.packing import Batch


class BatchOrder(Sampler[int]):
    """Batch indices of an epoch, shuffled by seed and epoch.

    Accelerate deals them out to the processes in turn, so each step learns from the same batches however many processes
    there are. It would pad an uneven epoch with batches from its beginning, which would count twice; instead the order
    is padded here with `count`, the index of a blank batch.
    """

    def __init__(self, count: int, world: int, seed: int):
        self.count, self.blanks, self.seed, self.epoch = count, -count % world, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.count, generator=random).tolist()
        yield from [self.count] * self.blanks

    def __len__(self) -> int:
        return self.count + self.blanks


def blank(batches: list[Batch]) -> Batch:
    """The smallest batch without targets: its loss and gradients are zero."""
    smallest = min(batches, key=lambda batch: batch.input_ids.numel())
    return replace(smallest, loss_mask=torch.zeros_like(smallest.loss_mask))

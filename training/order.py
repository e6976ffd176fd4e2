"""Which batches a step learns from, however many processes share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.data import Sampler

from ..data.packing import Batch


class BatchOrder(Sampler[int]):
    """Batch numbers of an epoch, in an order drawn from seed and epoch. Accelerate deals them out to the processes in
    turn, so that each step learns from the same batches whatever their number; it would fill up with batches of the
    epoch's beginning, and learn from those twice, so this ends with enough of `count`, the blank batch."""

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
    """The smallest batch with nothing to learn in it: its loss and its gradients are zero."""
    smallest = min(batches, key=lambda batch: batch.input_ids.numel())
    return replace(smallest, loss_mask=torch.zeros_like(smallest.loss_mask))

"""Packing: several rows in one sequence, with no attention between rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UserError
from .chat import Encoded


@dataclass(frozen=True)
class Batch:
    """Packed rows, all (B, T).

    Positions restart at every row and at the padding that ends a sequence; transformers' models derive a
    block-diagonal attention mask from that, sliding windows included.
    """

    input_ids: Tensor  # long
    position_ids: Tensor  # long, from 0 in every segment
    segment_ids: Tensor  # long, 0, 1, ... within a sequence; -1 is padding
    loss_mask: Tensor  # bool; [b, t]: token t is trained on, predicted from token t - 1
    origin: Tensor  # long, (B, T, 2): id of the token's row (-1: unknown, or padding), and its position in that row

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments for a causal language model. No attention mask and no cache: either would switch the
        block-diagonal mask off."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.segment_ids.to(device),
            self.loss_mask.to(device),
            self.origin.to(device),
        )

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int((self.segment_ids >= 0).sum())

    @property
    def targets(self) -> int:
        """Number of tokens that are trained on."""
        return int(self.loss_mask.sum())


def pack(rows: Sequence[Encoded], length: int, batch_size: int, pad_id: int, *, grouped: bool = False) -> list[Batch]:
    """Batches of `batch_size` sequences (the last may have fewer) of up to `length` tokens.

    Each row, in order, goes into the fullest sequence that still has room; rows longer than `length` are truncated.
    A batch is as long as its longest sequence; `grouped` batches sequences of similar length together, which reduces
    padding. Raises `UserError` if there is nothing to pack.
    """
    bins = [[rows[i] for i in members] for members in _assign([min(len(r.input_ids), length) for r in rows], length)]
    if not bins:
        raise UserError("there are no rows to pack: the data is empty")
    if grouped and batch_size > 1:
        bins.sort(key=lambda rows: -sum(min(len(row.input_ids), length) for row in rows))
    return [assemble(bins[i : i + batch_size], length, pad_id) for i in range(0, len(bins), batch_size)]


def _assign(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Row numbers of each sequence, best fit in the order of the rows; empty rows are skipped."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, sequence), sorted
    for number, size in enumerate(sizes):
        if size == 0:
            continue
        place = bisect_left(room, (size, -1))
        if place < len(room):
            free, target = room.pop(place)
        else:
            free, target = length, len(bins)
            bins.append([])
        bins[target].append(number)
        if free > size:
            insort(room, (free - size, target))
    return bins


def unpack(batch: Batch) -> list[list[Encoded]]:
    """The rows of every sequence, in order; `assemble` makes the same batch of them again."""
    ids, segments, mask = (part.cpu() for part in (batch.input_ids, batch.segment_ids, batch.loss_mask))
    origin = batch.origin.cpu()
    sequences = []
    for b in range(len(ids)):
        places = [(segments[b] == segment).nonzero()[:, 0] for segment in range(int(segments[b].max()) + 1)]
        sequences.append(
            [Encoded(ids[b, at].tolist(), mask[b, at].tolist(), *origin[b, at[0]].tolist()) for at in places]
        )
    return sequences


def assemble(bins: Sequence[Sequence[Encoded]], length: int, pad_id: int) -> Batch:
    """A batch of the given sequences of rows, each of which is truncated to `length` tokens."""
    width = max(sum(min(len(row.input_ids), length) for row in rows) for rows in bins)
    shape = (len(bins), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    segments = torch.full(shape, -1, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    origin = torch.full((*shape, 2), -1, dtype=torch.long)
    for b, rows in enumerate(bins):
        start = 0
        for segment, row in enumerate(rows):
            end = start + min(len(row.input_ids), length)
            ids[b, start:end] = torch.tensor(row.input_ids[:length])
            positions[b, start:end] = torch.arange(end - start)
            segments[b, start:end] = segment
            mask[b, start:end] = torch.tensor(row.loss_mask[:length])
            origin[b, start:end, 0] = row.row
            origin[b, start:end, 1] = row.start + torch.arange(end - start)
            mask[b, start] = False  # predicted from another row's last token, or from nothing
            start = end
        positions[b, start:] = torch.arange(width - start)
    return Batch(ids, positions, segments, mask, origin)

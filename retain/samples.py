"""The heads' training samples: pairs of neighbouring tokens from every long row, with their labels.

The model does not change, so each row is read once, and the samples stored on disk serve any number of steps. Samples
are pairs because the loss compares neighbours' scores; many rows give few each, because one row's tokens are similar.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..modeling.blocks import Decoder
from ..modeling.retaining_labels import BlockLabels, detrended, label_row
from ..training.weights import save_whole
from . import cost
from .config import RetainConfig
from .rows import LongRow

KEPT: torch.dtype = getattr(torch, cost.KEPT)


@dataclass(frozen=True)
class Pairs:
    """Pairs of neighbouring tokens of one block."""

    inputs: Tensor  # (P, 2, I) bfloat16: q, k and v, concatenated
    labels: Tensor  # (P, 2, G) float32

    def __len__(self) -> int:
        return len(self.labels)


def learned_labels(config: RetainConfig, seen: BlockLabels) -> Tensor:
    """The targets of a block's head at the prompt positions that the answer sees, (N - first, G) float32."""
    labels = seen.labels[seen.first :]
    return detrended(labels) if config.labels == "detrended" and len(labels) else labels


def draw_pairs(count: int, tokens: int, draw: random.Random) -> list[int]:
    """First positions of up to `tokens` / 2 disjoint pairs among `count` positions, in order."""
    starts = range(draw.randrange(2) if count > 2 else 0, count - 1, 2)
    return sorted(draw.sample(starts, min(tokens // 2, len(starts))))


def keep_pairs(decoder: Decoder, row: LongRow, file: Path, config: RetainConfig, name: str) -> None:
    """Read a row and save pairs of every block's tokens, sampled by the row's name; the file appears atomically."""
    kept: dict[str, Tensor] = {}

    def keep(seen: BlockLabels) -> None:
        labels = learned_labels(config, seen)
        first = torch.tensor(draw_pairs(len(labels), config.tokens, random.Random(f"{name} {seen.block}")))
        places = (first[:, None] + torch.arange(2)).long().to(labels.device)
        kept[f"{seen.block}.inputs"] = seen.inputs[seen.first :][places].to(KEPT).cpu()
        kept[f"{seen.block}.labels"] = labels[places].cpu()

    label_row(decoder, row.ids, row.prompt, keep)
    save_whole(kept, file)


def keep_all(
    decoder: Decoder,
    rows: Mapping[str, Callable[[], LongRow]],
    folder: Path,
    config: RetainConfig,
    seed: int,
    advance: Callable[[], Any],
) -> list[Path]:
    """The pairs of rows by name, in order, a file per row; a row whose file exists is not built again."""
    folder.mkdir(exist_ok=True)
    files = []
    for name, make in rows.items():
        files.append(file := folder / f"{name}.safetensors")
        if not file.exists():
            keep_pairs(decoder, make(), file, config, f"retain pairs {seed} {name}")
        advance()
    return files


def read_pairs(files: Sequence[Path], block: int) -> Pairs:
    """One block's pairs of all files, in their order."""
    counts, sizes = [], (0, 0)
    for file in files:
        with safe_open(file, framework="pt") as saved:
            shapes = [saved.get_slice(f"{block}.{name}").get_shape() for name in ("inputs", "labels")]
        counts.append(shapes[0][0])
        sizes = shapes[0][2], shapes[1][2]
    inputs = torch.empty(sum(counts), 2, sizes[0], dtype=KEPT)
    labels = torch.empty(sum(counts), 2, sizes[1])
    start = 0
    for file, count in zip(files, counts, strict=True):
        with safe_open(file, framework="pt") as saved:  # filled in place, to avoid a second copy
            inputs[start : start + count] = saved.get_tensor(f"{block}.inputs")
            labels[start : start + count] = saved.get_tensor(f"{block}.labels")
        start += count
    return Pairs(inputs, labels)

"""The unpruned model's top-k log-probabilities at every trained token, written once and read memory-mapped.

The folder `teacher` of a data stage holds, for N targets in M windows (one per conversation; a plain text is split
into windows of `length` tokens), numpy arrays in the order of the rows:

    windows.npy     (M, 4) int64     row id, position of the window's first token in the row, first target, target count
    positions.npy   (N,) int32       position of the target in its row
    targets.npy     (N,) int32       the target token
    tokens.npy      (N, k)           the k most likely tokens, in descending order: uint16, int32 for large vocabularies
    log_probs.npy   (N, k + 1)       float16; the last is the log of the total probability of all other tokens
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from ..core.errors import UserError
from ..core.files import write_whole
from ..core.stage import WORK, Context
from ..modeling.blocks import Decoder
from ..modeling.load import load_model
from ..modeling.types import ModelTokenizer
from .calibration import pad_id
from .chat import Encoded, encode_rows
from .config import TeacherConfig
from .cost import CHUNK, target_arrays
from .packing import Batch, pack
from .rows import Row

FOLDER = "teacher"
PART = 64  # windows per part
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class CacheSize:
    """What a teacher folder holds."""

    targets: int  # tokens that have a distribution
    bytes: int


def write_teacher(
    config: TeacherConfig,
    base: Path,
    rows: Sequence[Row],
    tokenizer: ModelTokenizer,
    length: int,
    out_dir: Path,
    context: Context,
) -> CacheSize:
    """Write the folder for the training rows; returns its size.

    Windows are encoded as for training and written part by part, so a killed run resumes at its unfinished part and
    ends with the same bytes.
    """
    train = sorted((row for row in rows if row.split == "train"), key=lambda row: row.id)
    windows = encode_rows(tokenizer, train, length)
    if not (out_dir / FOLDER).exists():
        _write(config, base, windows, pad_id(tokenizer), length, out_dir, context)
    sizes = [file.stat().st_size for file in sorted((out_dir / FOLDER).iterdir())]
    return CacheSize(sum(sum(window.loss_mask) for window in windows), sum(sizes))


def _write(
    config: TeacherConfig,
    base: Path,
    windows: Sequence[Encoded],
    pad: int,
    length: int,
    out_dir: Path,
    context: Context,
) -> None:
    decoder = Decoder(load_model(base, context.dtype, context.device))
    work, done = out_dir / WORK / FOLDER, out_dir / WORK / "teacher.parts"
    if not work.exists():
        done.unlink(missing_ok=True)
    finished = int(done.read_text()) if done.exists() else 0
    arrays = _arrays(work, windows, min(config.top_k, decoder.vocab_size), decoder.vocab_size, fresh=not finished)
    with context.progress.bar("teacher", len(windows)) as advance:
        for number, begin in enumerate(range(0, len(windows), PART)):
            part = windows[begin : begin + PART]
            if number >= finished:
                first, last = int(arrays["windows"][begin, 2]), int(arrays["windows"][begin : begin + PART, 3].sum())
                _fill(decoder, arrays, slice(first, first + last), pack(part, length, config.batch, pad))
                _mark(arrays, done, number + 1)
            advance(len(part))
    os.replace(work, out_dir / FOLDER)


def _arrays(folder: Path, windows: Sequence[Encoded], k: int, vocabulary: int, *, fresh: bool) -> Arrays:
    """The folder's arrays, memory-mapped for writing, with the index filled in."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [sum(window.loss_mask) for window in windows]
    total = sum(counts)
    shapes = {"windows": ((len(windows), 4), np.dtype(np.int64))}
    shapes |= {name: ((total, *shape), dtype) for name, (shape, dtype) in target_arrays(k, vocabulary).items()}
    arrays: Arrays = {}
    for name, (shape, dtype) in shapes.items():
        file = folder / f"{name}.npy"
        arrays[name] = (
            open_memmap(file, "w+", dtype=dtype, shape=shape) if fresh else open_memmap(file, "r+")  # type: ignore[assignment]
        )
    if fresh:
        firsts = np.cumsum([0, *counts[:-1]])
        arrays["windows"][:] = [(w.row, w.start, first, n) for w, first, n in zip(windows, firsts, counts, strict=True)]
        for w, first, n in zip(windows, firsts, counts, strict=True):
            learned = np.flatnonzero(w.loss_mask)
            arrays["positions"][first : first + n] = w.start + learned
            arrays["targets"][first : first + n] = np.array(w.input_ids)[learned]
    return arrays


def _mark(arrays: Arrays, file: Path, parts: int) -> None:
    """Flush the arrays, and only then record the part as done."""
    for array in arrays.values():
        array.flush()  # type: ignore[attr-defined]
    write_whole(file, str(parts))


@torch.no_grad()
def _fill(decoder: Decoder, arrays: Arrays, part: slice, batches: Sequence[Batch]) -> None:
    """Run one part's windows, packed in any order, and store the results in target order."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        moved = batch.to(decoder.model.device)
        hidden = decoder.hidden(**moved.model_inputs())[:, :-1][moved.loss_mask[:, 1:]]
        origin = batch.origin[:, 1:][batch.loss_mask[:, 1:]]
        for states, places in zip(hidden.split(CHUNK), origin.split(CHUNK), strict=True):
            parts.append((places, *top_k(decoder.head(states), arrays["tokens"].shape[1])))
    places, tokens, log_probs = (torch.cat(pieces).numpy() for pieces in zip(*parts, strict=True))
    order = np.lexsort((places[:, 1], places[:, 0]))
    arrays["tokens"][part], arrays["log_probs"][part] = tokens[order], log_probs[order]


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From logits (n, V): the k most likely tokens (n, k), and their log-probabilities followed by the log of the total
    probability of all others, (n, k + 1), at least float32. Both are on the CPU."""
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    top, tokens = log_probs.topk(k)
    others = log_probs.scatter_(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)
    return tokens.cpu(), torch.cat([top, others], -1).cpu()


class TeacherCache:
    """A data stage's `teacher` folder, memory-mapped.

    Raises `UserError` if the folder has no teacher cache, or a broken one.
    """

    def __init__(self, folder: Path):
        if not (folder / FOLDER).is_dir():
            raise UserError(
                "distill.teacher: cached needs the data stage's teacher cache, but it wrote none; add "
                "data.teacher: {top_k: 64} to the recipe and run it again"
            )
        try:
            arrays = {
                name: np.load(folder / FOLDER / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("windows", "positions", "targets", "tokens", "log_probs")
            }
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder / FOLDER} is broken ({error}); delete {folder} and run the data stage again"
            ) from error
        self.tokens, self.log_probs = arrays["tokens"], arrays["log_probs"]
        self._positions, self._targets = arrays["positions"], arrays["targets"]
        self._windows = {
            (row, start): (first, first + count) for row, start, first, count in arrays["windows"].tolist()
        }

    def find(self, batch: Batch) -> np.ndarray:
        """Indices of the batch's targets in the arrays, (N,), sequence by sequence.

        A truncated row is found too, since the tokens before each target are the same. Raises `UserError` for targets
        that the folder lacks, or has in another context.
        """
        return np.concatenate([np.empty(0, np.int64), *self._segments(batch)])

    def _segments(self, batch: Batch) -> Iterator[np.ndarray]:
        ids, segments, mask = (part.cpu().numpy() for part in (batch.input_ids, batch.segment_ids, batch.loss_mask))
        origin = batch.origin.cpu().numpy()
        for b in range(len(ids)):
            for segment in range(segments[b].max() + 1):
                places = np.flatnonzero(segments[b] == segment)
                row, start = origin[b, places[0]].tolist()
                first, last = self._windows.get((row, start), (0, 0))
                learned = places[1:][mask[b, places[1:]]]
                targets = origin[b, learned, 1]
                indices = first + np.searchsorted(self._positions[first:last], targets)
                if len(learned) and (
                    indices[-1] >= last
                    or not np.array_equal(self._positions[indices], targets)
                    or not np.array_equal(self._targets[indices], ids[b, learned])
                ):
                    raise UserError(
                        f"distill.teacher: the teacher cache does not match row {row} from its token {start} on. "
                        "Plain text is cut into windows, so distill.length must equal data.length"
                    )
                yield indices


def read_top_k(cache: TeacherCache, batch: Batch) -> tuple[Tensor, Tensor]:
    """Top-k tokens (N, k), long, and log-probabilities (N, k + 1), float32, at a batch's targets, sequence by sequence;
    on the batch's device."""
    where, device = cache.find(batch), batch.input_ids.device
    tokens = torch.from_numpy(cache.tokens[where].astype(np.int64))
    return tokens.to(device), torch.from_numpy(cache.log_probs[where].astype(np.float32)).to(device)

"""Perplexity, and agreement with the unpruned model, on the same windows for every model.

Logits exist for a chunk of positions at a time. The base's log-probabilities are written once to a memory-mapped
file, so that models are loaded one after another, and artifacts can be compared with them as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.chat import Encoded, encode_text, load_encoded
from ..errors import UserError
from ..files import read_text
from ..modeling.blocks import Decoder
from ..runtime.engine import Distribution, Engine, Window, divergence
from ..stage import Advance

CHUNK = 128  # positions whose logits exist at once


def text_windows(tokenizer: Any, text: Path | None, data: Path | None, window: int, tokens: int) -> list[Encoded]:
    """Windows of a text file, or the held-out rows of a data stage; `tokens` tokens at most.

    Only tokens marked in the loss mask are measured: of a text all but a window's first, of a conversation the
    answers. Raises `UserError` when there is neither, or nothing to measure.
    """
    if text is not None:
        rows = encode_text(tokenizer, read_text(text, "evaluate.text: "), window)
        rows = [row for row in rows if len(row.input_ids) == window] or rows  # windows of one length
    elif data is not None:
        rows = load_encoded(data, tokenizer, "heldout", window)
    else:
        raise UserError("there is nothing to measure on: name a text file, or give the recipe a data stage")
    kept: list[Encoded] = []
    for row in rows:
        if sum(len(r.input_ids) for r in kept) + len(row.input_ids) > tokens and kept:
            break
        kept.append(Encoded(row.input_ids[:tokens], row.loss_mask[:tokens], row.row, row.start))
    if not any(any(row.loss_mask) for row in kept):
        raise UserError(f"there is nothing to measure: {text or 'the held-out slice'} is too short")
    return kept


def targets(row: Encoded) -> list[int]:
    """Positions of a window that are measured; each is predicted from the tokens before it."""
    return [p for p, marked in enumerate(row.loss_mask) if marked and p > 0]


@dataclass
class Totals:
    """Sums over measured tokens."""

    nll: float = 0.0
    kl: float = 0.0
    agree: float = 0.0
    tokens: int = 0
    compared: int = 0

    def metrics(self) -> dict[str, float | None]:
        """Perplexity, KL(base ‖ model) in nats per token, and the share of tokens with the same first choice."""
        compared = self.compared
        return {
            "perplexity": math.exp(min(self.nll / max(self.tokens, 1), 700.0)),
            "kl_to_base": self.kl / compared if compared else None,
            "top1_agreement": self.agree / compared if compared else None,
        }


class BaseLogProbs:
    """The base's log-probabilities of every measured position, (N, V) float32 on disk."""

    def __init__(self, file: Path, positions: int, vocab: int):
        self.file, self.shape = file, (positions, vocab)

    @property
    def complete(self) -> bool:
        return self.file.exists()

    def write(self, chunks: Iterator[Tensor]) -> None:
        """Fill the file from (n, V) chunks in order; it appears only when whole."""
        partial = self.file.with_suffix(".partial")
        array = np.memmap(partial, dtype=np.float32, mode="w+", shape=self.shape)
        done = 0
        for chunk in chunks:
            array[done : done + len(chunk)] = chunk.cpu().numpy()
            done += len(chunk)
        array.flush()
        del array
        partial.replace(self.file)

    def open(self) -> np.ndarray:
        return np.memmap(self.file, dtype=np.float32, mode="r", shape=self.shape)


@torch.no_grad()
def log_probs(model: Any, rows: Sequence[Encoded], advance: Advance) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (log-probabilities (n, V) float32, targets (n,)) over all measured positions, in order."""
    decoder = Decoder(model)
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        hidden = decoder.hidden(input_ids=ids, use_cache=False)[0]
        for part in torch.tensor(targets(row), device=model.device).split(CHUNK):
            yield decoder.head(hidden[part - 1]).float().log_softmax(-1), ids[0, part]
        advance(len(row.input_ids))


def measure_model(
    model: Any, rows: Sequence[Encoded], base: BaseLogProbs | None, advance: Advance
) -> dict[str, float | None]:
    """Perplexity of a torch model and, with the base's log-probabilities, KL and agreement."""
    totals, reference = Totals(), base.open() if base is not None else None
    for logs, wanted in log_probs(model, rows, advance):
        start = totals.tokens
        totals.nll -= float(logs.gather(1, wanted[:, None]).sum(dtype=torch.float64))
        totals.tokens += len(wanted)
        if reference is not None:
            expected = torch.from_numpy(np.array(reference[start : start + len(wanted)])).to(logs.device)
            totals.kl += float((expected.exp() * (expected - logs)).sum(dtype=torch.float64))
            totals.agree += float((expected.argmax(-1) == logs.argmax(-1)).sum())
            totals.compared += len(wanted)
    return totals.metrics()


def measure_base(base: BaseLogProbs, rows: Sequence[Encoded]) -> dict[str, float | None]:
    """The base's own figures, from what was written of it."""
    logs, totals = base.open(), Totals()
    for wanted in (row.input_ids[p] for row in rows for p in targets(row)):
        totals.nll -= float(logs[totals.tokens, wanted])
        totals.tokens += 1
    totals.compared = totals.agree = totals.tokens  # it agrees with itself everywhere
    return totals.metrics()


def measure_engine(
    engine: Engine, rows: Sequence[Encoded], base: BaseLogProbs | None, top_k: int | None, advance: Advance
) -> dict[str, float | None]:
    """The same of an artifact in its runtime.

    Where the runtime lists only the `top_k` most probable tokens, the rest counts as one: the KL is then a lower bound.
    """
    windows = [Window(row.input_ids, targets(row)) for row in rows if targets(row)]
    totals, reference = Totals(), base.open() if base is not None else None
    for score in (score for window in engine.score(windows, top_k, advance) for score in window):
        totals.nll -= score.target_logprob
        if reference is not None:
            logs = np.array(reference[totals.tokens])
            tokens = np.arange(len(logs))
            expected = Distribution(score.position, score.target, float(logs[score.target]), tokens, logs, True)
            totals.kl += divergence(expected, score)
            totals.agree += float(expected.top == score.top)
            totals.compared += 1
        totals.tokens += 1
    return totals.metrics()

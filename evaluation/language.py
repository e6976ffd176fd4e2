"""Perplexity, and KL and top-1 agreement with the unpruned model, on the same windows for every model.

Logits are computed for a chunk of positions at a time. The base's log-probabilities are written once to a
memory-mapped file, so only one model is loaded at a time, and artifacts can be compared with the base too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UserError
from ..core.files import read_text
from ..core.stage import Advance
from ..data.chat import Encoded, encode_text, load_encoded
from ..modeling.blocks import Decoder
from ..modeling.types import CausalModel, ModelTokenizer
from ..runtime.engine import Distribution, Engine, ScoringWindow, divergence
from .cost import CHUNK

LEAST = -6e4  # log-probability of an impossible token, within float16's range


def text_windows(
    tokenizer: ModelTokenizer, text: Path | None, data: Path | None, window: int, tokens: int
) -> list[Encoded]:
    """Windows of a text file, or the held-out rows of a data stage; `tokens` tokens at most.

    Only tokens in the loss mask are measured: in a text all but each window's first, in a conversation the answers.
    Raises `UserError` if there is neither a text nor a data stage, or nothing to measure.
    """
    if text is not None:
        rows = encode_text(tokenizer, read_text(text, "evaluate.text: "), window)
        rows = [row for row in rows if len(row.input_ids) == window] or rows  # full windows only, if there are any
    elif data is not None:
        rows = load_encoded(data, tokenizer, "heldout", window)
    else:
        raise UserError("no data to measure on: name a text file, or add a `data` section to the recipe")
    kept: list[Encoded] = []
    for row in rows:
        if sum(len(r.input_ids) for r in kept) + len(row.input_ids) > tokens and kept:
            break
        kept.append(Encoded(row.input_ids[:tokens], row.loss_mask[:tokens], row.row, row.start))
    if not any(any(row.loss_mask) for row in kept):
        raise UserError(f"no tokens to measure: {text or 'the held-out data'} is too short")
    return kept


def targets(row: Encoded) -> list[int]:
    """Positions of a window that are measured; each is predicted from the tokens before it."""
    return [p for p, marked in enumerate(row.loss_mask) if marked and p > 0]


class LanguageFigures(TypedDict):
    """Perplexity, KL(base ‖ model) in nats per token, and top-1 agreement with the base (a share of tokens)."""

    perplexity: float
    kl_to_base: float | None
    top1_agreement: float | None


@dataclass
class Totals:
    """Sums over measured tokens."""

    nll: float = 0.0
    kl: float = 0.0
    agree: float = 0.0
    tokens: int = 0
    compared: int = 0
    kls: list[float] = field(default_factory=list)  # nats at each position, where an artifact was compared

    def metrics(self) -> LanguageFigures:
        """The means."""
        compared = self.compared
        return {
            "perplexity": math.exp(min(self.nll / max(self.tokens, 1), 700.0)),
            "kl_to_base": self.kl / compared if compared else None,
            "top1_agreement": self.agree / compared if compared else None,
        }


class BaseLogProbs:
    """The base's predictions at every measured position, on disk: log-probabilities (N, V) in float16, and at full
    precision its top-1 token and the log-probability of the target.

    float16 halves the size (2.1 instead of 4.2 GB for 8,192 positions of 128,256 tokens). Its relative error in a
    log-probability is 1 in 2,000, and errors of both signs cancel in a mean KL.
    """

    def __init__(self, file: Path, positions: int, vocab: int):
        self.file, self.shape = file, (positions, vocab)
        self.beside = file.with_suffix(".npz")

    @property
    def complete(self) -> bool:
        return self.file.exists() and self.beside.exists()

    def write(self, chunks: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Write the files from (log-probabilities (n, V), targets (n,)) in order; they appear only when complete."""
        partial = self.file.with_suffix(".partial")
        array = np.memmap(partial, dtype=np.float16, mode="w+", shape=self.shape)
        top, target, total = (np.empty(len(array), dtype) for dtype in (np.int64, np.float32, np.float64))
        done = 0
        for logs, target_ids in chunks:
            part = slice(done, done + len(logs))
            array[part] = logs.clamp_min(LEAST).half().cpu().numpy()
            top[part] = logs.argmax(-1).cpu().numpy()
            target[part] = logs.gather(1, target_ids[:, None])[:, 0].cpu().numpy()
            total[part] = logs.exp().sum(-1, dtype=torch.float64).cpu().numpy()
            done += len(logs)
        array.flush()
        del array
        with self.beside.open("wb") as file:
            np.savez(file, top=top, target=target, total=total)
        partial.replace(self.file)

    def open(self) -> Base:
        """Open the files, with the log-probabilities memory-mapped."""
        array = np.memmap(self.file, dtype=np.float16, mode="r", shape=self.shape)
        with np.load(self.beside) as beside:
            return Base(array, beside["top"], beside["target"], beside["total"])


@dataclass(frozen=True)
class Base:
    """The base's predictions at N measured positions."""

    logs: np.ndarray  # (N, V) float16
    top: np.ndarray  # (N,) top-1 token
    target: np.ndarray  # (N,) float32, log-probability of the target token
    total: np.ndarray  # (N,) float64, sum of the probabilities: 1, up to float32 rounding

    def __getitem__(self, positions: slice | int) -> np.ndarray:
        """Log-probabilities (n, V) or (V,), float32, renormalized so that rounding to float16 keeps their sum."""
        logs = np.array(self.logs[positions], np.float32)
        sums = np.exp(logs).sum(-1, keepdims=True, dtype=np.float64)
        return logs - np.log(sums / self.total[positions][..., None]).astype(np.float32)


@torch.no_grad()
def log_probs(model: CausalModel, rows: Sequence[Encoded], advance: Advance) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (log-probabilities (n, V) float32, targets (n,)) over all measured positions, in order."""
    decoder = Decoder(model)
    for row in rows:
        ids = torch.tensor([row.input_ids], device=model.device)
        hidden = decoder.hidden(input_ids=ids, use_cache=False)[0]
        for part in torch.tensor(targets(row), device=model.device).split(CHUNK):
            yield decoder.head(hidden[part - 1]).float().log_softmax(-1), ids[0, part]
        advance(len(row.input_ids))


def measure_model(
    model: CausalModel, rows: Sequence[Encoded], base: BaseLogProbs | None, advance: Advance
) -> LanguageFigures:
    """Perplexity of a torch model and, with the base's log-probabilities, KL and agreement."""
    totals, reference = Totals(), base.open() if base is not None else None
    for logs, target_ids in log_probs(model, rows, advance):
        start = totals.tokens
        totals.nll -= float(logs.gather(1, target_ids[:, None]).sum(dtype=torch.float64))
        totals.tokens += len(target_ids)
        if reference is not None:
            part = slice(start, start + len(target_ids))
            expected = torch.from_numpy(reference[part]).to(logs.device)
            totals.kl += float((expected.exp() * (expected - logs)).sum(dtype=torch.float64))
            totals.agree += float((torch.from_numpy(reference.top[part]).to(logs.device) == logs.argmax(-1)).sum())
            totals.compared += len(target_ids)
    return totals.metrics()


def measure_base(base: BaseLogProbs, rows: Sequence[Encoded]) -> LanguageFigures:
    """The base's own figures, from its files."""
    known, count = base.open(), sum(len(targets(row)) for row in rows)
    totals = Totals(nll=-float(known.target[:count].sum(dtype=np.float64)), tokens=count)
    totals.compared = totals.agree = count  # it agrees with itself everywhere
    return totals.metrics()


def measure_engine(
    engine: Engine, rows: Sequence[Encoded], base: BaseLogProbs | None, top_k: int | None, advance: Advance
) -> Totals:
    """The sums of the same figures for an artifact in its runtime, with the KL at each position.

    If the runtime lists only the `top_k` most probable tokens, the rest count as one: the KL is then a lower bound.
    """
    totals = Totals()
    reference = base.open() if base is not None else None
    for score, kl, agrees in _compared(engine, rows, reference, top_k, advance):
        totals.nll -= score.target_logprob
        totals.tokens += 1
        if reference is not None:
            totals.kls.append(kl)
            totals.kl += kl
            totals.agree += agrees
            totals.compared += 1
    return totals


def engine_divergences(
    engine: Engine, rows: Sequence[Encoded], base: BaseLogProbs, top_k: int | None, advance: Advance
) -> list[float]:
    """KL(base ‖ artifact) in nats at every measured position, in order; a lower bound as in `measure_engine`."""
    return [kl for _, kl, _ in _compared(engine, rows, base.open(), top_k, advance)]


def _compared(
    engine: Engine, rows: Sequence[Encoded], reference: Base | None, top_k: int | None, advance: Advance
) -> Iterator[tuple[Distribution, float, float]]:
    """(prediction, its KL, whether it agrees with the base) at every measured position; without a base both are 0."""
    windows = [ScoringWindow(row.input_ids, targets(row)) for row in rows if targets(row)]
    scores = (score for window in engine.score(windows, top_k, advance) for score in window)
    for number, score in enumerate(scores):
        if reference is None:
            yield score, 0.0, 0.0
            continue
        logs = reference[number]
        tokens = np.arange(len(logs))
        expected = Distribution(score.position, score.target, float(logs[score.target]), tokens, logs, True)
        yield score, divergence(expected, score), float(int(reference.top[number]) == score.top)

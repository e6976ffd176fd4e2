"""The interface of every runtime engine, and the arithmetic they share. numpy only: no torch, no transformers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from ..core.errors import UserError

Logprob = float  # natural logarithm of a probability
SMALLEST = -1e4  # stands for the logarithm of a probability that underflowed in the runtime


@dataclass(frozen=True)
class Distribution:
    """A model's next-token distribution after `ids[:position]`."""

    position: int
    target: int  # ids[position], the token that actually follows
    target_logprob: float  # nats; exact in every engine
    token_ids: np.ndarray  # (K,) int64, most probable first; (V,) = 0 … V-1 when complete
    logprobs: np.ndarray  # (K,) or (V,) float32, in the order of token_ids
    complete: bool  # the whole vocabulary, in id order

    @property
    def top(self) -> int:
        """The most probable token."""
        return int(self.token_ids[int(np.argmax(self.logprobs))])


class ScoringWindow(NamedTuple):
    """A text, and the positions (1 ≤ p < len(ids), ascending) at which to predict the next token."""

    ids: Sequence[int]
    positions: Sequence[int]

    @classmethod
    def of(cls, ids: Sequence[int], first: int = 1) -> ScoringWindow:
        """Every position of `ids` from `first` on."""
        return cls(ids, range(first, len(ids)))

    def check(self, limit: int) -> None:
        """Raise `ValueError` for positions outside the text, `UserError` for a text longer than `limit` tokens."""
        inside = all(1 <= p < len(self.ids) for p in self.positions)
        if not inside or any(a >= b for a, b in zip(self.positions, self.positions[1:], strict=False)):
            raise ValueError(f"positions must ascend from 1 to {len(self.ids) - 1}")
        if len(self.ids) > limit:
            raise UserError(f"a text of {len(self.ids)} tokens is longer than the model's context of {limit}")


class Speed(NamedTuple):
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


class Engine(ABC):
    """An exported artifact, open in a stock runtime. Speaks token ids only: no engine adds a BOS token."""

    runtime: str  # "llama.cpp", "onnxruntime" or "onnxruntime-genai"
    device: str = "cpu"  # what it runs on
    processes: tuple[int, ...] = ()  # ids of processes that it started
    path: Path
    context: int  # the longest text, in tokens

    @abstractmethod
    def score(
        self, windows: Sequence[ScoringWindow], top_k: int | None = None, done: Callable[[int], None] | None = None
    ) -> list[list[Distribution]]:
        """The predictions of every window at its positions.

        `top_k` None asks for the whole vocabulary (free in ONNX Runtime; llama.cpp sends every token as JSON: ask it
        for 64). `done(n)` is called after n more positions are scored.
        """

    def next_token_logprobs(
        self, ids: Sequence[int], positions: Sequence[int] | None = None, top_k: int | None = None
    ) -> list[Distribution]:
        """The predictions of one text, at every position unless some are given."""
        window = ScoringWindow.of(ids) if positions is None else ScoringWindow(ids, positions)
        return self.score([window], top_k)[0]

    @abstractmethod
    def generate(
        self,
        ids: Sequence[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> Iterator[int]:
        """Up to `max_tokens` new tokens; temperature 0 is greedy. A stop token ends it and is not yielded."""

    def measure_speed(self, prompt_tokens: int = 128, new_tokens: int = 64) -> Speed:
        """Tokens per second of a prompt's prefill and of greedy decoding after it, once warm."""
        prompt = [(7 * i) % 97 + 3 for i in range(prompt_tokens)]
        for _ in self.generate(prompt[:8], 2):
            pass
        started = time.perf_counter()
        tokens = self.generate(prompt, new_tokens + 1)
        next(tokens)
        prefilled = time.perf_counter()
        count = sum(1 for _ in tokens)
        decoding = time.perf_counter() - prefilled
        return Speed(prompt_tokens / (prefilled - started), count / decoding)

    @abstractmethod
    def close(self) -> None:
        """Free the model's memory; closing twice does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """(..., V) logits to natural log-probabilities, float32, summed in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))).astype(np.float32)


def distributions(
    logits: np.ndarray, ids: Sequence[int], positions: Sequence[int], top_k: int | None = None
) -> list[Distribution]:
    """Distributions from logits (N, V) whose row i is the prediction after `ids[:positions[i]]`.

    Raises `UserError` for NaN logits.
    """
    if np.isnan(logits).any():
        raise UserError("the predictions are NaN: the weights are damaged or out of range")
    vocabulary = np.arange(logits.shape[-1], dtype=np.int64)
    collected = []
    for row, position in zip(logits, positions, strict=True):
        logprobs = log_softmax(row)
        target = int(ids[position])
        tokens = vocabulary
        if top_k is not None and top_k < len(logprobs):
            tokens = np.argpartition(-logprobs, top_k)[:top_k]
            tokens = tokens[np.lexsort((tokens, -logprobs[tokens]))]
        complete = tokens is vocabulary
        kept = logprobs if complete else logprobs[tokens]
        collected.append(Distribution(position, target, float(logprobs[target]), tokens, kept, complete))
    return collected


def divergence(reference: Distribution, other: Distribution) -> float:
    """KL(reference ‖ other) in nats; `reference` must be complete.

    Where `other` holds only its K most probable tokens, they and the target are compared one by one and all the
    rest as one token: a lower bound (data processing inequality), close to the full KL for K ≥ 64.
    """
    if not reference.complete:
        raise ValueError("the reference distribution must cover the whole vocabulary")
    if other.complete:
        p, log_q = reference.logprobs.astype(np.float64), other.logprobs.astype(np.float64)
        if len(p) != len(log_q):
            raise ValueError(f"vocabularies differ: {len(p)} and {len(log_q)} tokens")
        return float(np.sum(np.exp(p) * (p - np.maximum(log_q, SMALLEST))))
    listed = dict(zip(other.token_ids.tolist(), other.logprobs.tolist(), strict=True))
    listed[other.target] = other.target_logprob
    tokens = np.fromiter(listed.keys(), np.int64)
    log_q = np.maximum(np.fromiter(listed.values(), np.float64), SMALLEST)
    log_p = reference.logprobs[tokens].astype(np.float64)
    rest_p, rest_q = 1 - np.exp(log_p).sum(), 1 - np.exp(log_q).sum()
    total = float(np.sum(np.exp(log_p) * (log_p - log_q)))
    # Below 1e-6 a rest is rounding noise; for `other` that is a floor, so that a certain and wrong model counts.
    return total + (float(rest_p * np.log(rest_p / max(rest_q, 1e-6))) if rest_p > 1e-6 else 0.0)


def perplexity(scores: Iterable[Distribution]) -> float:
    """exp of the mean negative log-probability of the targets."""
    values = [score.target_logprob for score in scores]
    if not values:
        raise ValueError("no predictions to compute a perplexity from")
    return float(np.exp(-np.mean(np.asarray(values, np.float64))))


def pick(logits: np.ndarray, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """A token from logits (V,): the greatest at temperature 0, else sampled from the smallest set of mass `top_p`."""
    if temperature == 0:
        return int(np.argmax(logits))
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    kept = np.arange(len(weights)) if top_p >= 1 else _nucleus(weights, top_p)
    cumulative = np.cumsum(weights[kept])
    return int(kept[int(np.searchsorted(cumulative, random.random() * cumulative[-1]).clip(0, len(kept) - 1))])


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """The fewest indices of weights (V,) that hold `top_p` of their sum, greatest first; at least one."""
    mass, count = top_p * float(weights.sum()), 256
    while True:
        # Sorting a whole vocabulary takes longer than decoding a token of a small model.
        few = np.arange(len(weights)) if count >= len(weights) else np.argpartition(-weights, count)[:count]
        few = few[np.lexsort((few, -weights[few]))]
        cumulative = np.cumsum(weights[few])
        if cumulative[-1] >= mass or count >= len(weights):
            return few[: int(np.searchsorted(cumulative, mass)) + 1]
        count *= 8

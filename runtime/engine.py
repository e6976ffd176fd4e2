"""What every runtime offers: next-token distributions, generation, speed. Numpy only; no torch, no transformers."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class NextToken:
    """A distribution over the token after a prefix, with the log-probability of one token exactly.

    `tokens` and `logprobs` list the most probable ones in falling order: all of them, or the top k where the runtime
    gives no more.
    """

    target: int
    target_logprob: float  # nats
    tokens: NDArray[np.int64]  # (K,)
    logprobs: NDArray[np.float32]  # (K,), nats

    @property
    def top(self) -> int:
        return int(self.tokens[0])


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one stream."""

    prefill: float
    decode: float
    prompt_tokens: int
    new_tokens: int


class Engine(Protocol):
    """An exported model opened in a stock runtime."""

    name: str

    def next_tokens(self, ids: Sequence[int], positions: Sequence[int], top_k: int | None = None) -> list[NextToken]:
        """For each position p (1 ≤ p < len(ids)) the distribution after ids[:p], with ids[p] as its target."""
        ...

    def generate(self, ids: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        """The greedy continuation, token by token, up to a stop token (not yielded) or `max_tokens`."""
        ...

    def speed(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """Time one prompt of made-up tokens and a continuation."""
        ...

    def close(self) -> None: ...


def from_logits(logits: NDArray[np.floating], target: int, top_k: int | None = None) -> NextToken:
    """A `NextToken` from the logits (V,) at one position."""
    values = logits.astype(np.float64)
    values -= values.max()
    logprobs = (values - np.log(np.exp(values).sum())).astype(np.float32)
    order = np.argsort(-logprobs, kind="stable")[:top_k].astype(np.int64)
    return NextToken(int(target), float(logprobs[target]), order, logprobs[order])


def check_positions(ids: Sequence[int], positions: Sequence[int]) -> None:
    """Positions are 1 … len(ids) − 1: there is a prefix before each and a target at it."""
    wrong = [p for p in positions if not 1 <= p < len(ids)]
    if wrong:
        raise ValueError(f"positions {wrong[:3]} are not within 1 … {len(ids) - 1}")


def thread_count(threads: int) -> int:
    """The number asked for, or for 0 the physical cores this process may use."""
    if threads:
        return threads
    import psutil

    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(physical, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical))


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """What native code prints to stderr inside the context, as a list of lines afterwards, instead of on the screen."""
    lines: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            sink.seek(0)
            lines += sink.read().decode(errors="replace").splitlines()


def open_engine(path: Path, threads: int = 0, context: int = 2048) -> Engine:
    """Open a .gguf file in llama.cpp, or an ONNX folder in ONNX Runtime. `context` is what llama.cpp reserves."""
    if path.suffix == ".gguf":
        from .llamacpp_engine import LlamaCppEngine

        return LlamaCppEngine(path, threads, context)
    from .onnx_engine import OnnxEngine

    return OnnxEngine(path, threads)

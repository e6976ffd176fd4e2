"""Engines that generate text for many prompts, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from ...core.errors import UserError
from ...core.files import check_file_exists
from ...core.stage import Context
from ..config import EngineConfig, LlamaCppSettings, VllmSettings
from ..cost import LLAMACPP_ROWS
from ..sampling import Sampled, Sampling


class WritingEngine(Protocol):
    """Continues prompts."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        how: Sampling,
        *,
        stop: Collection[int],
        banned: Sequence[int] = (),
        stopped: Callable[[list[int]], bool] | None = None,
    ) -> list[Sampled]:
        """Continue each prompt (token ids, not empty) until a token of `stop`, `stopped(tokens)`, or `how.max_tokens`.

        Row i is sampled with `seeds[i]`; tokens of `banned` are never sampled.
        """
        ...

    def close(self) -> None:
        """Free the model and its memory."""
        ...


def check_engine(config: EngineConfig, context: Context) -> None:
    """Raise `UserError` if an engine lacks its file, its package or its GPU."""
    if isinstance(config, LlamaCppSettings):
        advice = "; create one with compress export BASE --gguf Q8_0"
        check_file_exists(context.resolve(config.gguf), "data.engine.gguf: ", advice)
    elif isinstance(config, VllmSettings):
        from .vllm_engine import check_platform

        check_platform(context.device)
        if config.gpus > 1 and context.world > 1:
            raise UserError(
                f"data.engine.gpus is {config.gpus}, but the run has {context.world} processes, each with its own "
                "model; run this stage in one process (--until data), or set gpus: 1"
            )


def open_engine(config: EngineConfig, base: Path, context: Context, length: int, rows: int) -> WritingEngine:
    """The engine of a recipe on the unpruned model in the folder `base`, for up to `rows` texts of `length` tokens."""
    if isinstance(config, LlamaCppSettings):
        from .llamacpp_engine import LlamaCpp

        slots = min(rows, LLAMACPP_ROWS)
        return LlamaCpp(context.resolve(config.gguf), base, length, config.threads, slots, context.place)
    if isinstance(config, VllmSettings):
        from .vllm_engine import Vllm

        return Vllm(base, context, length, rows, config)
    from .torch_engine import Torch

    return Torch(base, context)


def settle(
    tokens: Sequence[int],
    stop: Collection[int],
    limit: int,
    stopped: Callable[[list[int]], bool] | None = None,
) -> Sampled:
    """An engine's tokens, truncated as `sample` would: at the first token that ends the text, or where the text starts
    to loop."""
    sampled = Sampled([])
    for token in list(tokens)[:limit]:
        sampled.append(token, stop, stopped)
        if sampled.ended or sampled.looped:
            break
    return sampled

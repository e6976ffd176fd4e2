"""Cost of training retaining heads: a pass over long rows, then one block's head after another."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..core.cost import BYTES, GRADIENT, MOMENTS, Need, Overrides, Setting, StageCost, halves, worst
from ..core.work import Work, forward
from ..modeling.cost import labelling_bytes
from .config import SPREAD, RetainConfig, head_width, measured_after

RUNTIME = 612e6  # measured with a tiny model on Linux, torch 2.13 for CPUs
KEPT = (
    "bfloat16"  # dtype of the heads' stored inputs: float32's range, which some families' keys need, at half the size
)
SHORTEST = 128  # the least `length` that is proposed where memory is short


def _need(config: RetainConfig, at: Setting) -> Need:
    """The model with a pass over the longest row; then one block's pairs and head at a time."""
    shape, tokens = at.shape, config.longest(at.shape.positions)
    width, heads = head_parameters(config, at)
    own = heads // at.kept
    pair = shape.qkv * BYTES[KEPT] + shape.kv_heads * 4  # bytes per token, labels included
    kept = (config.rows + config.heldout) * config.tokens * pair  # per block, at most
    holding = {
        "runtime": at.runtime(RUNTIME),
        "weights": at.small,
        "adapters": 2 * heads * 4,  # the heads, and the untrained ones they are compared with
    }
    reading = holding | {
        "activations": tokens * (shape.state + shape.qkv) * at.size,
        "logits": labelling_bytes(shape),
    }
    learning = holding | {
        "optimizer": own * (GRADIENT + MOMENTS["adamw"]),
        "activations": config.batch * (shape.qkv * 6 + 4 * width * 4),
        "other": kept,
    }
    note = f"heads, {heads / 1e6:.1f} M trained; rows of up to {tokens} tokens"
    # The model itself takes no space: it is linked to the stage's input.
    return Need(worst(reading, learning), heads * 4, note, kept * at.kept)


def head_parameters(config: RetainConfig, at: Setting) -> tuple[int, int]:
    """The width of retaining heads, and the number of parameters over all blocks."""
    width = head_width(config.width, at.shape.hidden)
    return width, at.kept * width * (at.shape.qkv + at.shape.kv_heads)


def _work(config: RetainConfig, at: Setting) -> Work | None:
    """The rows, with lengths spread log-uniformly; the held-out rows, which are read twice; and the heads' steps."""
    if config.dataset is not None:
        return None  # a data set's lengths are unknown
    longest = config.longest(at.shape.positions)
    mean = longest * (1 - 1 / SPREAD) / math.log(SPREAD)
    seen = longest * (1 + 1 / SPREAD) / 4  # per token, on average
    heads = head_parameters(config, at)[1]
    held = config.heldout * min(config.tokens, mean) * len(measured_after(config))
    flops = forward(at.shape, at.kept, mean * (config.rows + 2 * config.heldout), seen, 0)
    return Work(flops + heads * (config.steps * config.batch * 6 + held * 2))


def _changes(config: RetainConfig, at: Setting) -> Iterable[Overrides]:
    yield from ((f"retain.length={size}",) for size in halves(config.longest(at.shape.positions), SHORTEST))
    yield from ((f"retain.tokens={size}",) for size in halves(config.tokens, 2))


COST = StageCost[RetainConfig](_need, _work, changes=_changes)

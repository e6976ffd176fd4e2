"""What training retaining heads takes: a pass over long rows, then one block's head after another."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..core.cost import BYTES, GRADIENT, MOMENTS, Need, Overrides, Setting, StageCost, halves, worst
from ..core.work import Work, forward
from ..modeling.cost import labelling_bytes
from .config import SPREAD, RetainConfig, head_width, measured_after

RUNTIME = 612e6  # measured with a tiny model on Linux, torch 2.13 for CPUs
KEPT = "bfloat16"  # of what heads are given: as wide as float32, whatever a family's keys look like; half its size
SHORTEST = 128  # longest row that is proposed where memory is short


def _need(config: RetainConfig, at: Setting) -> Need:
    """The model, and a pass over the longest row; then, one after another, a block's pairs and its head."""
    shape, tokens = at.shape, config.longest(at.shape.positions)
    width, heads = head_parameters(config, at)
    own = heads // at.kept
    pair = shape.qkv * BYTES[KEPT] + shape.kv_heads * 4  # bytes of a token, with its labels
    kept = (config.rows + config.heldout) * config.tokens * pair  # of a block, at most
    holding = {
        "runtime": at.runtime(RUNTIME),
        "weights": at.small,
        "adapters": 2 * heads * 4,  # and the untrained ones they are compared with
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
    # The model beside them is the one before, by links.
    return Need(worst(reading, learning), heads * 4, note, kept * at.kept)


def head_parameters(config: RetainConfig, at: Setting) -> tuple[int, int]:
    """The width of retaining heads, and how many parameters those of all blocks have."""
    width = head_width(config.width, at.shape.hidden)
    return width, at.kept * width * (at.shape.qkv + at.shape.kv_heads)


def _work(config: RetainConfig, at: Setting) -> Work | None:
    """Rows whose lengths are spread evenly on a scale of ratios, held-out ones like them, which are read twice, and the
    heads' steps."""
    if config.dataset is not None:
        return None  # as long as they are
    longest = config.longest(at.shape.positions)
    mean = longest * (1 - 1 / SPREAD) / math.log(SPREAD)
    seen = longest * (1 + 1 / SPREAD) / 4  # on average by a token
    heads = head_parameters(config, at)[1]
    held = config.heldout * min(config.tokens, mean) * len(measured_after(config))
    flops = forward(at.shape, at.kept, mean * (config.rows + 2 * config.heldout), seen, 0)
    return Work(flops + heads * (config.steps * config.batch * 6 + held * 2))


def _changes(config: RetainConfig, at: Setting) -> Iterable[Overrides]:
    yield from ((f"retain.length={size}",) for size in halves(config.longest(at.shape.positions), SHORTEST))
    yield from ((f"retain.tokens={size}",) for size in halves(config.tokens, 2))


COST = StageCost[RetainConfig](_need, _work, changes=_changes)

"""Cost of recovery: one student, or one per variant, behind the local phase if there is one."""

from __future__ import annotations

from dataclasses import replace

from ..core.cost import GRADIENT, MOMENTS, Need, Setting, StageCost, worst
from ..core.work import Work, forward
from ..training.cost import RUNTIME, saved_per_token, training_changes, training_need, training_work
from .config import DistillConfig, Local

STATES = 3  # kept per token and gap: what enters the trained blocks, and the targets behind the gap and behind them
STATE = 2  # bytes of a number of them


def _need(config: DistillConfig, at: Setting) -> Need:
    """The larger of the two phases' peaks; the states are temporary."""
    need = training_need(config, at)
    if config.local is None:
        return need
    trained = 2 * config.local.reach * at.shape.block_parameters
    tokens = max(config.length, config.local.tokens_per_step)
    local = {
        "runtime": at.runtime(RUNTIME),
        "weights": at.small + trained * (4 - at.size),  # the trained blocks are float32
        "teacher": at.whole,
        "optimizer": trained * (4 + GRADIENT + MOMENTS["adamw"]),  # and the weights that they had
        "activations": tokens * 2 * config.local.reach * saved_per_token(at.shape) * at.size,
    }
    states = 0 if at.rows is None else at.rows.tokens * at.shape.hidden * STATES * STATE
    return replace(need, parts=worst(need.parts, local), scratch=need.scratch + states)


def _work(config: DistillConfig, at: Setting) -> Work | None:
    rows = [variant.rows for variant in config.variants] if config.variants else [(0.0, 1.0)]
    work = training_work(config, at, [end - start for start, end in rows])
    return work if work is None or config.local is None else work + _local_work(config, config.local, at)


def _local_work(config: DistillConfig, local: Local, at: Setting) -> Work:
    """One gap: the states once, then a few blocks forward and backward, weights' gradients included. With more gaps it
    is as much for each; how many there are is not known before the cut."""
    assert at.rows is not None
    tokens, held = at.rows.tokens * (1 - at.rows.heldout), at.rows.tokens * at.rows.heldout
    states = forward(at.shape, at.shape.blocks / 2, tokens, config.length / 2, 0)
    training = 3 * forward(at.shape, 2 * local.reach, local.epochs * tokens, config.length / 2, 0)
    guard = forward(at.shape, at.shape.blocks + 2 * at.kept, 2 * held, config.length / 2)
    return Work(states + training + guard)


def _leaves(config: DistillConfig, at: Setting) -> Setting:
    return replace(at, recovered=True, variants=len(config.students), measured=(*at.measured, at.kept))


COST = StageCost[DistillConfig](_need, _work, _leaves, training_changes)

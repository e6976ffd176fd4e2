"""`blocks: auto`: the number of blocks to drop, from the held-out perplexity of cuts of growing size."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from ..core.errors import UserError
from ..modeling.blocks import Decoder, replaced, without_blocks
from ..modeling.cuts import Cut, describe
from ..records.importance import Candidate, CurvePoint
from .config import Goal, PruneConfig
from .healing import fit_gaps
from .scoring import Scorer
from .searches import choose
from .study import Study

MISSES = 2  # stop after this many sizes in a row above the perplexity limit
STEPS = 12  # tokens timed per model, the two models taking turns


def decide(study: Study, config: PruneConfig, candidates: range) -> tuple[Cut, list[CurvePoint]]:
    """The cut that meets the goal, and the curve: for each size tried the blocks, the perplexity pruned and healed,
    both as a multiple of the unpruned model's too, and the share of weights left.

    Raises `UserError` where no size meets the goal.
    """
    goal = config.goal or Goal(perplexity=1.2)
    most = min(goal.at_most or study.num_blocks // 2, len(candidates))
    curve = [_point(study, config, ())]
    study.progress.note(f"held-out perplexity of the unpruned model: {curve[0].pruned:.2f}")
    met = curve[:1] if _meets(curve[0], goal) else []
    compared: dict[int, dict[str, Candidate] | None] = {}  # size → the cuts that its search's result was compared with
    for count in range(1, most + 1):
        if met and goal.perplexity is None:
            break
        cut = choose(study, config, count, candidates)
        compared[count] = study.notes.pop("guard", None)
        point = _point(study, config, cut, curve[0].pruned, timed=goal.latency is not None)
        curve.append(point)
        met += [point] if _meets(point, goal) else []
        study.progress.note(
            f"{count} removed: perplexity {point.pruned:.2f} pruned, {point.healed:.2f} healed "
            f"({point.healed_ratio:.2f} × the base's), {describe(cut)}"
        )
        if not any(_meets(p, goal) for p in curve[-MISSES:]) and goal.perplexity is not None:
            break
    if not met:
        raise UserError(
            f"prune.goal cannot be reached: with {most} block{'' if most == 1 else 's'} removed the model is still "
            f"above the target {'size' if goal.size is not None else 'latency'}; raise the target or goal.at_most"
        )
    chosen = tuple(met[-1].dropped)
    if guard := compared.get(len(chosen)):
        study.notes["guard"] = guard
    return chosen, curve


def _meets(point: CurvePoint, goal: Goal) -> bool:
    if goal.perplexity is not None:
        return point.healed_ratio <= goal.perplexity
    if goal.size is not None:
        return point.size <= goal.size
    return point.latency is not None and goal.latency is not None and point.latency <= goal.latency


def _point(
    study: Study, config: PruneConfig, cut: Cut, base: float | None = None, *, timed: bool = False
) -> CurvePoint:
    def measure() -> dict[str, Any]:
        decoder, scorer = study.decoder, study.scorer("perplexity", held_out=True)
        pruned = healed = _perplexity(scorer, cut)
        if cut and config.heal.kind != "none":
            values, _ = fit_gaps(decoder.model, cut, study.batches, config.heal, study.progress)
            with replaced(values):
                healed = _perplexity(scorer, cut)
        return {
            "dropped": list(cut),
            "pruned": pruned,
            "healed": healed,
            "pruned_ratio": pruned / (base or pruned),
            "healed_ratio": healed / (base or pruned),
            "size": remaining(decoder, cut),
            "latency": latency_share(decoder, cut) if timed else None if cut else 1.0,
        }

    return CurvePoint.model_validate(study.recorded(f"curve {list(cut)}", measure))


def _perplexity(scorer: Scorer, cut: Cut) -> float:
    return scorer.score([cut])[cut].perplexity


def remaining(decoder: Decoder, cut: Cut) -> float:
    """The share of the parameters that is left."""
    total = sum(p.numel() for p in decoder.model.parameters())
    return 1 - sum(p.numel() for block in cut for p in decoder.blocks[block].parameters()) / total


@torch.no_grad()
def latency_share(decoder: Decoder, cut: Cut) -> float:
    """Time per generated token without some blocks, relative to the whole model's; the median of alternating steps."""
    ids = torch.full((1, 1), 3, device=decoder.model.device)

    def step() -> float:
        if decoder.model.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        decoder.head(decoder.hidden(input_ids=ids, use_cache=False))
        if decoder.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    ratios = []
    for _ in range(STEPS + 2):
        whole = step()
        with without_blocks(decoder.model, cut):
            ratios.append(step() / whole)
    return statistics.median(ratios[2:])  # the first ones warm up

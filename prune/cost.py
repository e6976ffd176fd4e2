"""Cost of choosing blocks and of healing.

A greedy search is counted as if no cut were dropped early; each cut runs from its block on, about half of the remaining
blocks. `beam` and `blocks: auto` have no figure, because what they try depends on their results.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from ..core.cost import Need, Overrides, Setting, StageCost, halves, worst
from ..core.errors import UserError
from ..core.geometry import Geometry
from ..core.units import megabytes
from ..core.work import Work, forward
from .config import PruneConfig
from .heals import Heal, LeastSquares
from .heals.none import NoHeal
from .searches.greedy import Greedy
from .searches.lowest import Lowest
from .searches.window import Window

RUNTIME = 600e6  # measured with a tiny model on Linux, torch 2.13 for CPUs
CHUNK = 256  # positions whose logits are held at once when cuts are scored
HELD = 1024  # tokens whose hidden states around every block are kept for selecting ridges
EVERY = 8  # every EVERY-th packed row is held out for that
RIDGES = (1e-2, 1e-1, 1.0)  # for scoring healed cuts where the heal has no ridges of its own
GUARDED = 3  # cuts that are compared on the held-out rows at the end
GAPS_PER_BLOCK = 1 / 2  # gaps per dropped block of a free-form cut; on SmolLM2 2 to 4 gaps for 6 blocks, 2 or 3 for 9
SQUARES = 3  # matrix products with the features' sums per candidate, besides the solution


def _leaves(config: PruneConfig, at: Setting) -> Setting:
    """The model without the dropped blocks, measured pruned and healed."""
    dropped = _dropped(config, at.shape)
    if dropped >= at.shape.blocks:
        raise UserError(f"prune.blocks is {dropped}, but the model has {at.shape.blocks} blocks")
    kept = at.shape.blocks - dropped
    checkpoints = 1 if config.heal.kind == "none" else 2
    return replace(at, kept=kept, exact=config.blocks != "auto", measured=(*at.measured, *[kept] * checkpoints))


def _dropped(config: PruneConfig, shape: Geometry) -> int:
    """Number of blocks to drop. For `auto` only what the goal determines beforehand, else 0: an upper bound of cost."""
    if config.blocks != "auto":
        return config.blocks
    if config.goal is None or config.goal.size is None:
        return 0
    sizes = [shape.parameters(shape.blocks - n) / shape.parameters(shape.blocks) for n in range(shape.blocks)]
    return next((n for n, size in enumerate(sizes) if size <= config.goal.size), shape.blocks - 1)


def _need(config: PruneConfig, at: Setting) -> Need:
    """One batch's hidden states at all block boundaries, and the sums of the least-squares fit."""
    shape, after = at.shape, _leaves(config, at)
    tokens = config.calibration.batch * config.calibration.length
    inner = _features(config.heal, shape)
    square_sums = inner * (inner + 2 * shape.hidden) * 8  # sums of the rows that are fitted or held out
    sums = 0 if config.heal.kind == "none" else 4 * square_sums  # both, and the solution's own copies
    note = f"{after.kept} of {shape.blocks} blocks stay"
    if config.blocks == "auto" and after.kept == shape.blocks:
        note = "as many blocks go as the goal allows"
    states = (shape.blocks + 1) * tokens * shape.hidden * at.size
    holding = {"runtime": at.runtime(RUNTIME), "weights": at.whole}
    scanning = holding | {"activations": states + tokens * shape.state * at.size}
    host = 0
    if at.cuda:  # solved in the machine's own memory; here the sums, and the matrix before
        healing = holding | {"activations": tokens * (4 * shape.hidden + shape.state) * at.size}
        healing["other"], host = (sums // 2 + inner * shape.hidden * 8 if sums else 0), sums
    else:
        healing = scanning | {"other": sums}
    searching = dict(scanning)
    if config.splits:
        searching["logits"] = CHUNK * shape.vocab * 4 * 4  # and their logarithms, probabilities, and the products
    if config.splits and config.scores_healed:  # prune/moments.py
        longest = shape.blocks // 2 if config.blocks == "auto" else config.blocks
        square = shape.blocks * shape.hidden**2 * 4
        statistics = (longest + 1) * square
        held = 2 * shape.blocks * min(HELD, config.calibration.tokens // EVERY) * shape.hidden * 4
        kept = statistics + held  # until the blocks are chosen
        maps = longest * square // 2  # that are tried out
        if at.cuda:  # all in the machine's own memory; here one batch's states, and a map and what it is solved from
            searching["other"] = max(2 * states, 6 * shape.hidden**2 * 8)
            host = kept + maps + (sums if config.blocks == "auto" else 0)
            host = max(host, sums)
        else:
            searching["other"] = kept + max(2 * states, maps)
            if config.blocks == "auto":  # heals cuts while it chooses
                healing["other"] += kept
        note += f"; statistics of all gaps {megabytes(statistics)}"
    return Need(worst(scanning, searching, healing), after.small, note, host=host)


def _changes(config: PruneConfig, _at: Setting) -> Iterable[Overrides]:
    return ((f"prune.calibration.batch={size}",) for size in halves(config.calibration.batch, 1))


def _work(config: PruneConfig, at: Setting) -> Work | None:
    """The importance pass, the search and healing; None where the recipe does not determine it."""
    greedy = isinstance(config.search, Greedy)
    if config.blocks == "auto" or not (greedy or isinstance(config.search, (Window, Lowest))):
        return None
    if not (greedy or config.importance.of_one_pass) or not isinstance(config.heal, (LeastSquares, NoHeal)):
        return None
    calibration = config.calibration
    tokens = calibration.tokens
    if greedy:
        tokens = max(calibration.length, tokens - calibration.scoring - calibration.held_out)
    scan = Work(forward(at.shape, at.shape.blocks, tokens, calibration.length / 2, 0))
    work = scan + _healing(config, config.blocks, tokens, at)
    return work + _greedy(config, config.blocks, tokens, at) if greedy else work


def greedy_runs(blocks: int, candidates: int, count: int) -> tuple[float, int]:
    """How many block passes over the scoring rows it takes to drop `count` blocks, and how many cuts are scored."""
    runs, cuts = 0.0, 0
    for dropped in range(count):
        left, tried = blocks - dropped, candidates - dropped
        runs += tried * left / 2 + left  # and the part that all cuts share
        cuts += tried
    return runs, cuts


def _greedy(config: PruneConfig, count: int, tokens: int, at: Setting) -> Work:
    """Rounds over all candidates on the scoring rows, then the guard on the held-out rows."""
    calibration, shape = config.calibration, at.shape
    half, total, hidden = calibration.length / 2, shape.blocks, shape.hidden
    candidates = total - (1 if config.heal.kind == "none" else 2)
    runs, cuts = greedy_runs(total, candidates, count)
    scored, held = calibration.scoring, calibration.held_out
    flops = forward(shape, runs, scored, half, 0) + cuts * forward(shape, 0, scored, 0)
    flops += GUARDED * forward(shape, total, held, half)
    for rows in (scored, held):  # the unpruned model's logits, and the head's rows weighted by them
        flops += forward(shape, total, rows, half, 2 * rows)
    if not config.scores_healed:
        return Work(flops)
    pairs = sum(min(count, total - 1 - block) + 1 for block in range(total))
    ridges = len(config.heal.ridge) if isinstance(config.heal, LeastSquares) else len(RIDGES)
    maps = candidates + 2 * count  # a round's new gaps: what neighbours the blocks dropped before
    double = 2 * tokens * pairs * hidden**2 + maps * ridges * (2 / 3 + 2) * hidden**3
    flops += forward(shape, total, tokens, half, 0) + 2 * cuts * scored * hidden**2
    # A GPU's products are added up in the machine's own memory: read and written, and moved there before.
    moved = math.ceil(tokens / (calibration.length * calibration.batch)) * 3 * pairs * hidden**2 * 8
    return Work(flops, double=double, host_read=moved if at.cuda else 0)


def _healing(config: PruneConfig, count: int, tokens: int, at: Setting) -> Work:
    """Per gap: passes up to it (half of the model on average), the sums, and their solutions with every ridge."""
    heal, shape, hidden = config.heal, at.shape, at.shape.hidden
    if not isinstance(heal, LeastSquares) or not count:
        return Work()
    gaps = 1 if isinstance(config.search, Window) else math.ceil(count * GAPS_PER_BLOCK)
    passes = heal.rounds * (2 * gaps - 1)  # after a healed gap the unpruned model runs as well
    features = _features(heal, shape)
    sums = heal.rounds * gaps * 2 * tokens * features * (features + 2 * hidden)
    tried = heal.rounds * gaps * (len(heal.ridge) + 1)
    square = 2 * features**2 * hidden
    solving = tried * (heal.solutions * (2 / 3 * features**3 + square) + SQUARES * square)
    run = Work(passes * forward(shape, shape.blocks / 2, tokens, config.calibration.length / 2, 0), double=sums)
    return run + (Work(host_double=solving) if at.cuda else Work(double=solving))  # in the machine's own memory


def _features(heal: Heal, shape: Geometry) -> int:
    """Number of features per token that a fit sums over."""
    return shape.intermediate if isinstance(heal, LeastSquares) and heal.fits_down_proj else shape.hidden


COST = StageCost[PruneConfig](_need, _work, _leaves, _changes)

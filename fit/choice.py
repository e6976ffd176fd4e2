"""Which candidate is measured next, and which one is recommended. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.units import megabytes, number
from ..records.fit import FitFigures
from .candidates import Combination, front
from .limits import Limits

SLACK = 1.5  # times the best KL within the limits: a candidate that is predicted to be worse is not promising
SURE = 2.0  # standard errors that two candidates must be apart
SMALLEST = 1e-9  # nats: no difference that anything could tell


@dataclass(frozen=True)
class Found:
    """A measured candidate: its figures, and its KL at every position, the same positions for all."""

    candidate: Combination
    figures: FitFigures
    kl: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """Mean KL of one candidate over another's, from the same positions, and its standard error, in nats."""

    mean: float
    error: float
    positions: int

    @property
    def sure(self) -> bool:
        return abs(self.mean) > SURE * self.error

    @property
    def needed(self) -> int | None:
        """Positions that would tell the two apart, were the difference what it seems; None where there is none."""
        if abs(self.mean) < SMALLEST:
            return None
        return math.ceil(self.positions * (SURE * self.error / self.mean) ** 2)


def difference(a: Found, b: Found) -> Difference:
    """How much worse `a` is than `b`."""
    values = [x - y for x, y in zip(a.kl, b.kl, strict=True)]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Difference(statistics.fmean(values), error, len(values))


def next_candidate(
    predicted: Mapping[Combination, FitFigures], measured: Mapping[Combination, FitFigures], limits: Limits
) -> Combination | None:
    """The most promising candidate that was not measured: what may be the best within the limits first, of each kind
    (a plain mix, types of its own for the size, a cut, a smaller cache) the best; then what is left of the front. None
    where nothing is."""
    left = {c: f for c, f in predicted.items() if c not in measured}
    within = {c: f for c, f in left.items() if limits.meets(f)}
    for kind in (_is_plain, _is_sized, _is_cut, _is_small_cache):
        if not any(kind(c) and limits.meets(f) for c, f in measured.items()):
            best = min((c for c in within if kind(c)), key=lambda c: (within[c].kl, c), default=None)
            if best is not None:
                return best
    best_measured = min((f.kl for f in measured.values() if limits.meets(f)), default=math.inf)
    promising = [c for c in within if within[c].kl <= SLACK * best_measured]
    if promising:
        return min(promising, key=lambda c: (within[c].kl, c))
    together = list({**predicted, **measured}.items())
    by_bytes = front(together, lambda item: item[1].kl, lambda item: item[1].bytes)
    by_latency = front(together, lambda item: item[1].kl, lambda item: item[1].latency)
    rest = [c for c, _ in [*by_bytes, *by_latency] if c in left]
    return min(rest, key=lambda c: (left[c].kl, c), default=None)


def _is_plain(candidate: Combination) -> bool:
    return candidate.plain


def _is_cut(candidate: Combination) -> bool:
    return candidate.removed > 0


def _is_sized(candidate: Combination) -> bool:
    return candidate.removed == 0 and candidate.whole_cache and candidate.sized


def _is_small_cache(candidate: Combination) -> bool:
    return candidate.removed == 0 and not candidate.whole_cache


def recommend(found: Sequence[Found], limits: Limits) -> Found:
    """The best measured candidate within the limits. Of those that the positions do not tell from it, the one that
    changes the model least: fewest blocks cut, then the whole cache, then the smallest file."""
    within = [each for each in found if limits.meets(each.figures)]
    best = min(within, key=lambda each: (each.figures.kl, each.candidate))
    alike = [each for each in within if each is best or not difference(each, best).sure]
    return min(alike, key=lambda each: (each.candidate.removed, not each.candidate.whole_cache, each.figures.bytes))


def reason(chosen: Found, found: Sequence[Found], smallest: tuple[str, int], limits: Limits) -> str:
    """Why, in plain words. `smallest` is the plain mix with the smallest file, and its bytes."""
    asked, within = " and ".join(limits.texts()), [each for each in found if limits.meets(each.figures)]
    best = min(within, key=lambda each: (each.figures.kl, each.candidate))
    cuts, uncut = ([each for each in within if (each.candidate.removed > 0) is cut] for cut in (True, False))
    count = chosen.candidate.removed
    if count:
        words = f"Cut {count} block{'' if count == 1 else 's'}. Within {asked}, {_told(chosen)}"
    else:
        words = f"Do not cut. Within {asked}, the unpruned model as {_told(chosen)}"
    if best is chosen:
        words += " was the best that was measured"
    else:
        words += f" changes the model least of those that cannot be told from the best on these rows, {_told(best)}"
    if not count:
        if cuts and not best.candidate.removed:
            rival = min(cuts, key=lambda each: each.figures.kl)
            words += f"; the best with a cut, {_told(rival)}"
            words += "" if difference(rival, chosen).sure else ", cannot be told from it on these rows"
        return words + "."
    if uncut:
        rival = min(uncut, key=lambda each: each.figures.kl)
        return words + f"; the best without a cut, {_told(rival)}, is worse."
    name, size = smallest
    if limits.size is not None and size > limits.size:
        return words + f". No plain file of the unpruned model is that small: {name} has {megabytes(size)}."
    return words + f". No file of the unpruned model that was measured is within {asked}."


def _told(each: Found) -> str:
    figures = each.figures
    return f"{each.candidate.name} ({megabytes(figures.bytes)}, KL {number(figures.kl)})"


def doubts(chosen: Found, found: Sequence[Found], limits: Limits) -> list[str]:
    """Which candidates within the limits the positions do not tell from the chosen one, and how many would."""
    said = []
    for each in found:
        if each is chosen or not limits.meets(each.figures):
            continue
        gap = difference(each, chosen)
        if not gap.sure:
            enough = f"about {gap.needed:,} would" if gap.needed else "their figures are the same"
            said.append(
                f"{gap.positions:,} tokens do not tell {each.candidate.name} from {chosen.candidate.name} "
                f"(KL {gap.mean:+.4f} ± {gap.error:.4f}); {enough}"
            )
    return said

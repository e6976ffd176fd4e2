"""Rounds of scored cuts, for the searches. Each goes into the study's ledger, from which a killed search resumes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..core.stage import Advance
from ..modeling.cuts import Cut, cut, describe
from ..records.importance import Round
from .config import PruneConfig
from .cost import RIDGES
from .metrics.angular import Angular
from .metrics.influence import Influence
from .scoring import Measure, Scorer
from .searches import Scored
from .searches.lowest import Lowest
from .searches.window import Window
from .study import Study


class Trials:
    """Scores cuts for one search, on the study's scoring rows and on its held-out rows."""

    def __init__(self, study: Study, config: PruneConfig, search: Scored, count: int, candidates: range):
        self.study, self.config, self.count, self.candidates = study, config, count, candidates
        self.search = search
        self.measure: Measure = search.score
        self._advance: Advance = lambda n=1, note="": None

    @contextmanager
    def progress(self, trials: int) -> Iterator[None]:
        """A progress bar for about `trials` scored cuts that shows the best so far."""
        with self.study.progress.bar("search", trials) as advance:
            self._advance = advance
            yield

    def grow(self, width: int) -> list[Cut]:
        """The best `width` cuts of `count` blocks, best first; a beam search that adds one block per round."""
        beam: list[Cut] = [()]
        for size in range(1, self.count + 1):
            scores: dict[Cut, float] = {}
            for parent in beam:
                children = [cut([*parent, block]) for block in self.candidates if block not in parent]
                scores |= self._scores([child for child in children if child not in scores], parent, width)
            beam = sorted(scores, key=lambda c: (scores[c], c))[:width]
            self._note(size, beam[0], scores[beam[0]])
        return beam

    def exchange(self, current: Cut, visited: Collection[Cut]) -> Cut | None:
        """The best unvisited cut that differs from the current one in one block; None if there is none."""
        scores: dict[Cut, float] = {}
        for block in current:
            parent = cut(set(current) - {block})
            children = [cut([*parent, other]) for other in self.candidates if other not in current]
            scores |= self._scores([child for child in children if child not in visited], parent, 1)
        return min(scores, key=lambda c: (scores[c], c)) if scores else None

    def best(self, cuts: Sequence[Cut]) -> Cut:
        """The best of the cuts on the held-out rows; of equals the first."""
        values = {c: self.held_out(c) for c in cuts}
        return min(values, key=lambda c: values[c])

    def held_out(self, cut: Cut) -> float:
        """A cut's nats per token on the held-out rows."""
        key = f"held-out {self.measure} {self._how} {list(cut)}"
        return self.study.recorded(key, lambda: self._scorer(held_out=True).score([cut])[cut].mean)

    def guarded(self, best: Cut) -> Cut:
        """The cut, or that of a cheap single-pass method where this scores better on the held-out rows."""
        if not self.search.guard:
            return best
        angular, influence = (
            self.config.model_copy(update={"importance": metric}) for metric in (Angular(), Influence())
        )
        cheap = {
            "angular window": Window().choose(self.study, angular, self.count, self.candidates),
            "lowest influence": Lowest().choose(self.study, influence, self.count, self.candidates),
        }
        chosen = self.best([best, *cheap.values()])
        compared = {self.search.kind: best, **cheap}
        self.study.notes["guard"] = {
            name: {"dropped": list(value), "held_out": self.held_out(value)} for name, value in compared.items()
        }
        if chosen != best:
            name = next(name for name, value in cheap.items() if value == chosen)
            self.study.progress.note(
                f"held-out rows prefer the {name} ({describe(chosen)}) to the search's cut ({describe(best)})"
            )
        return chosen

    def _scores(self, cuts: list[Cut], parent: Cut, keep: int) -> dict[Cut, float]:
        """Nats per token on the scoring rows, of the cuts that were not dropped early."""
        if not cuts:
            return {}
        key = f"{self.measure} {self._how} keep {keep} {[list(c) for c in cuts]}"

        def score() -> Any:
            scorer = self._scorer()
            scorer.prepare()  # not counted in the round's cost: a resumed search has to repeat it
            before = scorer.spent
            scores = scorer.score(cuts, parent, keep=keep, advance=self._advance)
            return {
                "scores": [[list(c), s.mean] for c, s in scores.items() if s.complete],
                "passes": (scorer.spent - before) / (scorer.rows * self.study.num_blocks),
            }

        known = self.study.recorded(key, score)
        self.study.remember(("counted", key), lambda: self._count(known["passes"]))
        return {tuple(c): value for c, value in known["scores"]}

    def _count(self, passes: float) -> None:
        """Add a round's cost to the notes; its scores may be asked for again, but it counts once."""
        self.study.notes["passes"] = self.study.notes.get("passes", 0.0) + passes

    def _scorer(self, *, held_out: bool = False) -> Scorer:
        return self.study.scorer(self.measure, self._moments(), held_out=held_out)

    @property
    def _how(self) -> str:
        return "healed" if self.config.scores_healed else "pruned"

    def _moments(self) -> Any:
        if not self.config.scores_healed:
            return None
        longest = min(self.study.longest or self.count, len(self.candidates))
        heal = self.config.heal
        ridges = getattr(heal, "ridge", None) or RIDGES
        return self.study.moments(longest, ridges, getattr(heal, "toward", "identity"))

    def _note(self, size: int, best: Cut, score: float) -> None:
        rounds = self.study.notes.setdefault("rounds", [])
        entry: Round = {"dropped": list(best), "score": score}
        if entry not in rounds:  # a search of larger cuts passes through the same rounds
            rounds.append(entry)
        self._advance(0, f"best {size}: {describe(best)} ({self.measure} {score:.4f})")

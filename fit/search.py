"""One fit from its rows to its recommendation: what is measured, in which order, and when it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.stage import Progress
from ..core.units import duration, megabytes, number
from ..modeling.cuts import Cut, cut, describe
from ..pipeline.plan import find_device
from ..records.fit import FitFigures
from ..runtime.cost import kv_bytes_per_token
from .candidates import CACHES, Combination, combinations
from .choice import Found, next_candidate, recommend
from .damage import Damage
from .ledger import Clock, Ledger
from .measuring import CandidateBench, make_bench
from .prediction import Knowledge, MeasuredSpeeds, PlannedSpeeds, Speeds, Timing
from .request import FitRequest, removable

# Shares of all time by which a part ends; what a part does not need is left to those after it.
TYPES, CUTS, MEASURED = 0.35, 0.65, 1.0
MOST = 20  # candidates measured, whatever the time
WORSE = 2.0  # times the best KL within the limits: cuts beyond are no longer tried
MISSES = 2  # such cuts in a row
EIGHT_BITS = {"llama.cpp": "Q8_0", "onnx": "int8"}
HOPE = 1.5  # times a limit of time or memory: predictions beyond are not just wrong


@dataclass
class FitSearch:
    """The state of a fit. Everything that takes time is in the ledger."""

    damage: Damage
    request: FitRequest
    known: Knowledge
    ledger: Ledger
    clock: Clock
    progress: Progress
    name: Callable[[int], str]  # the model's in a file, by its blocks
    cuts: dict[int, Cut] = field(default_factory=lambda: {0: ()})
    predicted: dict[Combination, FitFigures] = field(default_factory=dict)  # before it was measured
    found: dict[Combination, Found] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def run(self) -> Found:
        """Measure what there is time for; the recommended candidate. `UserError` where nothing meets the limits."""
        self._types()
        self._measure_until(lambda: len(self.found) >= 2)
        self._check_hope()
        self._cuts()
        self._measure_until(lambda: len(self.found) >= MOST)
        within = [each for each in self.found.values() if self.request.limits.meets(each.figures)]
        if not within:
            told = {c: f for c, f in self.all_predicted().items() if c not in self.found}
            told |= {c: each.figures for c, each in self.found.items()}
            raise self.request.limits.refuse([(c.name, f) for c, f in told.items()], "found")
        return recommend(list(self.found.values()), self.request.limits)

    def all_predicted(self) -> dict[Combination, FitFigures]:
        """What is expected of every candidate by now."""
        speeds, context = self.speeds, self.request.limits.context
        every = combinations(sorted(self.known.cuts), self.request.mixes, self.request.caches)
        return {c: self.known.predict(c, context, speeds) for c in every if self.known.knows(c)}

    @property
    def speeds(self) -> Speeds:
        """Of the named device; of this machine as far as files were timed on it, before that the plan's."""
        if self.request.device is not None:
            return PlannedSpeeds(self.request.device, self.known.shape)
        if self.timings:
            return MeasuredSpeeds(tuple(self.timings))
        return PlannedSpeeds(find_device("cpu-2core"), self.known.shape)

    def _types(self) -> None:
        """The damage of each mix, those that may be the best within the limits first."""
        limits = self.request.limits
        sizes = {mix: size.bytes for (removed, mix), size in self.known.sizes.items() if not removed}
        room = min(limits.size or max(sizes.values()), limits.memory or max(sizes.values()))
        order = sorted(sizes, key=lambda mix: (sizes[mix] > room, abs(sizes[mix] - room)))
        self.ledger.recorded("unpruned", lambda: self.damage.reference.complete)
        late = []
        for mix in order:
            key = f"type {mix}"
            if self.known.types and self.too_late(key, TYPES):
                late.append(mix)
                continue
            kl = self.ledger.recorded(key, lambda mix=mix: self._bench(0).of_type(mix))
            self.known.types[mix] = kl
            self.progress.note(f"{mix}: {megabytes(sizes[mix])}, KL {number(kl)}")
        self._roomier()
        if late:
            self.left_out.append(f"for want of time, the damage of {', '.join(late)} was not measured: raise --minutes")
        for cache in self.request.caches[1:]:  # until one is measured: as much as 8 bits cost all weights
            eight = EIGHT_BITS[self.request.engine]
            self.known.caches[cache] = self.known.types.get(eight, min(self.known.types.values()))

    def _roomier(self) -> None:
        """A cut leaves the same size more bits per weight: how much less rounding costs then, by the estimate."""
        known, limit = self.known, self.request.limits.size
        sized = [key for key in known.sizes if key[0] and Combination(*key).sized]
        if limit is None or not sized or sized[0][1] not in known.types:
            return
        eight = EIGHT_BITS[self.request.engine]
        whole = known.sizes[0, eight].bytes if (0, eight) in known.sizes else limit
        bytes_of = {removed: known.sizes.get((removed, eight)) for removed, _ in sized}
        alike = [limit if (size := bytes_of[removed]) is None else limit * whole // size.bytes for removed, _ in sized]
        shares = self.ledger.recorded(f"roomier {limit}", lambda: self._bench(0).roomier(limit, alike))
        known.roomier |= dict(zip(sized, shares, strict=True))

    def _cuts(self) -> None:
        """The damage of cuts of growing size, until they are hopeless, or the time is over."""
        least, misses = self._fewest(), 0
        self.damage.searched = self.ledger.recorded("searched", lambda: self._search_fits(max(least, 1)))
        if not self.damage.searched:
            self.left_out.append("for want of time, blocks were chosen by one pass over the rows, not by a search")
        for count in removable(self.known.shape)[1:]:
            key = f"cut {count}"
            if count > least and self.too_late(key, CUTS):
                blocks = "a block" if count == 1 else f"{count} blocks"
                self.left_out.append(f"for want of time, cuts of {blocks} and more were not tried: raise --minutes")
                return
            if count < least:
                continue  # nothing with so few blocks removed is within the limits
            chosen = self.ledger.recorded(key, lambda count=count: self._cut(count))
            self.cuts[count] = cut(chosen["dropped"])
            self.known.cuts[count] = chosen["kl"]
            self.progress.note(f"{count} cut ({describe(self.cuts[count])}): KL {number(chosen['kl'])} healed")
            predicted = {c: f for c, f in self.all_predicted().items() if self.request.limits.meets(f)}
            best = min((f.kl for f in predicted.values()), default=None)
            misses = misses + 1 if best is not None and chosen["kl"] > WORSE * best else 0
            if misses == MISSES:
                return

    def _cut(self, count: int) -> dict[str, Any]:
        chosen = self.damage.cut(count)
        return {"dropped": list(chosen), "kl": self.damage.of_cut(chosen)}

    def _fewest(self) -> int:
        """With how few removed blocks anything is predicted to be within the limits."""
        for count in removable(self.known.shape):
            if any(self.request.limits.meets(figures) for figures in self._guessed(count).values()):
                return count
        return removable(self.known.shape)[-1]

    def _guessed(self, count: int) -> dict[Combination, FitFigures]:
        """What is expected of all files without so many blocks, but for what the cut costs."""
        known = replace(self.known, cuts={count: 0.0})
        every = combinations([count], self.request.mixes, self.request.caches)
        return {c: known.predict(c, self.request.limits.context, self.speeds) for c in every if known.knows(c)}

    def _check_hope(self) -> None:
        """`UserError` now where nothing comes near the limits, rather than after all cuts."""
        limits = self.request.limits
        wider = replace(
            limits,
            memory=None if limits.memory is None else round(HOPE * limits.memory),
            latency_ms=None if limits.latency_ms is None else HOPE * limits.latency_ms,
        )
        guessed = [(c.name, f) for count in removable(self.known.shape) for c, f in self._guessed(count).items()]
        if not any(wider.meets(figures) for _, figures in guessed):
            raise limits.refuse(guessed, "predicted")

    def _search_fits(self, count: int) -> bool:
        """Whether searching for so many blocks fits in the time: each is looked for among all, half of the model each
        time."""
        damage = self.damage
        tokens = sum(len(row.input_ids) for row in damage.held_out)
        per_token = self.ledger.seconds("unpruned") / tokens
        rounds = count + MISSES
        needed = rounds * damage.blocks * damage.effort.scoring * per_token * 0.6
        return self.clock.allows(CUTS, needed)

    def _measure_until(self, enough: Callable[[], bool]) -> None:
        """Measure promising candidates, one after the other."""
        while not enough():
            predicted = self.all_predicted()
            figures = {c: each.figures for c, each in self.found.items()}
            candidate = next_candidate(predicted, figures, self.request.limits)
            if candidate is None:
                return
            key = f"measured {candidate.name} at {self.request.limits.context}"
            first = not any(c.plain for c in self.found)
            if not first and self.too_late(key, MEASURED):
                self.left_out.append(
                    f"for want of time, {candidate.name} and what is less promising was predicted only: raise --minutes"
                )
                return
            self._measure(candidate, key, predicted[candidate])

    def _measure(self, candidate: Combination, key: str, predicted: FitFigures) -> None:
        bench = self._bench(candidate.removed)
        value = self.ledger.recorded(key, lambda: bench.measure(candidate, self.cuts[candidate.removed]))
        measured = FitFigures.model_validate(value["figures"])
        self._learn(candidate, measured)
        if self.request.device is not None:
            measured = measured.model_copy(update={"latency": predicted.latency, "prefill": predicted.prefill})
        self.predicted[candidate] = predicted
        self.found[candidate] = Found(candidate, measured, tuple(value["kl"]))
        self.progress.note(
            f"measured {candidate.name}: {megabytes(measured.bytes)}, KL {number(measured.kl)} (predicted "
            f"{number(predicted.kl)}), {1000 * measured.latency:.2f} ms per token; "
            f"{duration(self.ledger.spent)} of {duration(self.clock.total)}"
        )

    def _bench(self, removed: int) -> CandidateBench:
        return make_bench(self.damage, self.request, self.name(self.known.shape.blocks - removed))

    def _learn(self, candidate: Combination, measured: FitFigures) -> None:
        """What a measured candidate says of others."""
        known, blocks = self.known, self.known.shape.blocks - candidate.removed
        size = known.sizes[candidate.removed, candidate.mix]
        self.timings.append(Timing(candidate.mix, size, blocks, measured.latency, measured.prefill))
        held = self.request.limits.context * kv_bytes_per_token(known.shape, blocks, candidate.cache)
        if len(self.timings) == 1:
            known.overhead = max(measured.memory - measured.bytes - held, 0)
        if candidate.plain:
            known.types[candidate.mix] = measured.kl
        whole = self.found.get(replace(candidate, cache=CACHES[self.request.engine][0]))
        if not candidate.whole_cache and whole is not None:
            known.caches[candidate.cache] = max(measured.kl - whole.figures.kl, 0.0)

    def too_late(self, key: str, share: float) -> bool:
        """Whether work that was not done before would end after this share of the time, if it takes as long as the last
        of its kind."""
        return not self.ledger.has(key) and not self.clock.allows(share, self.ledger.last(key.split()[0] + " "))

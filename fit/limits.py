"""What the user asked for, and whether anything can meet it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.errors import UserError
from ..core.units import megabytes
from ..records.fit import FitFigures


@dataclass(frozen=True)
class Limits:
    """Upper limits; None: none. `context` is the number of tokens that the cache must have room for."""

    size: int | None  # bytes of the file
    memory: int | None  # bytes of the process, weights and cache included
    context: int
    latency_ms: float | None  # per written token

    def texts(self) -> list[str]:
        """The limits as they are typed."""
        return [limit.text for limit in self._each()]

    def meets(self, figures: FitFigures) -> bool:
        """Whether a candidate with these figures is within all limits."""
        return all(limit.value(figures) <= limit.most for limit in self._each())

    def refuse(self, found: Sequence[tuple[str, FitFigures]], what: str) -> UserError:
        """Why none of some candidates (name, figures) meets the limits: the one that none does, or those that
        contradict each other. `what` says of what kind the figures are: "predicted", "measured"."""
        each = self._each()
        for limit in each:
            name, least = min(found, key=lambda item: limit.value(item[1]))
            if limit.value(least) > limit.most:
                return UserError(
                    f"{limit.text}: nothing comes that low; the least {what} is {limit.shown(limit.value(least))} "
                    f"({name}): raise it to that or more"
                )
        for first in each:
            for second in each:
                within = [(n, f) for n, f in found if first.value(f) <= first.most]
                name, least = min(within, key=lambda item: second.value(item[1]))
                if second.value(least) > second.most:
                    return UserError(
                        f"{first.text} and {second.text} contradict each other: of what meets the first, the least "
                        f"{what} for the second is {second.shown(second.value(least))} ({name}); raise one of them"
                    )
        together = " and ".join(limit.text for limit in each)
        return UserError(f"{together} contradict each other: nothing meets all of them at once; raise one of them")

    def _each(self) -> list[_Limit]:
        found = []
        if self.size is not None:
            found.append(_Limit(f"--size {megabytes(self.size)}", self.size, lambda f: f.bytes, megabytes))
        if self.memory is not None:
            text = f"--memory {megabytes(self.memory)} (with --context {self.context})"
            found.append(_Limit(text, self.memory, lambda f: f.memory, megabytes))
        if self.latency_ms is not None:
            text = f"--latency-ms {self.latency_ms:g}"
            found.append(_Limit(text, self.latency_ms, lambda f: 1000 * f.latency, lambda ms: f"{ms:.3g} ms"))
        return found


@dataclass(frozen=True)
class _Limit:
    text: str
    most: float
    value: Callable[[FitFigures], float]
    shown: Callable[[float], str]

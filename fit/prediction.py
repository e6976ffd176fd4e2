"""What a combination is expected to give, from what was measured of its parts. Pure.

Rounding, a cut and a smaller cache each move the predictions by an error of their own. KL is, to second order, the
square of such an error, and errors that know nothing of each other add up as squares do: the KL of a combination is
the sum of the KLs of its parts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..core.geometry import Geometry
from ..core.work import decoding
from ..pipeline.plan import Device
from ..records.fit import FitErrors, FitFigures
from ..runtime.cost import kv_bytes_per_token
from .candidates import WHOLE_CACHES, Combination

OVERHEAD = 60_000_000  # bytes of a runtime's process beside the file and the cache, before one was measured


PROMPT = 128  # tokens, of which a token's share is taken


@dataclass(frozen=True)
class FileSize:
    """A file before it is made."""

    bytes: int
    read: int  # bytes of the tensors that every written token reads: all but an embedding that is no head


class Speeds(Protocol):
    """Seconds per token, of files that were not timed."""

    def decode(self, mix: str, size: FileSize, blocks: int) -> float: ...

    def prefill(self, mix: str, size: FileSize, blocks: int) -> float: ...


class PlannedSpeeds:
    """Speeds on a named device, as `compress plan` counts them: stock llama.cpp on its processors, where it has some
    beside a card."""

    def __init__(self, device: Device, shape: Geometry):
        self.device, self.shape = device, shape

    def decode(self, mix: str, size: FileSize, blocks: int) -> float:
        return self._seconds(size, blocks, 0)

    def prefill(self, mix: str, size: FileSize, blocks: int) -> float:
        return (self._seconds(size, blocks, PROMPT) - self._seconds(size, blocks, 0)) / PROMPT

    def _seconds(self, size: FileSize, blocks: int, prompt: int) -> float:
        """One written token after a prompt."""
        work = decoding(self.shape, blocks, 1, 1, prompt, 1, size.read, 2)
        return self.device.seconds(work.beside(), "float32")


@dataclass(frozen=True)
class Timing:
    """A file that was timed: seconds per written token and per token of a prompt."""

    mix: str
    size: FileSize
    blocks: int
    decode: float
    prefill: float


@dataclass(frozen=True)
class MeasuredSpeeds:
    """Speeds of other files on the machine where some were timed.

    A written token reads all weights once, and each block costs something whatever its types: seconds =
    read / bandwidth + blocks × overhead. A prompt is bound by arithmetic: seconds per token = blocks × a time. A mix
    that was timed itself keeps its own ratio to that, since some types are unpacked faster than others.
    """

    timings: tuple[Timing, ...]

    def decode(self, mix: str, size: FileSize, blocks: int) -> float:
        per_byte, per_block = _two_rates([(t.size.read, t.blocks, t.decode) for t in self.timings])

        def model(read: int, blocks: int) -> float:
            return per_byte * read + per_block * blocks

        ratios = [t.decode / model(t.size.read, t.blocks) for t in self.timings if t.mix == mix]
        return model(size.read, blocks) * _geometric(ratios)

    def prefill(self, mix: str, size: FileSize, blocks: int) -> float:
        per_block = _geometric([t.prefill / t.blocks for t in self.timings])
        ratios = [t.prefill / t.blocks / per_block for t in self.timings if t.mix == mix]
        return blocks * per_block * _geometric(ratios)


def _two_rates(points: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """(a, b) ≥ 0 that make a·x + b·y nearest to t over points (x, y, t), in relative terms; b is 0 for one point."""
    rows = [(x / t, y / t) for x, y, t in points]
    xx, yy = sum(x * x for x, _ in rows), sum(y * y for _, y in rows)
    xy, sx, sy = sum(x * y for x, y in rows), sum(x for x, _ in rows), sum(y for _, y in rows)
    bytes_alone, blocks_alone = (sx / xx, 0.0), (0.0, sy / yy)
    determinant = xx * yy - xy * xy
    if determinant <= 1e-9 * xx * yy:  # one point, or all of the same shape
        return bytes_alone
    both = (sx * yy - sy * xy) / determinant, (sy * xx - sx * xy) / determinant
    if min(both) >= 0:
        return both
    return min(bytes_alone, blocks_alone, key=lambda ab: sum((ab[0] * x + ab[1] * y - 1) ** 2 for x, y in rows))


def _geometric(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios)) if ratios else 1.0


@dataclass
class Knowledge:
    """What is known by now."""

    shape: Geometry
    sizes: Mapping[tuple[int, str], FileSize]  # by removed blocks and mix
    types: dict[str, float] = field(default_factory=dict)  # KL of the unpruned model in a mix
    cuts: dict[int, float] = field(default_factory=lambda: {0: 0.0})  # KL of a healed cut
    caches: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WHOLE_CACHES, 0.0))  # KL of a smaller cache
    overhead: int = OVERHEAD  # bytes of a runtime's process beside the file and the cache
    # The share of a type's KL that is left where a cut leaves a size more bits per weight.
    roomier: dict[tuple[int, str], float] = field(default_factory=dict)

    def knows(self, candidate: Combination) -> bool:
        """Whether there is enough to predict it from."""
        parts = candidate.mix in self.types and candidate.removed in self.cuts and candidate.cache in self.caches
        return parts and (candidate.removed, candidate.mix) in self.sizes

    def predict(self, candidate: Combination, context: int, speeds: Speeds) -> FitFigures:
        """Its figures; `KeyError` unless it `knows` it."""
        blocks = self.shape.blocks - candidate.removed
        size = self.sizes[candidate.removed, candidate.mix]
        cache = context * kv_bytes_per_token(self.shape, blocks, candidate.cache)
        rounding = self.types[candidate.mix] * self.roomier.get((candidate.removed, candidate.mix), 1.0)
        return FitFigures(
            kl=rounding + self.cuts[candidate.removed] + self.caches[candidate.cache],
            bytes=size.bytes,
            memory=size.bytes + cache + self.overhead,
            latency=speeds.decode(candidate.mix, size, blocks),
            prefill=speeds.prefill(candidate.mix, size, blocks),
        )


Pairs = Sequence[tuple[FitFigures, FitFigures]]


def prediction_errors(pairs: Pairs, later: Pairs, *, timed: bool = True) -> FitErrors:
    """The errors of (predicted, measured) pairs. Memory and speeds count for the `later` ones alone, which were
    predicted after a file had been timed; `timed` is False where speeds were not measured."""

    def median(name: str, among: Pairs) -> float | None:
        found = [(getattr(p, name), getattr(m, name)) for p, m in among]
        errors = [abs(p - m) / m for p, m in found if m > 0]
        return statistics.median(errors) if errors else None

    return FitErrors(
        measured=len(pairs),
        kl=median("kl", pairs),
        bytes=median("bytes", pairs),
        memory=median("memory", later),
        latency=median("latency", later) if timed else None,
        prefill=median("prefill", later) if timed else None,
    )

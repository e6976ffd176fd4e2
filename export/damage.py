"""What each matrix costs in each type: bytes in the file, and estimated KL to the checkpoint, measured on its rows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..core.files import read_json, write_json
from ..core.stage import Progress
from .choose import Option
from .sensitivity import Term

Array = NDArray[np.float32]
SAMPLED = 1 << 17  # values of a matrix that are rounded to see what it costs; of larger ones some rows are drawn


class Named(Hashable, Protocol):
    """A type of a tensor."""

    @property
    def name(self) -> str: ...


K = TypeVar("K", bound=Named)


@dataclass(frozen=True)
class Candidates(Generic[K]):
    """A matrix (N, K) and the types that it may get."""

    bytes: Mapping[K, int]  # of the matrix in each of the types
    terms: Sequence[Term]
    read: Callable[[], Array]
    rounded: Callable[[Array, K], Array]  # some rows (n, K) as a file of that type gives them back


def measure_damage(
    matrices: Mapping[str, Candidates[K]], cache: Path | None = None, progress: Progress | None = None
) -> dict[str, dict[K, Option]]:
    """Every matrix in every type that it may get.

    `cache` is a file that keeps what was measured, from which a run that was killed goes on.
    """
    known: dict[str, dict[str, float]] = read_json(cache) if cache is not None and cache.exists() else {}
    found: dict[str, dict[K, Option]] = {}
    with (progress or Progress()).bar("damage of each type", len(matrices)) as advance:
        for name, matrix in matrices.items():
            costs = known.setdefault(name, {})
            missing = [kind for kind in matrix.bytes if kind.name not in costs]
            if missing:
                measured = rounding_costs(matrix.read(), matrix.terms, missing, matrix.rounded, len(name))
                costs |= {kind.name: cost for kind, cost in measured.items()}
                if cache is not None:
                    write_json(cache, known)
            found[name] = {kind: Option(size, costs[kind.name]) for kind, size in matrix.bytes.items()}
            advance(note=name)
    return found


def rounding_costs(
    values: Array, terms: Sequence[Term], kinds: Iterable[K], rounded: Callable[[Array, K], Array], seed: int
) -> Mapping[K, float]:
    """Estimated KL (nats per token) of rounding a matrix (N, K) to each of several types.

    Of large matrices rows are drawn, those that matter more likely (with replacement, and weighted accordingly).
    """
    weights = np.sum([term.rows.astype(np.float64) * term.columns.sum(dtype=np.float64) for term in terms], axis=0)
    count = max(8, SAMPLED // values.shape[1])
    if count < len(values) and weights.sum() > 0:
        chances = weights / weights.sum()
        edges = (np.arange(count) + np.random.default_rng(seed).random()) / count  # one draw from each equal part
        rows = np.minimum(np.searchsorted(np.cumsum(chances), edges), len(values) - 1)
        shares = 1 / (count * np.maximum(chances[rows], 1e-30))
    else:
        rows, shares = np.arange(len(values)), np.ones(len(values))
    drawn = np.ascontiguousarray(values[rows], np.float32)
    found = {}
    for kind in kinds:
        errors = (rounded(drawn, kind) - drawn).astype(np.float64) ** 2
        found[kind] = 0.5 * float(sum((shares * term.rows[rows]) @ (errors @ term.columns) for term in terms))
    return found

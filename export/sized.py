"""A file of a size that was asked for: which type each matrix gets, and whether there is such a file.

What the formats have in common; `gguf_sized.py` and `onnx_sized.py` say what a matrix may become in theirs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Generic

from ..core.errors import UserError
from ..core.stage import Progress
from ..modeling.weights import count_parameters
from ..runtime.artifact_sizes import Target, target_of
from .choose import choose, smallest, total
from .damage import Array, Candidates, K, measure_damage
from .sensitivity import Sensitivity

LEAST = 0.5  # of the average bits: types with fewer are looked at only where nothing else fits
AROUND = 64  # bytes that a matrix takes beside its weights, at most, more in one type than in another


@dataclass(frozen=True)
class Chosen(Generic[K]):
    """A type for every tensor."""

    like: str  # the plain type with the largest file that is no larger
    types: Mapping[str, K]
    importance: Mapping[str, Array]  # of the columns of every matrix; empty where nothing is quantized
    damage: float  # estimated KL to the checkpoint, nats per token

    def __str__(self) -> str:
        counts = Counter(kind.name for kind in self.types.values() if kind.name != "F32")  # of vectors
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


class Sizes(ABC, Generic[K]):
    """What sizes a checkpoint's file can have, and what is in it at each.

    `shapes` are those of the matrices whose type is chosen, (rows, columns); `others` are the types of other tensors.
    """

    form: str  # the recipe's key: gguf, onnx
    precise: K  # the type that loses nothing to speak of

    def __init__(
        self, checkpoint: Path, shapes: Mapping[str, Sequence[int]], others: Mapping[str, K] = MappingProxyType({})
    ):
        self.checkpoint, self.shapes, self.others = checkpoint, shapes, others
        self.parameters = count_parameters(checkpoint)

    @abstractmethod
    def kinds(self, columns: int, least: float = 0.0) -> list[K]:
        """The types that rows of so many columns may get, of at least so many bits per weight."""

    @abstractmethod
    def stored(self, shape: Sequence[int], kind: K) -> int:
        """Bytes of a matrix in a file."""

    @abstractmethod
    def bytes(self, types: Mapping[str, K]) -> int:
        """Of the whole file with these types of its matrices."""

    @abstractmethod
    def weight_bytes(self, types: Mapping[str, K]) -> int:
        """The same without what is no weight: vocabulary, metadata, graph."""

    @abstractmethod
    def like(self, types: Mapping[str, K]) -> str:
        """The plain type with the largest file that is no larger than that of these types; else the smallest."""

    @abstractmethod
    def importance(self, sensitivity: Sensitivity, imatrix: Mapping[str, Array]) -> dict[str, Array]:
        """Weights of the columns of every matrix."""

    @abstractmethod
    def candidates(
        self, sensitivity: Sensitivity, importance: Mapping[str, Array], least: float
    ) -> Mapping[str, Candidates[K]]:
        """Every matrix with the types of at least so many bits that it may get."""

    @cached_property
    def smallest(self) -> int:
        """Bytes of the smallest possible file."""
        return self.bytes(self._smallest)

    def check(self, name: str) -> None:
        """Raise `UserError` for a size that no choice of types reaches."""
        target = target_of(name)
        if target is None or self._limit(target) >= self._counted(target, self._smallest):
            return
        least = math.ceil(self.smallest / 1e4) / 100  # rounded up, so that what is said is possible
        bits = math.ceil(800 * self.weight_bytes(self._smallest) / self.parameters) / 100
        raise UserError(
            f"export.{self.form}: {name} is too small for {self.checkpoint.name}: with every tensor in its smallest "
            f"type the file has {least:.2f} MB ({bits:.2f} bits per weight); ask for at least that"
        )

    def needs_damage(self, name: str) -> bool:
        """Whether a size is one at which it matters what each tensor loses."""
        target = target_of(name)
        return target is not None and self._limit(target) < self._counted(target, self._all_precise)

    def chosen(
        self,
        name: str,
        sensitivity: Sensitivity | None,
        imatrix: Mapping[str, Array],
        *,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> Chosen[K]:
        """The types with the least damage at a size; `sensitivity` is not needed where `needs_damage` says so.

        `imatrix` has columns' weights for rounding by llama.cpp's name; what it lacks is taken from the sensitivity.
        `cache` is a file that keeps what types cost. Raises `UserError` for a size that is too small.
        """
        self.check(name)
        target = target_of(name)
        assert target is not None
        if not self.needs_damage(name):
            types = self._all_precise
            return Chosen(self.like(types), {**types, **self.others}, {}, 0.0)
        assert sensitivity is not None
        importance = self.importance(sensitivity, imatrix)
        room = self._room(target)
        options = measure_damage(self.candidates(sensitivity, importance, self._least_bits(room)), cache, progress)
        while True:
            types = choose(options, room) if smallest(options) <= room else self._smallest
            over = self._counted(target, types) - self._limit(target)
            if over <= 0:
                break
            room -= over  # what stands around the matrices depends a little on their types
        damage = total(options, types).damage
        return Chosen(self.like(types), {**types, **self.others}, importance, damage)

    def _limit(self, target: Target) -> int:
        """Bytes that are counted at most."""
        return target.bytes if target.bytes is not None else int((target.bits or 0) * self.parameters / 8)

    def _counted(self, target: Target, types: Mapping[str, K]) -> int:
        """A size in bytes is the whole file's, bits count the weights."""
        return self.bytes(types) if target.bytes is not None else self.weight_bytes(types)

    def _room(self, target: Target) -> int:
        """Bytes for the matrices."""
        return self._limit(target) - self._counted(target, self._smallest) + self._tensors(self._smallest)

    def _tensors(self, types: Mapping[str, K]) -> int:
        return sum(self.stored(shape, types[name]) for name, shape in self.shapes.items())

    @cached_property
    def _smallest(self) -> dict[str, K]:
        return {n: min(self.kinds(s[-1]), key=lambda kind: self.stored(s, kind)) for n, s in self.shapes.items()}

    @property
    def _all_precise(self) -> dict[str, K]:
        return dict.fromkeys(self.shapes, self.precise)

    def _least_bits(self, room: int) -> float:
        least = LEAST * 8 * room / self.parameters
        sizes = ([self.stored(s, kind) for kind in self.kinds(s[-1], least)] for s in self.shapes.values())
        return least if sum(min(found) + AROUND for found in sizes) <= room else 0.0

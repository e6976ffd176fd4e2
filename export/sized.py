"""A GGUF file of a size that was asked for: which type each tensor gets, and whether there is such a file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gguf import GGMLQuantizationType as Type

from ..core.errors import UserError
from ..core.stage import Progress
from ..modeling.weights import count_parameters
from ..runtime.artifact_sizes import Target, target_of
from .choose import choose
from .damage import Array, gguf_damage, gguf_types
from .gguf import Conversion
from .gguf_sizes import header_bytes, plain_sizes, stored_bytes
from .mixes import is_matrix
from .sensitivity import Sensitivity

LEAST = 0.5  # of the average bits: types with fewer are looked at only where nothing else fits


@dataclass(frozen=True)
class Chosen:
    """A type for every tensor."""

    like: str  # the plain type with the largest file that is no larger
    types: Mapping[str, Type]
    importance: Mapping[str, Array]  # of the columns of every matrix; empty where nothing is quantized
    damage: float  # estimated KL to the checkpoint, nats per token

    def __str__(self) -> str:
        counts = Counter(kind.name for kind in self.types.values() if kind != Type.F32)
        return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


class GgufSizes:
    """What sizes a checkpoint's GGUF can have, and what is in it at each.

    `depths` are those of a family, whose sizes are of all files that the deepest is read from; `name` is the model's in
    the file. Raises `UserError` for models that GGUF cannot hold.
    """

    def __init__(self, checkpoint: Path, *, name: str | None = None, depths: Sequence[int] = ()):
        self.checkpoint, self.name, self.depths = checkpoint, name, depths
        self.job = Conversion(checkpoint, "F16", name=name)
        shapes = self.job.source.shapes
        self.matrices = {n: shape for n, shape in shapes.items() if is_matrix(n, shape)}
        self.others = {n: Type.F32 for n in shapes if n not in self.matrices}
        self.overhead = header_bytes(self.job, depths)
        self.overhead += sum(stored_bytes(shapes[n], kind) for n, kind in self.others.items())

    @cached_property
    def plain(self) -> dict[str, int]:
        """The bytes of every plain type's file."""
        return plain_sizes(self.checkpoint, True, name=self.name, depths=self.depths)

    @property
    def precise(self) -> Type:
        """The type that loses nothing to speak of: the checkpoint's own if it is bfloat16, else float16."""
        dtypes = {tensor.dtype for tensor in self.job.source.tensors.headers.values()}
        return Type.BF16 if dtypes == {"BF16"} else Type.F16

    @cached_property
    def smallest(self) -> int:
        """Bytes of the smallest possible file."""
        return self.overhead + sum(min(stored_bytes(s, k) for k in gguf_types(s[-1])) for s in self.matrices.values())

    def budget(self, target: Target) -> int:
        """Bytes that the file may have."""
        if target.bytes is not None:
            return target.bytes
        assert target.bits is not None
        shapes = self.job.source.shapes
        others = sum(stored_bytes(shapes[n], kind) for n, kind in self.others.items())
        return self.overhead - others + int(target.bits * count_parameters(self.checkpoint) / 8)

    def check(self, name: str) -> None:
        """Raise `UserError` for a size that no choice of types reaches."""
        target = target_of(name)
        if target is None or self.budget(target) >= self.smallest:
            return
        tensors = self.smallest - self.overhead
        least = math.ceil(self.smallest / 1e4) / 100  # rounded up, so that what is said is possible
        bits = math.ceil(800 * tensors / count_parameters(self.checkpoint)) / 100
        raise UserError(
            f"export.gguf: {name} is too small for {self.checkpoint.name}: with every tensor in its smallest type the "
            f"file has {least:.2f} MB ({bits:.2f} bits per weight); ask for at least that"
        )

    def needs_damage(self, name: str) -> bool:
        """Whether a size is one at which it matters what each tensor loses."""
        target = target_of(name)
        return target is not None and self.budget(target) < self._all_precise

    @property
    def _all_precise(self) -> int:
        return self.overhead + sum(stored_bytes(shape, self.precise) for shape in self.matrices.values())

    def chosen(
        self,
        name: str,
        sensitivity: Sensitivity | None,
        imatrix: Mapping[str, Array],
        *,
        cache: Path | None = None,
        threads: int = 0,
        progress: Progress | None = None,
    ) -> Chosen:
        """The types with the least damage at a size; `sensitivity` is not needed where `needs_damage` says so.

        `imatrix` has columns' weights for rounding by llama.cpp's name; what it lacks is taken from the sensitivity.
        `cache` is a file that keeps what types cost. Raises `UserError` for a size that is too small.
        """
        self.check(name)
        target = target_of(name)
        assert target is not None
        if not self.needs_damage(name):
            types = dict.fromkeys(self.matrices, self.precise) | self.others
            return Chosen(self.precise.name, types, {}, 0.0)
        assert sensitivity is not None
        importance = self.importance(sensitivity, imatrix)
        room = self.budget(target) - self.overhead
        options = gguf_damage(
            self.job.source,
            sensitivity,
            importance,
            least_bits=self._least_bits(room),
            cache=cache,
            threads=threads,
            progress=progress,
        )
        types = choose(options, room)
        damage = sum(options[n][kind].damage for n, kind in types.items())
        return Chosen(self.like(types), types | self.others, importance, damage)

    def importance(self, sensitivity: Sensitivity, imatrix: Mapping[str, Array]) -> dict[str, Array]:
        """By llama.cpp's name, weights of the columns of every matrix."""
        originals = self.job.source.originals
        return {n: imatrix[n] if n in imatrix else sensitivity.importance(originals[n]) for n in self.matrices}

    def bytes(self, types: Mapping[str, Type]) -> int:
        """Of the file with these types of its matrices."""
        return self.overhead + sum(stored_bytes(shape, types[n]) for n, shape in self.matrices.items())

    def like(self, types: Mapping[str, Type]) -> str:
        """The plain type with the largest file that is no larger than that of these types; else the smallest."""
        size = self.bytes(types)
        below = {mix: found for mix, found in self.plain.items() if found <= size}
        return max(below, key=lambda mix: below[mix]) if below else min(self.plain, key=lambda mix: self.plain[mix])

    def _least_bits(self, room: int) -> float:
        weights = count_parameters(self.checkpoint)
        least = LEAST * 8 * room / weights
        sizes = ([stored_bytes(s, k) for k in gguf_types(s[-1], least)] for s in self.matrices.values())
        return least if sum(min(found) for found in sizes) <= room else 0.0

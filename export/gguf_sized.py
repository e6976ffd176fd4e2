"""GGUF files of a size: the types that ggml has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from ..modeling.gguf_layout import to_gguf
from .damage import Array, Candidates
from .gguf import Conversion
from .gguf_sizes import header_bytes, plain_sizes, stored_bytes
from .mixes import is_matrix
from .quantize import quantize
from .sensitivity import Sensitivity, Term
from .sized import Sizes

# Types that a tensor may get, by bits. The others lose against one of these at every size.
TYPES = (
    *(Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.MXFP4, Type.IQ4_XS),
    *(Type.Q4_K, Type.IQ4_NL, Type.Q4_1, Type.Q5_K, Type.Q5_0, Type.Q5_1, Type.Q6_K, Type.Q8_0, Type.F16),
)


def bits_of(kind: Type) -> float:
    """Bits per weight."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


class GgufSizes(Sizes[Type]):
    """What sizes a checkpoint's GGUF can have, and what is in it at each.

    `depths` are those of a family, whose sizes are of all files that the deepest is read from; `name` is the model's in
    the file. Raises `UserError` for models that GGUF cannot hold.
    """

    form = "gguf"

    def __init__(self, checkpoint: Path, *, name: str | None = None, depths: Sequence[int] = (), threads: int = 0):
        self.name, self.depths, self.threads = name, depths, threads
        self.job = Conversion(checkpoint, "F16", name=name)
        shapes = self.job.source.shapes
        others = {n: Type.F32 for n, shape in shapes.items() if not is_matrix(n, shape)}
        super().__init__(checkpoint, {n: shape for n, shape in shapes.items() if n not in others}, others)
        self.header = header_bytes(self.job, depths)

    @cached_property
    def plain(self) -> dict[str, int]:
        """The bytes of every plain type's file."""
        return plain_sizes(self.checkpoint, True, name=self.name, depths=self.depths)

    @property
    def precise(self) -> Type:  # type: ignore[override]
        """The checkpoint's own type if it is bfloat16, else float16."""
        dtypes = {tensor.dtype for tensor in self.job.source.tensors.headers.values()}
        return Type.BF16 if dtypes == {"BF16"} else Type.F16

    def kinds(self, columns: int, least: float = 0.0) -> list[Type]:
        return [kind for kind in TYPES if columns % GGML_QUANT_SIZES[kind][0] == 0 and bits_of(kind) >= least]

    def stored(self, shape: Sequence[int], kind: Type) -> int:
        return stored_bytes(shape, kind)

    def bytes(self, types: Mapping[str, Type]) -> int:
        return self.header + self.weight_bytes(types)

    def weight_bytes(self, types: Mapping[str, Type]) -> int:
        shapes = self.job.source.shapes
        others = sum(stored_bytes(shapes[n], kind) for n, kind in self.others.items())
        return others + sum(stored_bytes(shape, types[n]) for n, shape in self.shapes.items())

    def like(self, types: Mapping[str, Type]) -> str:
        size = self.bytes(types)
        below = {mix: found for mix, found in self.plain.items() if found <= size}
        return max(below, key=lambda mix: below[mix]) if below else min(self.plain, key=lambda mix: self.plain[mix])

    def importance(self, sensitivity: Sensitivity, imatrix: Mapping[str, Array]) -> dict[str, Array]:
        originals = self.job.source.originals
        return {n: imatrix[n] if n in imatrix else sensitivity.importance(originals[n]) for n in self.shapes}

    def candidates(
        self, sensitivity: Sensitivity, importance: Mapping[str, Array], least: float
    ) -> Mapping[str, Candidates[Type]]:
        source = self.job.source
        found = {}
        for name, shape in self.shapes.items():
            terms = [Term(self._turned(name, t.rows), t.columns) for t in sensitivity.terms[source.originals[name]]]
            sizes = {kind: stored_bytes(shape, kind) for kind in self.kinds(shape[-1], least)}
            rounded = partial(self._rounded, importance[name])
            found[name] = Candidates(sizes, terms, partial(source.read, name), rounded)
        return found

    def _turned(self, name: str, rows: Array) -> Array:
        """llama.cpp has the rows of some matrices in another order."""
        config = self.job.source.config
        return to_gguf(name, rows[:, None], config, config.num_hidden_layers)[:, 0]

    def _rounded(self, importance: Array, values: Array, kind: Type) -> Array:
        return np.asarray(gguf.dequantize(quantize(values, kind, importance, self.threads), kind))

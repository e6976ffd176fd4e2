"""What each matrix costs in each type: bytes in the file, and estimated KL to the checkpoint, measured on its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from ..core.files import read_json, write_json
from ..core.stage import Progress
from ..modeling.gguf_layout import to_gguf
from .choose import Option
from .gguf_sizes import stored_bytes
from .gguf_source import GgufSource
from .mixes import is_matrix
from .quantize import quantize
from .sensitivity import Sensitivity, Term

Array = NDArray[np.float32]
SAMPLED = 1 << 17  # values of a matrix that are rounded to see what it costs; of larger ones some rows are drawn
# Types that a tensor may get, by bits. The others lose against one of these at every size.
TYPES = (
    *(Type.IQ1_S, Type.IQ2_XXS, Type.IQ2_XS, Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.MXFP4, Type.IQ4_XS),
    *(Type.Q4_K, Type.IQ4_NL, Type.Q4_1, Type.Q5_K, Type.Q5_0, Type.Q5_1, Type.Q6_K, Type.Q8_0, Type.F16),
)


def bits_of(kind: Type) -> float:
    """Bits per weight."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


def gguf_types(columns: int, least: float = 0.0) -> list[Type]:
    """The types that rows of so many columns may get, of at least so many bits."""
    return [kind for kind in TYPES if columns % GGML_QUANT_SIZES[kind][0] == 0 and bits_of(kind) >= least]


def gguf_damage(
    source: GgufSource,
    sensitivity: Sensitivity,
    importance: Mapping[str, Array],
    *,
    least_bits: float = 0.0,
    cache: Path | None = None,
    threads: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[Type, Option]]:
    """Every matrix of a checkpoint, by llama.cpp's name, in every type it can have of at least so many bits.

    `importance` has the weights of their columns for rounding. `cache` is a file that keeps what was measured, from
    which a run that was killed goes on.
    """
    known: dict[str, dict[str, float]] = read_json(cache) if cache is not None and cache.exists() else {}
    shapes = {name: shape for name, shape in source.shapes.items() if is_matrix(name, shape)}
    found: dict[str, dict[Type, Option]] = {}
    with (progress or Progress()).bar("damage of each type", len(shapes)) as advance:
        for name, shape in shapes.items():
            kinds = gguf_types(shape[-1], least_bits)
            costs = known.setdefault(name, {})
            missing = [kind for kind in kinds if kind.name not in costs]
            if missing:
                costs |= _gguf_costs(source, name, sensitivity, importance[name], missing, threads)
                if cache is not None:
                    write_json(cache, known)
            found[name] = {kind: Option(stored_bytes(shape, kind), costs[kind.name]) for kind in kinds}
            advance(note=name)
    return found


def _gguf_costs(
    source: GgufSource,
    name: str,
    sensitivity: Sensitivity,
    importance: Array,
    kinds: Iterable[Type],
    threads: int,
) -> dict[str, float]:

    def turned(rows: Array) -> Array:  # llama.cpp has the rows of some matrices in another order
        return to_gguf(name, rows[:, None], source.config, source.config.num_hidden_layers)[:, 0]

    terms = [Term(turned(term.rows), term.columns) for term in sensitivity.terms[source.originals[name]]]

    def rounded(values: Array, kind: Type) -> Array:
        return gguf.dequantize(quantize(values, kind, importance, threads), kind)

    return {
        kind.name: cost for kind, cost in rounding_costs(source.read(name), terms, kinds, rounded, len(name)).items()
    }


def rounding_costs(
    values: Array, terms: Sequence[Term], kinds: Iterable[Type], rounded: Callable[[Array, Type], Array], seed: int
) -> Mapping[Type, float]:
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

"""How a pruned checkpoint differs from the model it was cut from, besides the blocks it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .blocks import dropped_since, kept_blocks, name_before
from .families import HEAD
from .load import load_config
from .weights import Tensors

_PIECE = 1 << 22  # numbers compared at once in float64


@dataclass(frozen=True)
class Changes:
    """How to get from the base to the pruned model; names are the base's."""

    dropped: list[int]  # blocks, by their number in the base
    replaced: dict[str, Tensor]  # parameter -> its value in the pruned model
    scaled: dict[str, float]  # linear layer (weight and bias) -> the factor on everything it gives

    @property
    def parameters(self) -> int:
        """How many numbers have to be stored in addition to the base's."""
        return sum(tensor.numel() for tensor in self.replaced.values())


def find_changes(base: Path, pruned: Path, dtype: str = "float32") -> Changes:
    """Compare two checkpoint folders tensor by tensor, both in `dtype`.

    Healing changes few tensors, and multiplies some by one number: a linear layer whose weight and bias changed in
    no other way (to the rounding of `dtype`) counts as scaled, any other difference as replaced.
    """
    config, whole = load_config(pruned), load_config(base)
    dropped = dropped_since(config, whole)
    kept = [number for number in range(len(kept_blocks(whole))) if number not in set(dropped)]
    before, after, kind = Tensors(base), Tensors(pruned), getattr(torch, dtype)
    layers: dict[str, dict[str, str]] = {}  # in the base -> part -> name in the pruned model
    for name in sorted(after):
        if not (config.tie_word_embeddings and name == HEAD):
            layer, _, part = name_before(name, kept).rpartition(".")
            layers.setdefault(layer, {})[part] = name
    replaced, scaled = {}, {}
    for layer, names in layers.items():
        parts = {part: (before[f"{layer}.{part}"].to(kind), after[name].to(kind)) for part, name in names.items()}
        changed = {f"{layer}.{part}": new for part, (old, new) in parts.items() if not torch.equal(old, new)}
        # A norm's weight is small, and no layer that could be scaled.
        matrix = bool(changed) and parts["weight"][1].ndim == 2
        factor = _factor(list(parts.values())) if matrix else None
        if factor is None:
            replaced |= changed
        else:
            scaled[layer] = factor
    return Changes(dropped, replaced, scaled)


def _factor(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """s where new = s·old, for all of the pairs and to the last bit of their type, else None."""
    norm = sum(float(old @ old) for old, _ in _pieces(pairs))
    if norm == 0:
        return None
    factor = sum(float(old @ new) for old, new in _pieces(pairs)) / norm
    eps = torch.finfo(pairs[0][1].dtype).eps
    exact = (bool(((factor * old - new).abs() <= eps * new.abs()).all()) for old, new in _pieces(pairs))
    return factor if all(exact) else None


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The numbers of all pairs in float64, in chunks."""
    for old, new in pairs:
        for a, b in zip(old.flatten().split(_PIECE), new.flatten().split(_PIECE), strict=True):
            yield a.double(), b.double()

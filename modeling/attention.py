"""What the attention of each block is given during a forward pass: queries and keys, normed and rotated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .blocks import Decoder


@dataclass(frozen=True)
class Attended:
    """One block's queries (B, heads, T, d) and keys (B, KV heads, T, d) as they are multiplied."""

    block: int
    queries: Tensor
    keys: Tensor
    scaling: float  # of the products: 1/√d, but in Gemma-3
    window: int | None  # a query sees only so many of the newest keys, its own among them; None: all


@contextmanager
def watched_attention(decoder: Decoder, watch: Callable[[Attended], None]) -> Iterator[None]:
    """Call `watch` in every block of every forward pass, after q, k and v are projected and before they are attended.

    transformers finds attention by name; the function of the model's name is wrapped for as long as the context lasts.
    Raises `ValueError` for a model loaded with `eager` attention, which has no name there.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    name = decoder.config._attn_implementation
    if name not in FUNCTIONS:
        raise ValueError(f"attention {name!r} cannot be watched; load the model with sdpa")
    plain = FUNCTIONS[name]
    numbers = {id(block.self_attn): number for number, block in enumerate(decoder.blocks)}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if id(module) in numbers:
            scaling = options.get("scaling") or query.shape[-1] ** -0.5
            watch(Attended(numbers[id(module)], query, key, scaling, options.get("sliding_window")))
        return plain(module, query, key, value, mask, **options)

    before = FUNCTIONS._local_mapping.get(name)
    FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if before is None:
            del FUNCTIONS[name]
        else:
            FUNCTIONS[name] = before

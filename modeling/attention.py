"""Observing, or replacing, the attention of every block during a forward pass.

transformers finds attention by name. `watched_attention` wraps the function registered under the model's name;
`own_attention` registers a name of its own, for which no masks are made, and the forward pass carries the function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .blocks import Decoder

NAME = "compress_own_attention"


@dataclass(frozen=True)
class Heads:
    """One block's queries, keys and values for one row, after norms and rotary positions."""

    block: int
    queries: Tensor  # (heads, T, d)
    keys: Tensor  # (KV heads, T, d)
    values: Tensor  # (KV heads, T, d)
    scaling: float  # of the logits: 1/√d, but in Gemma-3
    window: int | None  # a query sees only so many of the newest positions, its own among them; None: all


Attend = Callable[[Heads], Tensor]  # → (heads, T, d)


def own_attention(decoder: Decoder, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
    """Hidden states after the final norm, (T, H), of one row: tokens (T,) at rotary positions (T,).

    `attend` is called in every block and returns its heads' attention output; there is no other cache or mask.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    if NAME not in FUNCTIONS:
        FUNCTIONS.register(NAME, _attention)
    config = decoder.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        return decoder.hidden(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, compress_attend=attend
        )[0]
    finally:
        config._attn_implementation = before


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: object,
    *,
    compress_attend: Attend,
    **options: Any,
) -> tuple[Tensor, None]:
    heads = _heads(module.layer_idx, query, key, value, options)
    return compress_attend(heads).transpose(0, 1)[None], None


def _heads(block: int, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Heads:
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    return Heads(block, query[0], key[0], value[0], scaling, options.get("sliding_window"))


@contextmanager
def watched_attention(decoder: Decoder, watch: Callable[[Heads], None]) -> Iterator[None]:
    """Call `watch` in every block of every forward pass of one row, once its q, k and v are normed and rotated.

    transformers finds attention by name; the function of the model's name is wrapped for as long as the context lasts.
    Raises `ValueError` for a model loaded with `eager` attention, which has no name there.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    name = decoder.config._attn_implementation
    if name not in FUNCTIONS:
        raise ValueError(f"attention {name!r} cannot be watched; load the model with sdpa")
    plain = FUNCTIONS[name]
    path = decoder.family.block.attention
    numbers = {id(block.get_submodule(path)): number for number, block in enumerate(decoder.blocks)}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, **options: Any) -> Any:
        if id(module) in numbers:
            watch(_heads(numbers[id(module)], query, key, value, options))
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

"""Rotary positions of single keys, and the positions a model supports."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import UserError
from .blocks import Decoder
from .shape import by_length, original_context


class Rotary:
    """Rotates keys from one rotary position to another, in float32; for all families, partial rotary too."""

    def __init__(self, decoder: Decoder):
        self.module, self.config = decoder.model.model.rotary_emb, decoder.config

    @property
    def limit(self) -> int | None:
        """The first position that changes the frequencies of all others (longrope); None if there is none."""
        return original_context(self.config) if by_length(self.config) else None

    def turned(self, block: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (..., T, d), not rotated yet, at positions (T,), as the model rotates them."""
        return _rotated(keys, *self._angles(block, positions))

    def unturned(self, block: int, keys: Tensor, positions: Tensor) -> Tensor:
        """Keys (..., T, d) before the model rotated them to positions (T,)."""
        cos, sin = self._angles(block, positions)
        scale = cos**2 + sin**2  # 1, but where the rotation scales too (yarn)
        return _rotated(keys, cos / scale, -sin / scale)

    def _angles(self, block: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.empty(0, device=positions.device)  # float32
        kinds = {"layer_type": self.config.layer_types[block]} if hasattr(self.module, "layer_types") else {}
        cos, sin = self.module(like, positions[None], **kinds)
        return cos[0], sin[0]


def _rotated(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = cos.shape[-1]  # a model with partial rotary turns the first part of each key only
    part, rest = keys[..., :size].float(), keys[..., size:]
    first, second = part.chunk(2, -1)
    turned = part * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned.to(keys.dtype), rest], -1)


def check_positions(decoder: Decoder, last: int, what: str, hint: str) -> None:
    """`UserError` if a position is beyond what the model was trained for, or its rotary frequencies would change."""
    trained = decoder.config.max_position_embeddings
    limit = Rotary(decoder).limit
    if limit is not None and limit < trained and last >= limit:
        raise UserError(
            f"{what} goes up to position {last}, but the model changes its rotary frequencies at position {limit} "
            f"(longrope), which invalidates the keys in a cache; {hint}"
        )
    if last >= trained:
        raise UserError(f"{what} goes up to position {last}, but the model was trained for {trained} positions; {hint}")

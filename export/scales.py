"""Quantized matrices whose integer codes are fixed and whose scales can be trained.

Every layout of blocks comes down to the same: a weight is scale · code, plus minimum · offset where the layout has
minima. Codes and offsets are constants (K-quants' sub-scales are part of them); scales and minima are numbers of the
file, one per block. They are trained as scale · (1 + move), which is the same step for large and small ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..modeling.linear import linear


@dataclass(frozen=True)
class ScaledMatrix:
    """A quantized matrix (N, K) in blocks along K; the value of a weight is scale · code + minimum · offset."""

    codes: Tensor  # (N, B, K / B), of the smallest type that holds them
    scales: Tensor  # (N, B) float32
    offsets: Tensor | None = None  # (N, B, parts of a block), each for as many neighbouring weights; None: no minima
    minima: Tensor | None = None  # (N, B) float32
    half: bool = False  # the file holds scales and minima in half precision

    @property
    def numbers(self) -> list[Tensor]:
        """What can be trained, (N, B) each: scales, and minima if there are any."""
        return [self.scales] if self.minima is None else [self.scales, self.minima]

    def moved(self, moves: Tensor) -> list[Tensor]:
        """`numbers` after relative moves (P, N, B), rounded as the file holds them."""
        found = [number * (1 + move) for number, move in zip(self.numbers, moves, strict=True)]
        return [number.half().float() for number in found] if self.half else found

    def values(self, moves: Tensor | None = None) -> Tensor:
        """The weights (N, K) float32, after relative moves (P, N, B) of scales and minima."""
        scales, *minima = self.numbers if moves is None else self.moved(moves)
        found = self.codes.to(torch.float32, copy=True).mul_(scales[..., None])
        for minimum in minima:
            offsets = self._offsets()
            found.view(*offsets.shape, -1).add_((offsets * minimum[..., None])[..., None])
        return found.flatten(1)

    def gradient(self, of_values: Tensor) -> Tensor:
        """The gradient with respect to moves (P, N, B) from that with respect to the weights (N, K).

        Rounding to half precision counts as the identity.
        """
        blocks = of_values.view(self.codes.shape)
        found = [(blocks * self.codes).sum(-1) * self.scales]
        if self.minima is not None:
            offsets = self._offsets()
            found.append((blocks.view(*offsets.shape, -1).sum(-1) * offsets).sum(-1) * self.minima)
        return torch.stack(found)

    def rows(self, part: slice | Tensor) -> ScaledMatrix:
        """Some of the rows: a slice, or their numbers (n,) int64."""
        return self._each(lambda tensor: tensor[part])

    def to(self, device: str | torch.device) -> ScaledMatrix:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _offsets(self) -> Tensor:
        assert self.offsets is not None, "minima come with offsets"
        return self.offsets

    def _each(self, change: Any) -> ScaledMatrix:
        parts = {name: getattr(self, name) for name in TENSORS}
        return replace(self, **{name: change(value) for name, value in parts.items() if value is not None})


TENSORS = ("codes", "scales", "offsets", "minima")


def stacked(parts: list[ScaledMatrix]) -> ScaledMatrix:
    """The rows of several matrices of one layout, one below the other."""
    if len(parts) == 1:
        return parts[0]
    fields = {name: [getattr(part, name) for part in parts] for name in TENSORS}
    whole = {name: torch.cat(values) for name, values in fields.items() if values[0] is not None}
    return replace(parts[0], **whole)


def small_integers(values: Tensor) -> Tensor:
    """Whole numbers in the smallest type that holds them; others stay float32."""
    for kind in (torch.int8, torch.int16):
        found = values.to(kind)
        if torch.equal(found.float(), values):
            return found
    return values


class ScaledLinear(nn.Module):
    """A linear layer with a quantized matrix, of which the moves of its scales and minima are trained.

    The weights are worked out for each product and not kept, so that one layer's exist at a time.
    """

    def __init__(self, matrix: ScaledMatrix, moves: Tensor, bias: Tensor | None):
        super().__init__()
        self.matrix, self.bias = matrix, bias
        self.moves = nn.Parameter(moves)  # (P, N, B), relative

    def forward(self, input: Tensor) -> Tensor:
        product: Any = _Product.apply(input, self.moves, self.matrix, self.bias)
        return product


class _Product(torch.autograd.Function):
    """inputs (…, K) · weightsᵀ + bias; the backward pass works the weights out again."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, moves: Tensor, matrix: ScaledMatrix, bias: Tensor | None) -> Tensor:
        ctx.matrix = matrix
        ctx.save_for_backward(inputs, moves)
        return linear(inputs, matrix.values(moves).to(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, moves = ctx.saved_tensors
        grad = grads[0].contiguous()
        flat = grad.flatten(0, -2)
        of_values = linear(flat.t(), inputs.flatten(0, -2).t()).float()
        to_inputs = None
        if ctx.needs_input_grad[0]:
            to_inputs = linear(grad, ctx.matrix.values(moves).to(grad.dtype).t())
        return to_inputs, ctx.matrix.gradient(of_values), None, None

"""Linear layers on x86 processors: float32 products by oneDNN.

torch multiplies float32 matrices with MKL, which does not use AVX-512 on AMD processors. oneDNN, also part of torch,
does: on an AMD EPYC it is 2 times as fast for 256 rows and 1.5 times for 16; with AVX2 only, both are about equally
fast (`benchmarks/linear.py`). Results differ only in rounding.
"""

from __future__ import annotations

import os
import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

# oneDNN caches a kernel of about 0.6 MB for every shape, up to 1,024 by default: with rows of all lengths that came to
# 0.7 GB. It reads the variable when it is first used. Generating a kernel takes about 0.4 ms.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
SMALLEST = 1 << 16  # weights; below this the call's overhead exceeds the product's time


class Linear(nn.Linear):
    """torch's linear layer, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def speed_up(model: nn.Module) -> None:
    """Have every plain linear layer of a model compute with `linear`; its parameters are unchanged."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """inputs (…, K) · weightᵀ (K, N) + bias → (…, N), as `torch.nn.functional.linear`, gradients included (once)."""
    if not _suits(inputs, weight, bias):
        return functional.linear(inputs, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (inputs, weight, bias)):
        product: Any = _Product.apply(inputs, weight, bias)
        return product
    return _product(inputs, weight, bias)


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        weight.numel() >= SMALLEST
        and inputs.numel() > 0
        and inputs.ndim > 1
        and all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (inputs, weight, bias))
        and type(weight) in (Tensor, nn.Parameter)  # neither sharded nor quantized
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and _available()
    )


@cache
def _available() -> bool:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """oneDNN's product has no gradient in torch; this saves the same tensors for it as `functional.linear`."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_inputs, to_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(inputs if to_weight else None, weight if to_inputs else None)
        return _product(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        flat = grad.flatten(0, -2)
        return (
            None if weight is None else _product(grad, weight.t()),
            None if inputs is None else _product(flat.t(), inputs.flatten(0, -2).t()),
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )

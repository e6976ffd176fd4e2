"""Training adapters through the weights that an export will round them to.

In the forward pass a linear layer's weight is round(W + s·BA); the gradient passes through the rounding as if it were
not there (a straight-through estimator, arXiv 1308.3432), so A and B learn as they always do. How a matrix is rounded
is the export's matter (`Rounder`): before every measurement on the held-out rows, and thus for every checkpoint that
may be kept, all matrices are rounded by its own quantizers; at the steps between, each weight takes the nearest value
that its block's scale, as it was then, allows. What is not adapted is rounded once. The first steps are better made
without rounding (`tune.quantize_after`): there, too, what is measured is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..modeling.blocks import Decoder
from ..modeling.linear import linear
from ..modeling.weights import Tensors
from .shared import SharedTeacher
from .weights import WEIGHTS, load_trainable, save_whole, trainable_state

ADAPTER = "default"  # peft's name of the only one
ROUNDED = "rounded.safetensors"  # in a checkpoint: the adapters as they were when all matrices were rounded


Nearest = Callable[[Tensor], Tensor]


class Rounder(Protocol):
    """How an export of one type rounds a checkpoint's weights."""

    type: str

    def round(self, name: str, weights: Tensor) -> tuple[Tensor, Nearest] | None:
        """A matrix (N, K) float32 under the checkpoint's name, as the export will hold it, and what rounds others to
        the nearest values that its scales allow, changing them; None if the export leaves it as it is."""
        ...

    def carry(self, model: Path) -> None:
        """Leave in the trained checkpoint's folder what an export needs to round it the same."""
        ...


class RoundedLayer(LoraLinear):
    """peft's layer with the rounded sum of its weight and its adapter, for a layer that has one adapter.

    Without adapters (a shared teacher's pass) it is the original layer.
    """

    weight_in_use: Tensor  # (N, K), in the model's dtype

    @property
    def parts(self) -> list[Any]:
        """The modules with the layer's own weight (N, K), with A (R, K), and with B (N, R)."""
        return [self.base_layer, self.lora_A[ADAPTER], self.lora_B[ADAPTER]]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            return super().forward(x, *args, **kwargs)
        base, a, b = self.parts
        inputs, weight = x.to(self.weight_in_use.dtype), self.weight_in_use
        product: Any = _Through.apply(inputs, a.weight, b.weight, weight, self.scaling[ADAPTER])
        return product if base.bias is None else product + base.bias


class _Through(torch.autograd.Function):
    """inputs (…, K) · weightᵀ (K, N), with gradients to A (R, K) and B (N, R) as if weight were W + scale · BA."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, a: Tensor, b: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.weight, ctx.scale = weight, scale
        ctx.save_for_backward(inputs, a, b)
        return linear(inputs, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, a, b = ctx.saved_tensors
        grad = grads[0].contiguous()
        flat, seen = grad.flatten(0, -2).to(a.dtype), inputs.flatten(0, -2).to(a.dtype)
        to_a = (flat @ b).t() @ seen * ctx.scale
        to_b = flat.t() @ (seen @ a.t()) * ctx.scale
        to_inputs = linear(grad, ctx.weight.t()) if ctx.needs_input_grad[0] else None
        return to_inputs, to_a, to_b, None, None


class RoundedWeights:
    """The rounded weights of a student whose trained parameters are `student`'s and whose modules are `decoder`'s.

    `checkpoint` is what the adapters will be merged into; `shared` is the teacher that lives in the same model.
    """

    first = 0  # the step after which weights are rounded in training, too

    def __init__(
        self, student: nn.Module, decoder: Decoder, rounder: Rounder, checkpoint: Path, shared: SharedTeacher | None
    ):
        self.student, self.rounder, self.source = student, rounder, Tensors(checkpoint)
        self.factors = {} if shared is None else shared.factors
        self.dtype = decoder.head_weight.dtype
        self.layers = {
            name: self._through(module)
            for name, module in decoder.model.named_modules()
            if isinstance(module, LoraLinear)
        }
        self.nearest: dict[str, Nearest] = {}
        self.before: dict[str, Tensor] = {}  # the trained parameters when all matrices were rounded
        for path, module in self._others(decoder):
            self._round_once(path, module, shared)

    def _through(self, module: LoraLinear) -> RoundedLayer:
        """The layer itself, with our forward pass."""
        module.__class__ = RoundedLayer
        assert isinstance(module, RoundedLayer)
        base: Any = module.base_layer
        module.weight_in_use = base.weight.detach()
        return module

    def _others(self, decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
        """Linear layers and embeddings without an adapter; of a tied pair the embedding."""
        inside = {id(part) for layer in self.layers.values() for part in layer.modules()}
        seen: set[int] = set()
        for path, module in decoder.model.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding) and id(module) not in inside:
                if id(module.weight) not in seen:
                    yield path, module
                seen.add(id(module.weight))

    def _round_once(self, path: str, module: Any, shared: SharedTeacher | None) -> None:
        found = self.rounder.round(f"{path}.weight", self._merged(path, None))
        if found is None:
            return
        values = found[0].to(module.weight)
        if shared is None:
            module.weight.data = values
        else:  # the hook that scales the layer's output stays
            shared.hold(module.weight, values / self.factors.get(module, 1.0))

    @torch.no_grad()
    def _merged(self, path: str, layer: RoundedLayer | None) -> Tensor:
        """A weight as the merged checkpoint will have it, in float32: the same operations give the same bits."""
        device = self.layers[path].weight_in_use.device if layer is not None else "cpu"
        weights = self.source[f"{path}.weight"].to(device, self.dtype)
        if layer is not None:
            weights = (weights + layer.get_delta_weight(ADAPTER)).to(self.dtype)
        return weights.float()

    @torch.no_grad()
    def round(self) -> None:
        """Round all adapted matrices as the export will."""
        for path, layer in self.layers.items():
            weights = self._merged(path, layer)
            found = self.rounder.round(f"{path}.weight", weights)
            if found is not None:
                weights, self.nearest[path] = found
            layer.weight_in_use = weights.to(layer.weight_in_use)
        self.before = {name: value.clone() for name, value in trainable_state(self.student).items()}

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After a step: round to the scales that `round` found, if it is time to."""
        for path, layer in self.layers.items():
            base, a, b = (part.weight.float() for part in layer.parts)
            weights = torch.addmm(base * self.factors.get(layer.base_layer, 1.0), b, a, alpha=layer.scaling[ADAPTER])
            nearest = self.nearest.get(path) if step >= self.first else None
            layer.weight_in_use = (weights if nearest is None else nearest(weights)).to(layer.weight_in_use)

    def save(self, folder: Path) -> None:
        """Keep in a checkpoint what the scales in use were found from."""
        save_whole(self.before, folder / ROUNDED)

    def load(self, folder: Path, step: int) -> None:
        """Go on from a checkpoint after a step: first the scales that were in use, then the step's weights."""
        load_trainable(self.student, folder / ROUNDED)
        self.round()
        load_trainable(self.student, folder / WEIGHTS)
        same = all(torch.equal(value, self.before[name]) for name, value in trainable_state(self.student).items())
        if not same or step < self.first:
            self.follow(step)

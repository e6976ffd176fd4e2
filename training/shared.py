"""Teacher and student in one set of weights (LoRA): all blocks without adapters, and the kept blocks with them.

By default the model is the student, because gradient checkpointing runs blocks again in the backward pass, when the
switch to the teacher must be undone. Of parameters that healing changed both versions are held; linear layers that it
only scaled (heals/refit.py, heals/patch.py) are held once, and the factor is applied to their output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.stage import Context
from ..data.packing import Batch
from ..modeling.agreement import Head, States
from ..modeling.blocks import Decoder, arranged, arrangement, drop_blocks
from ..modeling.changes import find_changes
from ..modeling.load import load_model
from .config import Lora
from .teacher import quantization
from .train import lora_model, trained_beside

Place = tuple[nn.Module, str]  # a module and the name of one of its parameters


class SharedTeacher:
    """The unpruned model, which by default runs as its pruned and healed student with fresh adapters (`model`).

    The student equals one loaded from the pruned checkpoint. With `tune.quantize_base` the parameters that healing
    changed are quantized as well. Raises `UserError` for adapter targets that do not exist.
    """

    def __init__(self, base: Path, pruned: Path, tune: Lora, context: Context):
        changes = find_changes(base, pruned, context.dtype)
        options = quantization(tune.quantize_base, context.dtype)
        if options:
            options["device_map"] = {"": context.device}
        model = load_model(base, context.dtype, context.device, **options).requires_grad_(False)
        self.decoder, self.held_twice = Decoder(model), changes.parameters
        self._original: dict[Place, nn.Parameter] = {}
        healed: dict[Place, nn.Parameter] = {}
        for name, value in changes.replaced.items():
            old = model.get_parameter(name)
            new = _like(old, value)
            for place in _places(model, old):
                self._original[place], healed[place] = old, new
        for old in trained_beside(self.decoder, tune):
            places = [place for place in _places(model, old) if place not in healed]
            new = nn.Parameter(old.detach().clone(), requires_grad=False)
            self._original |= dict.fromkeys(places, old)
            healed |= dict.fromkeys(places, new)
            self.held_twice += new.numel() if places else 0
        self._teaching = False
        self.factors = {model.get_submodule(name): factor for name, factor in changes.scaled.items()}
        for module, factor in self.factors.items():
            module.register_forward_hook(self._scaling(factor))
        self._whole = arrangement(model)
        drop_blocks(model, changes.dropped)
        _put(healed)
        self.model = lora_model(model, tune, context.seed)

    @contextmanager
    def on(self) -> Iterator[None]:
        """All blocks, original weights, no adapters, no gradients, evaluation mode; restored exactly afterwards."""
        model = self.decoder.model
        modes = {module: module.training for module in model.modules()}
        trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
        healed = {(module, name): module._parameters[name] for module, name in self._original}
        with ExitStack() as stack:
            stack.callback(_put, healed)
            _put(self._original)
            stack.callback(_restore, modes, trained)
            # peft sets requires_grad of adapters when it turns them on or off.
            stack.callback(self.model.base_model.enable_adapter_layers)
            self.model.base_model.disable_adapter_layers()
            stack.callback(setattr, self, "_teaching", False)
            self._teaching = True
            stack.enter_context(arranged(model, self._whole))
            stack.enter_context(torch.no_grad())
            model.eval()
            yield

    def hold(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give the student another value of a frozen parameter, held beside the teacher's."""
        new = nn.Parameter(value, requires_grad=False)
        for place in _places(self.decoder.model, parameter):
            self._original.setdefault(place, parameter)
            _put({place: new})
        self.held_twice += new.numel()

    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, H) after the final norm."""
        with self.on():
            return self.decoder.hidden(**batch.model_inputs())

    @property
    def head(self) -> Head:
        return Head(self.decoder.head_weight.detach(), self.decoder.softcap)

    def anchor(self, batch: Batch, positions: Tensor) -> States:
        with self.on():  # the student may have a head of its own
            hidden = self.decoder.hidden(**batch.model_inputs())
            return States(hidden.flatten(0, 1)[positions], self.head)

    def _scaling(self, factor: float) -> Any:
        def scale(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            return output if self._teaching else output * factor

        return scale


def _places(model: nn.Module, parameter: nn.Parameter) -> list[Place]:
    """All places of a parameter; tied ones have several."""
    return [(m, name) for m in model.modules() for name, value in m._parameters.items() if value is parameter]


def _put(parameters: Mapping[Place, nn.Parameter | None]) -> None:
    for (module, name), parameter in parameters.items():
        module._parameters[name] = parameter


def _restore(modes: Mapping[nn.Module, bool], trained: Mapping[nn.Parameter, bool]) -> None:
    for module, training in modes.items():
        module.training = training
    for parameter, trainable in trained.items():
        parameter.requires_grad_(trainable)


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A frozen parameter with a new value, stored as the old one: on its device, in its dtype or 4 bits."""
    if type(old) is nn.Parameter:
        return nn.Parameter(value.to(old), requires_grad=False)
    packed: Any = old  # bitsandbytes' Params4bit, which quantizes when it is moved to a device
    options = {
        name: getattr(packed, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    }
    fresh: Any = type(packed)(value, requires_grad=False, **options)
    return fresh.to(old.device)

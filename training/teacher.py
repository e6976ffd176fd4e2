"""Teachers: the unpruned model's distributions at the target tokens. cached.py and shared.py have the other two."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.stage import Context
from ..data.packing import Batch
from ..modeling.agreement import Anchor, Head, States
from ..modeling.blocks import Decoder
from ..modeling.load import load_model
from .config import Copy


def quantization(kind: str | None, dtype: str) -> dict[str, Any]:
    """`from_pretrained` options that quantize linear layers; the head stays unquantized."""
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it logs every cast
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return {"quantization_config": config}


class Teacher(Protocol):
    """A source of teacher distributions."""

    def anchor(self, batch: Batch, positions: Tensor) -> Anchor:
        """Teacher distributions at the N positions, flat indices into the batch's (B·T), where targets are
        predicted."""
        ...


class CopyTeacher:
    """A frozen copy of the unpruned model beside the student."""

    def __init__(self, folder: Path, config: Copy, context: Context):
        options = quantization(config.quantize, context.dtype)
        if options:
            options["device_map"] = {"": context.device}
        self.decoder = Decoder(load_model(folder, context.dtype, context.device, **options).requires_grad_(False))

    @property
    def head(self) -> Head:
        return Head(self.decoder.head_weight.detach(), self.decoder.softcap)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        """(B, T, H) after the final norm."""
        return self.decoder.hidden(**batch.model_inputs())

    def anchor(self, batch: Batch, positions: Tensor) -> States:
        return States(self.hidden(batch).flatten(0, 1)[positions], self.head)

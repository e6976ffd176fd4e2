"""Importance matrices: how strongly each input column of a linear layer is activated on calibration rows.

ggml's quantizers weight rounding errors by them. The value is the mean squared activation over real tokens. A
checkpoint that was trained through rounded weights carries the one it was trained with, to be rounded the same again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.stage import Advance, Inputs, Progress
from ..data.calibration import calibration_batches
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.gguf_layout import name_map
from ..modeling.source import IMPORTANCE
from ..modeling.types import CausalModel, ModelTokenizer

Importance = dict[str, NDArray[np.float32]]  # (columns,) by llama.cpp's name of the matrix
FILE = "imatrix.safetensors"


@torch.no_grad()
def collect(model: CausalModel, batches: Iterable[Batch], advance: Advance | None = None) -> Importance:
    """Mean squared inputs (columns,) of every linear layer in the blocks, by llama.cpp tensor name; no padding."""
    decoder = Decoder(model)
    names = name_map(decoder.family, decoder.num_blocks)
    sums: dict[str, Tensor] = {}
    real: list[Tensor] = []
    tokens = 0

    def hook(name: str) -> Any:
        def add(_module: object, args: tuple[Tensor, ...]) -> None:
            used = args[0].flatten(0, 1)[real[0]].double()
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + used.square().sum(0)

        return add

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in path:
            target = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
            if target is None:
                raise UserError(f"{path} has no place in a {model.config.model_type} GGUF")
            handles.append(module.register_forward_pre_hook(hook(target)))
    try:
        for batch in batches:
            batch = batch.to(model.device)
            real[:] = [(batch.segment_ids >= 0).flatten()]
            decoder.hidden(**batch.model_inputs())
            tokens += batch.tokens
            if advance is not None:
                advance(batch.tokens)
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise UserError("an importance matrix needs calibration rows, but the data stage has none")
    return {name: (total / tokens).float().cpu().numpy() for name, total in sorted(sums.items())}


def kept_imatrix(
    file: Path,
    model: CausalModel,
    tokenizer: ModelTokenizer,
    inputs: Inputs,
    tokens: int,
    progress: Progress,
    label: str = "importance matrix",
) -> Importance:
    """The importance matrix of a model on the data stage's training rows, from `file` if it was computed before."""
    if not file.exists():
        batches = calibration_batches(inputs, tokenizer, tokens=tokens, length=512, batch=4)
        with progress.bar(label, sum(batch.tokens for batch in batches)) as advance:
            save_imatrix(collect(model, batches, advance), file)
    return load_imatrix(file)


def save_imatrix(matrix: Importance, file: Path) -> None:
    """Write an importance matrix as safetensors; the file appears when it is whole."""
    from safetensors.numpy import save_file

    partial = file.with_suffix(".tmp")
    save_file(matrix, partial)
    partial.replace(file)


def load_imatrix(file: Path) -> Importance:
    """Read what `save_imatrix` wrote."""
    from safetensors.numpy import load_file

    return load_file(file)


def carry_imatrix(matrix: Importance, checkpoint: Path) -> None:
    """Leave the matrix in a checkpoint's folder."""
    (checkpoint / IMPORTANCE).mkdir(exist_ok=True)
    save_imatrix(matrix, checkpoint / IMPORTANCE / FILE)


def carried_imatrix(checkpoint: Path) -> Importance | None:
    """The matrix that a checkpoint carries, if it does."""
    file = checkpoint / IMPORTANCE / FILE
    return load_imatrix(file) if file.is_file() else None

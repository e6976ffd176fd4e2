"""Importance matrices: how strongly each input column of a linear layer is activated on calibration rows.

ggml's quantizers weight rounding errors by them. The value is the mean squared activation over real tokens.
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
from ..core.stage import Advance
from ..data.packing import Batch
from ..modeling.blocks import Decoder
from ..modeling.gguf_layout import name_map
from ..modeling.types import CausalModel


@torch.no_grad()
def collect(
    model: CausalModel, batches: Iterable[Batch], advance: Advance | None = None
) -> dict[str, NDArray[np.float32]]:
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


def save_imatrix(matrix: dict[str, NDArray[np.float32]], file: Path) -> None:
    """Write an importance matrix as safetensors."""
    from safetensors.numpy import save_file

    save_file(matrix, file)


def load_imatrix(file: Path) -> dict[str, NDArray[np.float32]]:
    """Read what `save_imatrix` wrote."""
    from safetensors.numpy import load_file

    return load_file(file)

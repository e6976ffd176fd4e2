"""Checking, before use, that a checkpoint folder is the model its configuration describes.

Names, types and shapes of all tensors are compared with the configuration's, both ways: transformers fills missing
tensors with random numbers and ignores unknown ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UserError
from .families import EMBEDDING, HEAD, block_number
from .types import ModelConfig
from .weights import FLOATS, TensorHeader, Tensors, tensor_headers

if TYPE_CHECKING:
    from torch import Tensor

DERIVED = (".rotary_emb.inv_freq",)  # suffixes of tensors that old versions saved and every version recomputes


def check_checkpoint(folder: Path, *, finite: bool = False) -> None:
    """`UserError` naming the first tensor of a checkpoint folder that is missing, unexpected, not of the shape its
    configuration asks for, or not float.

    With `finite`, all values are read as well, and the first tensor with NaN or infinity is named.
    """
    from .load import load_config

    config, headers = load_config(folder), tensor_headers(folder)
    _check_types(folder, headers)
    _check_names(folder, config, headers)
    if finite:
        tensors = Tensors(folder)
        for name in tensors:
            check_finite(name, tensors[name], folder)


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """`UserError` for a tensor with NaN or infinity."""
    if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
        raise UserError(f"{where}: {name} contains NaN or infinity: the weights are damaged")


def decide_tied(folder: Path, config: ModelConfig) -> bool:
    """Whether head and embedding are tied, decided by the weight files.

    If the files have both, they are tied only when equal. Raises `UserError` if the configuration says untied and the
    files have no head.
    """
    headers = tensor_headers(folder)
    tied = bool(config.tie_word_embeddings)
    if HEAD not in headers:
        if not tied:
            raise UserError(
                f"{folder} has no {HEAD}, but its config.json says that the head is not tied to the embedding. "
                'If it is, add "tie_word_embeddings": true to config.json; '
                "otherwise the checkpoint is incomplete"
            )
        return True
    if not tied or EMBEDDING not in headers:
        return tied
    tensors = Tensors(folder)
    head, embedding = tensors[HEAD], tensors[EMBEDDING]
    return head.shape == embedding.shape and bool(torch.equal(head.float(), embedding.float()))


def _check_types(folder: Path, headers: Mapping[str, TensorHeader]) -> None:
    for name, tensor in headers.items():
        if tensor.dtype not in FLOATS:
            raise UserError(
                f"{folder}: {name} has type {tensor.dtype}, not float: the checkpoint is already quantized; use the "
                "float checkpoint it was made from"
            )


def _check_names(folder: Path, config: ModelConfig, headers: Mapping[str, TensorHeader]) -> None:
    expected = expected_shapes(config)
    actual = {name: tensor.shape for name, tensor in headers.items() if not name.endswith(DERIVED)}
    if config.tie_word_embeddings:
        expected.pop(HEAD, None)
        actual.pop(HEAD, None)
    missing, surplus = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    if missing or surplus:
        raise UserError(_difference(folder, config, missing, surplus, _blocks(actual)))
    for name in sorted(expected):
        if expected[name] != actual[name]:
            raise UserError(
                f"{folder}: {name} has shape {list(actual[name])}, but config.json asks for {list(expected[name])}: "
                "they belong to different models"
            )


def _difference(folder: Path, config: ModelConfig, missing: list[str], surplus: list[str], blocks: int) -> str:
    """What is wrong with the names of tensors."""
    configured = config.num_hidden_layers
    if blocks and blocks != configured:
        return (
            f"{folder}: the weights have {blocks} blocks, but config.json says {configured} (num_hidden_layers): "
            "correct the number there, or copy the checkpoint again"
        )
    adapters = [name for name in surplus if ".lora_" in name or ".base_layer." in name]
    if adapters:
        return (
            f"{folder}: {adapters[0]} belongs to an adapter that was saved unmerged; merge it first (peft's "
            "merge_and_unload) and save the model"
        )
    parts = []
    if surplus:
        parts.append(
            f"{surplus[0]}, which a {config.model_type} model with this configuration does not have"
            + (f", nor {len(surplus) - 1} more" if len(surplus) > 1 else "")
        )
    if missing:
        lacks = f"no {missing[0]}" + (f", nor {len(missing) - 1} more that it needs" if len(missing) > 1 else "")
        parts.append(lacks)
    return f"{folder} holds {', and '.join(parts)}: its weights and its config.json belong to different models"


def _blocks(names: Mapping[str, object]) -> int:
    """How many blocks the tensors belong to; 0 if their numbers have gaps."""
    numbers = {number for name in names if (number := block_number(name)) is not None}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a model with this configuration, the head included; nothing is allocated."""
    from transformers import AutoModelForCausalLM

    from .checkpoint import quiet

    try:
        with quiet(), torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"no {config.model_type} model can be built from this configuration: {reason}") from error
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}

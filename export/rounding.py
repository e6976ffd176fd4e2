"""What an exported type makes of a checkpoint's weights, matrix by matrix: how distill rounds while it trains.

The types, the quantizers and their importance matrix are those of the export itself, so that the values are those of
the file that it writes. The rows of a matrix are rounded each for itself, so their order in a file does not matter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from ..core.memory import give_back_memory
from ..core.stage import Context, Inputs
from ..modeling.load import load_config, load_model, load_tokenizer
from ..runtime.artifact_types import ARTIFACT_TYPES, GGUF_TYPES, ONNX_TYPES
from ..training.cost import WEIGHED
from .gguf import mixed_model
from .gguf_source import GgufSource
from .imatrix import Importance, carry_imatrix, kept_imatrix, load_imatrix
from .levels import gguf_levels, nbits_levels
from .mixes import tensor_type
from .onnx_edit import node_importance
from .quantize import quantize
from .quantizers import BLOCK, quantizer
from .tensors import CheckpointWeights

Nearest = Callable[[Tensor], Tensor]  # (N, K) float32 → the nearest values; changes its argument
Found = tuple[Tensor, Nearest]  # (N, K) float32 as the file holds it, and rounding to the same scales
PARTS = ("attn/qkv_proj", "attn/o_proj", "mlp/gate_proj", "mlp/up_proj", "mlp/down_proj")  # of a graph's block


class WeightRounder(ABC):
    """Rounds the weights of `checkpoint`, or of one that differs from it in values alone, as type `kind`."""

    def __init__(self, checkpoint: Path, kind: str, imatrix: Importance | None):
        self.type, self.imatrix = kind, imatrix
        self.config = load_config(checkpoint)

    @abstractmethod
    def round(self, name: str, weights: Tensor) -> Found | None:
        """A matrix (N, K) float32 under the checkpoint's name; None if the export leaves it as it is."""

    def carry(self, model: Path) -> None:
        """Leave the importance matrix in a checkpoint's folder, where the export looks for it."""
        if self.imatrix is not None:
            carry_imatrix(self.imatrix, model)


class GgufRounder(WeightRounder):
    """As in a GGUF file of a plain type."""

    def __init__(self, checkpoint: Path, kind: str, imatrix: Importance | None):
        super().__init__(checkpoint, kind, imatrix)
        source = GgufSource(checkpoint, self.config)
        model = mixed_model(self.config, imatrix is not None)
        self.targets = {original: name for name, original in source.originals.items()}
        self.kinds = {name: tensor_type(name, shape, kind, model) for name, shape in source.shapes.items()}

    def round(self, name: str, weights: Tensor) -> Found | None:
        target = self.targets[name]
        kind = self.kinds[target]
        if kind == Type.F32:
            return None
        if kind == Type.F16:
            return weights.half().float(), lambda other: other.half().float()
        data = quantize(weights.cpu().numpy(), kind, (self.imatrix or {}).get(target))
        values = torch.from_numpy(np.asarray(gguf.dequantize(data, kind)))
        return values.to(weights.device), gguf_levels(data, kind).to(weights.device).nearest


class OnnxRounder(WeightRounder):
    """As in an ONNX folder of a plain precision."""

    def __init__(self, checkpoint: Path, kind: str, imatrix: Importance | None):
        super().__init__(checkpoint, kind, imatrix)
        graph = CheckpointWeights(checkpoint)
        self.importance: dict[str, list[tuple[slice, np.ndarray | None]]] = {}
        for block in range(self.config.num_hidden_layers):
            for part in PARTS:
                node = f"/model/layers.{block}/{part}/MatMul"
                for name, rows in graph.places(node):
                    self.importance.setdefault(name, []).append((rows, node_importance(node, imatrix or {})))

    def round(self, name: str, weights: Tensor) -> Found | None:
        precision = ONNX_TYPES[self.type]
        by = precision.blocks if name in self.importance else precision.head
        if by is None or weights.shape[1] % BLOCK:
            return None
        parts = self.importance.get(name, [(slice(None), None)])
        found = [quantizer(by).quantize(weights[rows].cpu().numpy(), known) for rows, known in parts]
        values = torch.cat([torch.from_numpy(matrix.dequantize()) for matrix in found]).to(weights.device)
        levels = [(rows, nbits_levels(m).to(weights.device)) for (rows, _), m in zip(parts, found, strict=True)]

        def nearest(other: Tensor) -> Tensor:
            for rows, part in levels:
                part.nearest(other[rows])
            return other

        return values, nearest


def weight_rounder(inputs: Inputs, work: Path, context: Context, kind: str) -> WeightRounder:
    """The rounder of the latest model's weights, with an importance matrix from the data stage's rows, which is
    computed once and kept in `work`."""
    imatrix = None
    if ARTIFACT_TYPES[kind].calibrated:
        file = work / "imatrix.safetensors"
        if context.rank == 0 and not file.exists():
            work.mkdir(parents=True, exist_ok=True)
            model = load_model(inputs.model, context.dtype, context.device)
            kept_imatrix(file, model, load_tokenizer(inputs.model), inputs, WEIGHED, context.progress)
            del model
            give_back_memory()
        context.group.barrier()
        imatrix = load_imatrix(file)
    return (GgufRounder if kind in GGUF_TYPES else OnnxRounder)(inputs.model, kind, imatrix)

"""Retaining heads (Locret, arXiv 2410.01805): a score per token, block and KV head by which a bounded cache evicts.

A head per block, without biases: W2 · SiLU(W1 · [q; k; v]). q, k and v are the projections' outputs, biases added,
before their norms and rotary positions. Tokens are kept by scores averaged over neighbours (`HeadSettings.pool`): a
fact spans several adjacent tokens, useless without each other, and the score of a single token is noisy (SnapKV,
2404.14469, pools for the same reason). Heads are stored in a checkpoint's `retaining/`:
`heads.safetensors` (float32; `blocks.N.w1.weight` (R, I), `blocks.N.w2.weight` (G, R)) and `settings.json`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..kv.settings import FOLDER, HeadSettings
from .linear import Linear
from .shape import AttentionShape
from .types import ModelConfig

WEIGHTS = "heads.safetensors"  # in FOLDER


class RetainingHead(nn.Module):
    """One block's head: (…, I) → scores (…, G), one per KV head."""

    def __init__(self, inputs: int, kv_heads: int, width: int):
        super().__init__()
        self.w1 = Linear(inputs, width, bias=False)
        self.w2 = nn.Linear(width, kv_heads, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(qkv)))


class RetainingHeads(nn.Module):
    """The heads of a model's blocks, all of width R."""

    def __init__(self, blocks: int, shape: AttentionShape, width: int):
        super().__init__()
        self.blocks = nn.ModuleList(RetainingHead(shape.qkv, shape.kv_heads, width) for _ in range(blocks))

    @property
    def width(self) -> int:
        return self.blocks[0].w1.out_features  # type: ignore[union-attr, return-value]

    def score(self, block: int, qkv: Tensor) -> Tensor:
        """Scores (B, T, G) of one block's concatenated projections (B, T, I), in the heads' precision."""
        head = self.blocks[block]
        return head(qkv.to(head.w1.weight.dtype))  # type: ignore[union-attr, arg-type]


def has_heads(checkpoint: Path) -> bool:
    """Whether a checkpoint folder has retaining heads."""
    return (checkpoint / FOLDER / WEIGHTS).is_file()


def save_heads(heads: RetainingHeads, settings: HeadSettings, checkpoint: Path) -> None:
    """Write the heads into a checkpoint's folder; equal heads give equal bytes."""
    from safetensors.torch import save_file

    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.float().contiguous() for name, value in heads.state_dict().items()}, folder / WEIGHTS)
    settings.write(checkpoint)


def load_heads(checkpoint: Path, config: ModelConfig) -> RetainingHeads:
    """A checkpoint's heads, on the CPU, for a model of this configuration, which may be one of its smaller depths.

    `UserError` if there are none, or they do not fit.
    """
    from safetensors.torch import load_file

    if not has_heads(checkpoint):
        raise UserError(
            f"{checkpoint} has no retaining heads ({FOLDER}/{WEIGHTS}); train them with a recipe's `retain` section"
        )
    weights = load_file(checkpoint / FOLDER / WEIGHTS)
    shape, blocks = AttentionShape.of(config), config.num_hidden_layers
    first = weights.get("blocks.0.w1.weight", torch.empty(0, 0))
    heads = RetainingHeads(blocks, shape, len(first))
    shapes = {name: tuple(value.shape) for name, value in heads.state_dict().items()}
    wrong = next((name for name, size in shapes.items() if name not in weights or weights[name].shape != size), None)
    if wrong is not None or not len(first):
        actual = f"has {tuple(weights[wrong].shape)}" if wrong in weights else "is missing"
        raise UserError(
            f"the retaining heads in {checkpoint / FOLDER} do not fit a model of {blocks} blocks: {wrong} should have "
            f"shape {shapes.get(wrong or '')}, but {actual}"
        )
    heads.load_state_dict({name: weights[name] for name in shapes})
    return heads

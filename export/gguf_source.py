"""A checkpoint's tensors with llama.cpp's names, order and layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UserError
from ..modeling.families import HEAD, family_of
from ..modeling.gguf_layout import Array, query_scale, rope_tensors, tensor_names, to_gguf
from ..modeling.types import ModelConfig
from ..modeling.weights import Tensors


class GgufSource:
    """A checkpoint's tensors under llama.cpp's names and in the order of its files, transformed as it expects them."""

    def __init__(self, checkpoint: Path, config: ModelConfig):
        self.config = config
        self.tensors = Tensors(checkpoint)
        names = tensor_names(family_of(config), config.num_hidden_layers, list(self.tensors))
        self.originals: dict[str, str] = {}  # the checkpoint's name of each
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in sorted(self.tensors.headers.items()):
            if name.endswith("rotary_emb.inv_freq") or (name == HEAD and config.tie_word_embeddings):
                continue
            target = names[name]
            if target is None:
                raise UserError(
                    f"{tensor.file} holds {name}, which llama.cpp does not know in a {config.model_type} model"
                )
            self.originals[target] = name
            self.shapes[target] = tensor.shape
        self._check_whole(checkpoint)
        self.extra = rope_tensors(config)
        self.shapes |= {name: values.shape for name, values in self.extra.items()}
        self.shapes = dict(sorted(self.shapes.items(), key=lambda item: file_order(item[0])))

    def _check_whole(self, checkpoint: Path) -> None:
        """Check that all blocks have the same tensors."""
        parts = dict.fromkeys(name.split(".", 2)[2] for name in self.originals if name.startswith("blk."))
        wanted = [f"blk.{i}.{part}" for i in range(self.config.num_hidden_layers) for part in parts]
        wanted += ["token_embd.weight", "output_norm.weight"]
        wanted += [] if self.config.tie_word_embeddings else ["output.weight"]
        missing = [name for name in wanted if name not in self.originals]
        if missing:
            raise UserError(f"{checkpoint} lacks {len(missing)} weights, {missing[0]} (llama.cpp's name) among them")

    def read(self, name: str, depth: int | None = None) -> Array:
        """One tensor in float32, with llama.cpp's conventions for a model of `depth` blocks (all, if not given)."""
        if name in self.extra:
            return self.extra[name]
        values: Array = self.tensors[self.originals[name]].float().numpy()
        return to_gguf(name, values, self.config, depth or self.config.num_hidden_layers)


def block_of(name: str) -> int | None:
    """The block that a tensor of llama.cpp's name belongs to; None for embedding, final norm, output and rope."""
    return int(name.split(".")[1]) if name.startswith("blk.") else None


def file_order(name: str) -> tuple[int, int, str]:
    """Rope factors, embedding, blocks in order, final norm, output."""
    block = block_of(name)
    if block is not None:
        return 2, block, name
    return (0 if name.startswith("rope_") else 1 if name.startswith("token_embd") else 3), 0, name


def differing_tensors(config: ModelConfig, depths: Sequence[int]) -> list[str]:
    """Tensors that differ between depths: Gemma-3's query norms, where one depth is 62 (`query_scale`)."""
    if not family_of(config).gguf.query_scale or len({query_scale(config, depth) for depth in depths}) == 1:
        return []
    return [f"blk.{block}.attn_q_norm.weight" for block in range(config.num_hidden_layers)]

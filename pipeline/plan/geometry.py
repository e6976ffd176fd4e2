"""A decoder's shape from its configuration file: what every estimate is made of. Reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.files import read_json
from ...core.gguf_header import read_header, read_tensor_names
from ...modeling.config import read_config
from ...modeling.shape import AttentionShape
from ...modeling.source import Source, base_of_adapter, parse_source
from ..recipe import ModelSpec, Recipe

NEEDED = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings")


@dataclass(frozen=True)
class Geometry:
    """A decoder's shape."""

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    positions: int = 1 << 30  # that the model was trained for; no limit where the configuration has none

    @classmethod
    def of(cls, config: dict[str, Any]) -> Geometry:
        """The shape in a config.json; `UserError` for a number that is missing or is none."""
        for key in (*NEEDED, *OPTIONAL):
            value = config.get(key)
            if not (type(value) is int and value > 0) and not (value is None and key in OPTIONAL):
                raise UserError(f"the model's config.json: {key} must be a whole number above 0 (it is {value!r})")
        attention = AttentionShape.of(config)
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            attention.heads,
            attention.kv_heads,
            attention.size,
            config["vocab_size"],
            bool(config.get("tie_word_embeddings", False)),
            config.get("max_position_embeddings") or 1 << 30,
        )

    @property
    def block_parameters(self) -> int:
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def block_products(self) -> int:
        """Weights of one block that take part in matrix products: all but the norms."""
        return self.block_parameters - 2 * self.hidden

    def parameters(self, blocks: int) -> int:
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return blocks * self.block_parameters + embeddings + self.hidden

    def kv_bytes(self, tokens: int, size: int, blocks: int | None = None) -> int:
        """Of keys and values of `size` bytes a number; in all blocks, unless it is said in how many."""
        return 2 * (self.blocks if blocks is None else blocks) * self.kv_heads * self.head_size * tokens * size

    @property
    def qkv(self) -> int:
        """Width of a token's q, k and v, concatenated."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def state(self) -> int:
        """Numbers of one token's largest moment inside a block: its stream, and what the MLP holds."""
        return 4 * self.hidden + 3 * self.intermediate


def read_geometry(loaded: Recipe, cache: Path) -> Geometry:
    """The shape of a recipe's model. Raises `UserError` where its configuration cannot be had."""
    return Geometry.of(_read_config(loaded, cache))


def _read_config(loaded: Recipe, cache: Path) -> dict[str, Any]:
    model = loaded.recipe.model
    if isinstance(model, ModelSpec) and model.config:
        return read_json(loaded.folder / model.config)
    return _source_config(parse_source(loaded.source, loaded.folder), loaded, cache)


def _source_config(source: Source, loaded: Recipe, cache: Path) -> dict[str, Any]:
    if source.kind == "folder":
        assert source.path is not None
        return read_config(source.path)[0]
    if source.kind == "adapter":
        assert source.path is not None
        return _source_config(base_of_adapter(source.path, loaded.folder), loaded, cache)
    if source.kind == "gguf":
        assert source.path is not None
        return _gguf_config(source.path)
    if source.kind == "random":
        from ...modeling.load import load_config, resolve

        return load_config(resolve(loaded.source, cache)).to_dict()
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(source.text, "config.json", revision=source.revision)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the configuration of {source.text} could not be had from the Hub ({type(error).__name__}); "
            "name a local copy under model.config"
        ) from error


def _gguf_config(file: Path) -> dict[str, Any]:
    values, tensors = read_header(file), read_tensor_names(file)
    arch = values.get("general.architecture")
    config = {
        "num_hidden_layers": values.get(f"{arch}.block_count"),
        "hidden_size": values.get(f"{arch}.embedding_length"),
        "intermediate_size": values.get(f"{arch}.feed_forward_length"),
        "num_attention_heads": values.get(f"{arch}.attention.head_count"),
        "vocab_size": values.get("tokenizer.ggml.tokens"),
    }
    missing = [key for key, value in config.items() if not isinstance(value, int)]
    if missing:
        raise UserError(f"{file} is not a language model: its header has no {', '.join(missing)}")
    return config | {
        "num_key_value_heads": values.get(f"{arch}.attention.head_count_kv"),
        "head_dim": values.get(f"{arch}.attention.key_length"),
        "max_position_embeddings": values.get(f"{arch}.context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }

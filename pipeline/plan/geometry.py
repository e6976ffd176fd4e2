"""The shape of a recipe's model from its configuration file: the basis of every estimate. Reads no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.errors import UserError
from ...core.files import read_json
from ...core.geometry import Geometry
from ...core.gguf_header import read_header, read_tensor_names
from ...modeling.config import read_config
from ...modeling.geometry import geometry_of
from ...modeling.source import ModelSource, base_of_adapter, parse_source
from ..recipe import ModelSpec, Recipe


def read_geometry(loaded: Recipe, cache: Path) -> Geometry:
    """The shape of a recipe's model. Raises `UserError` if its configuration cannot be read."""
    return geometry_of(_read_config(loaded, cache))


def _read_config(loaded: Recipe, cache: Path) -> dict[str, Any]:
    model = loaded.model
    if isinstance(model, ModelSpec) and model.config:
        return read_json(loaded.folder / model.config)
    return _source_config(parse_source(loaded.source, loaded.folder), loaded, cache)


def _source_config(source: ModelSource, loaded: Recipe, cache: Path) -> dict[str, Any]:
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
            f"the configuration of {source.text} could not be fetched from the Hub ({type(error).__name__}); "
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

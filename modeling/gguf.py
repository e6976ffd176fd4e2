"""Reading a GGUF file into a checkpoint folder: completely, or not at all.

Every metadata key with a meaning to llama.cpp is either used or must have its neutral value; tensors and the model's
weights must match one to one. A file with anything else is refused, naming it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..core.errors import UserError
from ..core.files import write_json
from ..core.gguf_header import TensorPlace, read_header, read_metadata, read_tensors, split_files
from .checkpoint import save_checkpoint, write_shards
from .families import FAMILIES, HEAD, Family, family_of, read_as
from .gguf_layout import (
    FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    from_gguf,
    llama3_parameters,
    own_query_scalar,
    tensor_names,
)
from .gguf_tokenizer import TOKENIZER_KEYS, build_tokenizer, end_ids
from .soundness import expected_shapes
from .types import ModelConfig

# Keys of an architecture with a counterpart in the configuration.
READ = {
    "context_length",
    "block_count",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scale_linear",
}
READ_OF_WINDOWS: dict[str, set[str]] = {
    "none": set(),
    "one": {"attention.sliding_window"},
    "blocks": {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"},
}
# Keys that are accepted with a value that changes nothing.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "expert_count": lambda value: value == 0,
    "expert_used_count": lambda value: value == 0,
    "attention.causal": lambda value: value is True,
    "pooling_type": lambda value: value == 0,
    "use_parallel_residual": lambda value: value is False,
    "tensor_data_layout": lambda value: True,  # of the file it was converted from
    "rope.scaling.finetuned": lambda value: True,
    "rope.scaling.yarn_ext_factor": lambda value: value == 1.0,
    "rope.scaling.yarn_attn_factor": lambda value: value == 1.0,
    "rope.scaling.yarn_beta_fast": lambda value: value == 32.0,
    "rope.scaling.yarn_beta_slow": lambda value: value == 1.0,
    "logit_scale": lambda value: value == 1.0,
    "residual_scale": lambda value: value == 1.0,
    "embedding_scale": lambda value: value == 1.0,
    "attention.clamp_kqv": lambda value: value == 0.0,
    "attention.max_alibi_bias": lambda value: value == 0.0,
}
# Namespaces that llama.cpp computes with; others hold notes by whoever made the file.
MEANING = ("tokenizer.", "adapter.", "clip.", "diffusion.", "xielu.", "dflash.")


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the model in a GGUF file (in all its parts), dequantized to float32, as a checkpoint with its tokenizer.

    Memory holds one tensor and one shard at a time. Raises `UserError` naming the first key or tensor that
    a checkpoint cannot express, or the first that is missing or not finite.
    """
    files = split_files(file)
    metadata = read_metadata(files[0])
    tensors = _tensors(files, metadata)
    values = Values(metadata, file)
    config = _config(values, tensors)
    _check_keys(values)
    shapes = expected_shapes(config)
    if config.tie_word_embeddings:
        shapes.pop(HEAD, None)
    places = _places(config, shapes, tensors, file)
    save_checkpoint(None, build_tokenizer(metadata, config.vocab_size, file), folder)
    config.architectures, config.dtype = [values.family.model_class], "float32"
    config.save_pretrained(folder)
    _write_generation_config(metadata, folder)
    write_shards(folder, shapes, lambda name: _weight(name, shapes[name], places, config))


class Values:
    """The metadata of one architecture, with errors that name the file and the key."""

    def __init__(self, metadata: Mapping[str, Any], file: Path):
        self.metadata, self.file = metadata, file
        if metadata.get("general.type", "model") != "model":
            raise UserError(f"{file}: general.type is {metadata['general.type']!r}; only whole models can be read")
        self.architecture = str(metadata.get("general.architecture"))
        family = read_as(self.architecture)
        if family is None:
            known = sorted({family.gguf.architecture for family in FAMILIES.values()})
            raise UserError(
                f"{file} has llama.cpp's architecture {self.architecture!r}, which is not supported; supported: "
                f"{', '.join(known)}. Use the original checkpoint"
            )
        self.family: Family = family

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def number(self, key: str, default: float | None = None) -> Any:
        """A single number; `default` if the key is missing, or `UserError` if that is None."""
        name = f"{self.architecture}.{key}"
        value = self.metadata.get(name, default)
        if value is None:
            raise UserError(f"{self.file} has no {name}, so the model is incomplete")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            description = "a value per block" if isinstance(value, list) else repr(value)
            raise UserError(f"{self.file}: {name} is {description}, but must be a single number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above 0."""
        value = self.number(key, default)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{self.file}: {self.architecture}.{key} is {value}, but must be a whole number above 0")
        return value


def _tensors(files: list[Path], metadata: Mapping[str, Any]) -> dict[str, TensorPlace]:
    tensors: dict[str, TensorPlace] = {}
    for number, file in enumerate(files):
        if number and read_header(file).get("split.no") != number:
            raise UserError(f"{file} is not part {number + 1} of {files[0].name}")
        for name, place in read_tensors(file).items():
            if name in tensors:
                raise UserError(f"tensor {name} is in both {tensors[name].file.name} and {file.name}")
            tensors[name] = place
    count = metadata.get("split.tensors.count", len(tensors))
    if count != len(tensors):
        raise UserError(f"{files[0]} and its parts hold {len(tensors)} tensors, but the header says {count}")
    return tensors


def _config(values: Values, tensors: Mapping[str, TensorPlace]) -> Any:
    """The configuration, by the family's class."""
    from transformers import CONFIG_MAPPING

    heads, hidden = values.count("attention.head_count"), values.count("embedding_length")
    size = values.count("attention.key_length", hidden // heads)
    if values.count("attention.value_length", hidden // heads) != size:
        raise UserError(f"{values.file}: key and value heads have different sizes, which is not supported")
    if "token_embd.weight" not in tensors:
        raise UserError(f"{values.file} has no token_embd.weight, so the model is incomplete")
    family = values.family
    settings: dict[str, Any] = {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": values.count("feed_forward_length"),
        "num_hidden_layers": values.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.count("attention.head_count_kv", heads),
        "max_position_embeddings": values.count("context_length"),
        "rms_norm_eps": _decimal(values.number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if family.head_dim:
        settings["head_dim"] = size
    elif size * heads != hidden:
        raise UserError(
            f"{values.file}: {heads} heads of {size} do not add up to the hidden size {hidden}: not supported"
        )
    for name, parts in family.gguf.biases.items():
        settings[name] = any(tensor.endswith(tuple(f".{part}.bias" for part in parts)) for tensor in tensors)
    settings |= _special(values.metadata)
    rope = _rope(values, tensors, size, settings)
    settings["rope_parameters"] = rope
    if family.gguf.windows == "one":
        settings["sliding_window"] = int(values.number("attention.sliding_window", 0)) or None
    if family.gguf.windows == "blocks":
        settings |= _windows(values, settings, rope)
    if family.gguf.original_context:
        original = values.count("rope.scaling.original_context_length", settings["max_position_embeddings"])
        settings["original_max_position_embeddings"] = original
    if family.gguf.query_scale:
        settings["query_pre_attn_scalar"] = own_query_scalar(hidden, heads, size, settings["num_hidden_layers"])
    if family.softcap:
        settings["final_logit_softcapping"] = _decimal(values.number("final_logit_softcapping", 0.0)) or None
    return CONFIG_MAPPING[family.model_type](**settings)


def _decimal(number: float) -> float:
    """The shortest decimal that is the same in 32 bits: 1e-05, where the file has 9.999999747378752e-06."""
    return float(str(np.float32(number)))


def _special(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ends = end_ids(metadata)
    return {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _rope(values: Values, tensors: Mapping[str, TensorPlace], size: int, settings: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters of a model with these settings."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _decimal(values.number("rope.freq_base", 10000.0))}
    turned = values.count("rope.dimension_count", size)
    if turned != size:
        if not values.family.partial_rotary:
            raise UserError(
                f"{values.file}: {turned} of a head's {size} dimensions are rotated, which is not supported"
            )
        rope["partial_rotary_factor"] = turned / size
    scaling = str(values.metadata.get(f"{values.architecture}.rope.scaling.type", "none"))
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
    trained = settings["max_position_embeddings"]
    original = values.count("rope.scaling.original_context_length", trained)
    attention = values.number("rope.scaling.attn_factor", 1.0)
    if FACTORS in tensors and not np.all(read_tensor(tensors[FACTORS]) == 1):
        parameters = llama3_parameters(read_tensor(tensors[FACTORS]), rope["rope_theta"], size)
        if parameters is None or scaling not in ("none", "linear") or factor not in (0.0, 1.0):
            raise UserError(
                f"{values.file}: its rotary factors ({FACTORS}) do not follow Llama 3's rule, the only one supported; "
                "use the original checkpoint"
            )
        return rope | parameters
    if LONG_FACTORS in tensors or SHORT_FACTORS in tensors or scaling == "longrope":
        return rope | _longrope(values, tensors, original, attention, settings)
    if scaling in ("none", "linear") and factor in (0.0, 1.0):
        _attention_is_plain(values, attention)
        return rope
    if scaling in ("linear", "none"):  # llama.cpp scales linearly where no kind is named
        _attention_is_plain(values, attention)
        return rope | {"rope_type": "linear", "factor": _decimal(factor)}
    if scaling == "yarn":
        _attention_is_plain(values, attention)
        return rope | {"rope_type": "yarn", "factor": _decimal(factor), "original_max_position_embeddings": original}
    raise UserError(f"{values.file}: rope scaling {scaling!r} is not supported; use the original checkpoint")


def _attention_is_plain(values: Values, factor: float) -> None:
    if factor != 1.0:
        raise UserError(f"{values.file}: {values.architecture}.rope.scaling.attn_factor {factor} is not supported")


def _longrope(
    values: Values, tensors: Mapping[str, TensorPlace], original: int, attention: float, settings: dict[str, Any]
) -> dict[str, Any]:
    missing = next((name for name in (LONG_FACTORS, SHORT_FACTORS) if name not in tensors), None)
    if missing:
        raise UserError(f"{values.file} has no {missing}, which its rope scaling (longrope) needs")
    rope = {
        "rope_type": "longrope",
        "long_factor": [_decimal(number) for number in read_tensor(tensors[LONG_FACTORS])],
        "short_factor": [_decimal(number) for number in read_tensor(tensors[SHORT_FACTORS])],
        "original_max_position_embeddings": original,
    }
    scale = settings["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    if not math.isclose(usual, attention, rel_tol=1e-5):
        rope["attention_factor"] = _decimal(attention)
    return rope


def _windows(values: Values, settings: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Which blocks slide their window, and the rotary positions of each kind (Gemma-3)."""
    blocks = settings["num_hidden_layers"]
    window = int(values.number("attention.sliding_window", 0))
    key = f"{values.architecture}.attention.sliding_window_pattern"
    pattern = values.metadata.get(key, 6)
    if isinstance(pattern, list):
        if len(pattern) != blocks:
            raise UserError(f"{values.file}: {key} has {len(pattern)} entries for {blocks} blocks")
        slides = [bool(each) for each in pattern]
    else:
        slides = [bool(pattern) and (block + 1) % int(pattern) != 0 for block in range(blocks)]
    if not window:
        slides = [False] * blocks
    local = _decimal(values.number("rope.freq_base_swa", 10000.0 if window else rope["rope_theta"]))
    return {
        "layer_types": ["sliding_attention" if each else "full_attention" for each in slides],
        "sliding_window": window or settings["max_position_embeddings"],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _check_keys(values: Values) -> None:
    """Refuse the first key that has a meaning and was not used."""
    prefix = f"{values.architecture}."
    known = READ | READ_OF_WINDOWS[values.family.gguf.windows]
    known |= {"final_logit_softcapping"} if values.family.softcap else set()
    for key, value in values.metadata.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            if name in known or (name in NEUTRAL and NEUTRAL[name](value)):
                continue
        elif not key.startswith(MEANING) or key in TOKENIZER_KEYS or key.startswith("tokenizer.chat_template"):
            continue
        shown = f"{len(value)} entries" if isinstance(value, list) else repr(value)
        raise UserError(
            f"{values.file}: {key} ({shown[:60]}) cannot be expressed in a {values.family.model_type} checkpoint, and "
            "dropping it would change the model; use the original checkpoint"
        )


def _places(
    config: ModelConfig, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorPlace], file: Path
) -> dict[str, tuple[str, TensorPlace] | None]:
    """transformers' name → llama.cpp's and where the tensor lies; None for a missing bias, which is zero."""
    family = family_of(config)
    names = tensor_names(family, config.num_hidden_layers, list(wanted))
    places: dict[str, tuple[str, TensorPlace] | None] = {}
    for name, theirs in names.items():
        if theirs is not None and theirs in tensors:
            places[name] = theirs, tensors[theirs]
        elif family.gguf.biases and name.endswith(".bias"):
            places[name] = None  # transformers knows biases of all projections or of none
        else:
            raise UserError(f"{file} lacks {theirs or name}, so the model is incomplete")
    used = {place[0] for place in places.values() if place is not None} | {FACTORS, LONG_FACTORS, SHORT_FACTORS}
    surplus = next((name for name in tensors if name not in used), None)
    if surplus is not None:
        raise UserError(
            f"{file} holds {surplus}, which cannot be expressed in a {config.model_type} checkpoint, and dropping it "
            "would change the model; use the original checkpoint"
        )
    for place in places.values():
        if place is not None and place[1].file.stat().st_size < place[1].offset + _bytes(place[1], file):
            raise UserError(f"{place[1].file} is truncated within tensor {place[0]}; copy or download it again")
    return places


def _bytes(place: TensorPlace, file: Path) -> int:
    try:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(place.kind)]
    except (ValueError, KeyError) as error:
        raise UserError(f"{file}: a tensor has ggml type {place.kind}, which is not supported") from error
    return place.size // block * size


def read_tensor(place: TensorPlace) -> np.ndarray:
    """A tensor in float32."""
    ggml_type = gguf.GGMLQuantizationType(place.kind)
    data = np.memmap(place.file, np.uint8, "r", place.offset, (_bytes(place, place.file),))
    rows = math.prod(place.shape[:-1])
    try:
        values = gguf.dequantize(np.asarray(data).reshape(rows, -1), ggml_type)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{place.file}: weights of type {ggml_type.name} are not supported: {error}") from error
    return np.ascontiguousarray(values, np.float32).reshape(place.shape)


def _weight(
    name: str, shape: tuple[int, ...], places: Mapping[str, tuple[str, TensorPlace] | None], config: ModelConfig
) -> np.ndarray:
    """One of transformers' weights, float32."""
    source = places[name]
    if source is None:
        return np.zeros(shape, np.float32)
    theirs, place = source
    if place.shape != shape:
        raise UserError(f"{place.file}: {theirs} has shape {list(place.shape)}, but the metadata ask for {list(shape)}")
    values = read_tensor(place)
    if not np.isfinite(values).all():
        raise UserError(f"{place.file}: {theirs} contains NaN or infinity")
    return from_gguf(theirs, values, config)


def _write_generation_config(metadata: Mapping[str, Any], folder: Path) -> None:
    values = {name: number for name, number in _special(metadata).items() if number is not None}
    write_json(folder / "generation_config.json", values)

"""Checks that checkpoints can be merged, from their headers and files, before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from ..core.errors import UserError
from ..core.files import read_json
from ..modeling.blocks import kept_blocks
from ..modeling.load import load_config
from ..modeling.weights import TensorHeader, tensor_headers

# Configuration values that do not affect how weights are interpreted.
NEUTRAL = (
    "_name_or_path architectures transformers_version dtype torch_dtype use_cache return_dict output_attentions "
    "output_hidden_states initializer_range attention_dropout bos_token_id eos_token_id pad_token_id "
    "max_position_embeddings chunk_size_feed_forward id2label label2id problem_type is_encoder_decoder"
).split()


def check_alike(folders: Mapping[str, Path], *, any_dtype: bool) -> None:
    """Raise `UserError` naming the first difference between a checkpoint and the first one.

    Compares kept blocks, configuration, names, shapes and (unless `any_dtype`) dtypes of all tensors, and the
    tokenizers. Without `any_dtype` all tensors of the first checkpoint must also have one dtype.
    """
    names = list(folders)
    first = folders[names[0]]
    shapes = tensor_headers(first)
    dtypes = sorted({tensor.dtype for tensor in shapes.values()})
    if len(dtypes) > 1 and not any_dtype:
        raise UserError(
            f"{names[0]} has tensors of several types ({', '.join(dtypes)}); set merge.out_dtype to the type to save"
        )
    for name in names[1:]:
        folder = folders[name]
        differences = chain(
            _configurations(first, folder),
            _tensors(shapes, tensor_headers(folder), any_dtype),
            _tokenizers(first, folder),
        )
        difference = next(differences, None)
        if difference is not None:
            subject, reference, other = difference
            raise UserError(
                f"{names[0]} and {name} cannot be merged: {subject} is {reference} in {names[0]} and {other} in {name}"
            )


Difference = tuple[str, object, object]  # what differs, and its value in each checkpoint


def _configurations(one: Path, other: Path) -> Iterator[Difference]:
    a, b = load_config(one), load_config(other)
    if kept_blocks(a) != kept_blocks(b):
        yield "the list of kept blocks", kept_blocks(a), kept_blocks(b)
    values, others = a.to_dict(), b.to_dict()
    for key in sorted({*values, *others} - set(NEUTRAL)):
        if values.get(key) != others.get(key):
            yield f"{key} in config.json", _shown(values.get(key)), _shown(others.get(key))


def _tensors(one: dict[str, TensorHeader], other: dict[str, TensorHeader], any_dtype: bool) -> Iterator[Difference]:
    for name in sorted({*one, *other}):
        a, b = one.get(name), other.get(name)
        if a is None or b is None:
            yield f"the tensor {name}", "missing" if a is None else "present", "missing" if b is None else "present"
        elif a.shape != b.shape:
            yield f"the shape of {name}", list(a.shape), list(b.shape)
        elif a.dtype != b.dtype and not any_dtype:
            yield f"the type of {name} (set merge.out_dtype to convert all)", a.dtype, b.dtype


def _tokenizers(one: Path, other: Path) -> Iterator[Difference]:
    a, b = (folder / "tokenizer.json" for folder in (one, other))
    if a.exists() != b.exists():
        yield "tokenizer.json", "present" if a.exists() else "missing", "present" if b.exists() else "missing"
    if not (a.exists() and b.exists()):
        return
    if a.read_bytes() == b.read_bytes():
        return
    first, second = read_json(a), read_json(b)
    words, others = _vocabulary(first), _vocabulary(second)
    for token in sorted({*words, *others}, key=lambda token: words.get(token, others.get(token, 0))):
        if words.get(token) != others.get(token):
            yield f"the id of token {token!r}", words.get(token, "missing"), others.get(token, "missing")
    for key in sorted({*first, *second} - {"truncation", "padding", "version"}):
        if first.get(key) != second.get(key):
            yield f"{key!r} in tokenizer.json", _shown(first.get(key)), _shown(second.get(key))


def _vocabulary(tokenizer: dict[str, Any]) -> dict[str, int]:
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, list):  # unigram models: [token, score] in the order of the ids
        vocab = {entry[0]: number for number, entry in enumerate(vocab)}
    return dict(vocab) | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"

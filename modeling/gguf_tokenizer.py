"""Rebuilding tokenizer.json from a GGUF file's metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from ..core.errors import UserError
from .pretokenizers import ALIASES, IGNORE_MERGES, PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
SPACE = "▁"
KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")  # special tokens of Phi-3 that spaces may follow
# Keys that are read here, and keys that the supported tokenizers do not depend on.
_IDS = ("bos", "eos", "eot", "eom", "unknown", "padding", "seperator", "separator", "cls", "mask")
_INFILL = ("prefix", "suffix", "middle", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
TOKENIZER_KEYS = {
    "tokenizer.ggml.model",
    "tokenizer.ggml.pre",
    "tokenizer.ggml.tokens",
    "tokenizer.ggml.token_type",
    "tokenizer.ggml.scores",
    "tokenizer.ggml.merges",
    "tokenizer.ggml.add_bos_token",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.add_sep_token",
    "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.token_type_count",
    "tokenizer.ggml.remove_extra_whitespaces",  # of Unigram tokenizers
    "tokenizer.huggingface.json",  # the whole tokenizer once more, in files of other programs
    "tokenizer.chat_templates",
    *(f"tokenizer.ggml.{name}_token_id" for name in (*_IDS, *_INFILL)),
}


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text according to the file: end of text, of a turn, of a message."""
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(int(number) for number in ids if number is not None))


def build_tokenizer(metadata: Mapping[str, Any], vocab_size: int, file: Path) -> Any:
    """The tokenizer of a GGUF file, with its chat templates.

    Raises `UserError` for unsupported tokenizers and pre-tokenizers, and for damaged ones.
    """
    model = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or len(tokens) > vocab_size:
        raise UserError(f"{file} has no token list, or one longer than its {vocab_size} embeddings")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise UserError(f"{file} has {len(types)} token types for {len(tokens)} tokens")
    if model == "gpt2":
        parts = _byte_level(metadata, tokens, types, file)
    elif model == "llama":
        parts = _sentence_pieces(metadata, tokens, types, file)
    else:
        raise UserError(f"{file}: tokenizer model {model!r} is not supported; use the original checkpoint folder")
    special = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None and 0 <= number < len(tokens)
    }
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types, metadata),
    } | parts
    whole["post_processor"] = _ends(metadata, special, tokens, parts.get("post_processor"))
    try:
        backend = Tokenizer.from_str(json.dumps(whole))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{file}: its tokenizer cannot be built: {str(error)[:200]}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=_templates(metadata), clean_up_tokenization_spaces=False, **special
    )


def _added(tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    flags = {"single_word": False, "lstrip": False, "normalized": False}
    # llama.cpp decides by the model's name that spaces after these are not part of the text.
    strips = re.search(r"phi-?3", str(metadata.get("general.name", "")), re.IGNORECASE) is not None
    model = metadata.get("tokenizer.ggml.model")
    return [
        {
            "id": number,
            "content": token,
            "special": token_type == CONTROL,
            "rstrip": strips and token_type == CONTROL and token not in KEEP_SPACES,
            **flags,
        }
        for number, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if token_type in (CONTROL, USER_DEFINED) or (model == "llama" and token_type == UNKNOWN)
    ]


def _vocabulary(tokens: Sequence[str], types: Sequence[int]) -> dict[str, int]:
    """Token → id, without placeholder names."""
    return {
        token: number
        for number, (token, token_type) in enumerate(zip(tokens, types, strict=True))
        if not (token_type == UNUSED and token == f"[PAD{number}]")
    }


def _byte_level(metadata: Mapping[str, Any], tokens: list[str], types: list[int], file: Path) -> dict[str, Any]:
    name = str(metadata.get("tokenizer.ggml.pre", "default"))
    name = ALIASES.get(name, name)
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{file}: pre-tokenizer {name!r} is not supported (supported: {', '.join(sorted(PRE_TOKENIZERS))}); "
            "use the original checkpoint folder"
        )
    normalizer, pre_tokenizer = PRE_TOKENIZERS[name]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(pair, str) and " " in pair for pair in merges):
        raise UserError(f"{file} has no merges (tokenizer.ggml.merges), which its tokenizer needs")
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": name in IGNORE_MERGES,
        "vocab": _vocabulary(tokens, types),
        "merges": [pair.split(" ", 1) for pair in merges],
    }
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": model,
    }


def _sentence_pieces(metadata: Mapping[str, Any], tokens: list[str], types: list[int], file: Path) -> dict[str, Any]:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"{file} has no score for every token (tokenizer.ggml.scores), which its tokenizer needs")
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": tokens[unknown] if unknown is not None and 0 <= unknown < len(tokens) else None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": _vocabulary(tokens, types),
        "merges": _merges(tokens, types, scores),
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    first = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, replace]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[list[str]]:
    """All pairs of pieces that form a piece, best score first, which is SentencePiece's order of merging.

    Pieces that share the lowest score are never the result of a merge.
    """
    plain = [number for number, token_type in enumerate(types) if token_type in (NORMAL, UNUSED)]
    pieces = {tokens[number]: scores[number] for number in plain}
    least = min(pieces.values(), default=0.0)
    unreached = least if sum(score == least for score in pieces.values()) > 1 else None
    rank = {token: number for number, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, int, list[str]]] = []
    for token, score in pieces.items():
        if score == unreached:
            continue
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        pairs = [pair for pair in halves if pair[0] in pieces and pair[1] in pieces]
        pairs.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        merges += [(-score, rank[token], *map(rank.__getitem__, pair), list(pair)) for pair in pairs]  # type: ignore[misc]
    merges.sort(key=lambda entry: entry[:4])
    return [pair for *_, pair in merges]


def _ends(metadata: Mapping[str, Any], special: Mapping[str, str], tokens: Sequence[str], inner: object) -> Any:
    """The post-processor, which adds tokens before and after a text."""
    first = special.get("bos_token") if metadata.get("tokenizer.ggml.add_bos_token", _adds_bos(metadata)) else None
    last = special.get("eos_token") if metadata.get("tokenizer.ggml.add_eos_token", False) else None
    if first is None and last is None:
        return inner
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    for token, place in ((first, 0), (last, len(single) + 1)):
        if token is not None:
            single.insert(place, {"SpecialToken": {"id": token, "type_id": 0}})
    second = [{"Sequence": {"id": "B", "type_id": 1}} if "Sequence" in part else part for part in single]
    ids = {token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]} for token in (first, last) if token}
    ends = {"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": ids}
    return ends if inner is None else {"type": "Sequence", "processors": [inner, ends]}


def _adds_bos(metadata: Mapping[str, Any]) -> bool:
    """llama.cpp's default if the file does not say."""
    return metadata.get("tokenizer.ggml.model") == "llama"


def _templates(metadata: Mapping[str, Any]) -> Any:
    """The chat template, or several by name as transformers takes them; None where there is none."""
    named = {
        key.removeprefix("tokenizer.chat_template."): str(value)
        for key, value in metadata.items()
        if key.startswith("tokenizer.chat_template.")
    }
    default = metadata.get("tokenizer.chat_template")
    if not named:
        return default
    return {"default": str(default)} | named if default is not None else named

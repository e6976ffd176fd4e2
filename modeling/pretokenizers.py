"""Byte-level BPE pre-tokenizers, by their names in GGUF files.

A GGUF file stores only a name (`tokenizer.ggml.pre`); `tokenizer.json` stores the full definition. This table
translates both ways by structure, so it does not depend on the vocabulary.
"""

from __future__ import annotations

import json
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_DIGITS = {"type": "Digits", "individual_digits": True}

# Those in which a whole word of the vocabulary is a token regardless of the merges.
IGNORE_MERGES = ("llama-bpe", "tekken")
# Other llama.cpp names of the same pre-tokenizers.
ALIASES = {"default": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
# name -> (normalizer, pre_tokenizer), as in tokenizer.json
PRE_TOKENIZERS: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
    "gpt-2": (None, _byte_level(True)),
    "smollm": (None, {"type": "Sequence", "pretokenizers": [_DIGITS, _byte_level(True)]}),
    "llama-bpe": (None, _split(_LLAMA3)),
    "qwen2": ({"type": "NFC"}, _split(_QWEN2)),
    "tekken": (None, _split(_TEKKEN)),
}


def recognise(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The GGUF name of a tokenizer.json's normalizer and pre-tokenizer, or None if it is not in the table."""
    pair = (_plain(normalizer), _plain(pre_tokenizer))
    for name, (known_normalizer, known_pre) in PRE_TOKENIZERS.items():
        if pair == (_plain(known_normalizer), _plain(known_pre)):
            return name
    return None


def _plain(part: dict[str, Any] | None) -> str | None:
    """Canonical JSON of everything that affects the split; trimming of offsets does not."""
    if part is None:
        return None

    def keep(value: object) -> Any:
        if isinstance(value, dict):
            return {k: keep(v) for k, v in value.items() if k != "trim_offsets"}
        return [keep(v) for v in value] if isinstance(value, list) else value

    return json.dumps(keep(part), sort_keys=True)

"""Tokenizers as GGUF metadata: byte-level BPE ("gpt2") and SentencePiece-style BPE ("llama")."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from ..core.chat_templates import chat_templates
from ..core.errors import UserError
from ..core.files import read_json, read_json_if_there
from ..modeling.pretokenizers import PRE_TOKENIZERS, recognise
from .ends import further_ends

SPECIAL = ("bos", "eos", "unk", "pad")
UNREACHED = -1e4  # score of pieces that no merge makes


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The parsed tokenizer.json of a checkpoint folder; `UserError` if there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{folder} has no tokenizer.json, the only tokenizer format that GGUF export reads")
    return read_json(file)


def vocabulary_kind(tokenizer: dict[str, Any], where: Path) -> tuple[str, str]:
    """("gpt2", pre-tokenizer name) or ("llama", "default"); `UserError` for tokenizers llama.cpp cannot reproduce."""
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{where}: a {model.get('type')} tokenizer cannot be exported to GGUF (only BPE can)")
    if model.get("byte_fallback"):
        return "llama", "default"
    name = recognise(tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer"))
    if name is None:
        described = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
        raise UserError(
            f"{where}: llama.cpp selects pre-tokenizers by name, and this tokenizer's matches none of the supported "
            f"ones, {', '.join(sorted(PRE_TOKENIZERS))}: {described[:300]}"
        )
    return "gpt2", name


def write_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add all `tokenizer.*` metadata. Ids beyond the tokenizer's, up to `vocab_size`, become unused tokens."""
    tokenizer = read_tokenizer(folder)
    kind, pre = vocabulary_kind(tokenizer, folder)
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    added = {entry["id"]: entry for entry in tokenizer.get("added_tokens", [])}
    size = max([*vocabulary.values(), *added], default=-1) + 1
    if size > vocab_size:
        raise UserError(f"{folder}: the tokenizer has {size} tokens, but the model has only {vocab_size} embeddings")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, number in vocabulary.items():
        tokens[number], types[number] = token, TokenType.NORMAL
    if kind == "llama":
        _mark_bytes(tokens, types, tokenizer["model"].get("unk_token"))
    for number, entry in added.items():
        # Tokens such as Gemma's runs of spaces are matched in the text as it is written.
        tokens[number] = entry["content"] if entry["special"] else entry["content"].replace("▁", " ")
        types[number] = TokenType.CONTROL if entry["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    if kind == "llama":
        writer.add_token_scores(_scores(tokens, types, _merges(tokenizer)))
    writer.add_token_types(types)
    if kind == "gpt2":
        writer.add_token_merges([" ".join(_no_spaces(part) for part in pair) for pair in _merges(tokenizer)])
    else:
        writer.add_add_space_prefix(_adds_space(tokenizer))
    _write_special(writer, folder, tokenizer)


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in tokenizer["model"].get("merges") or [])
    return [(left, right) for left, right in pairs]


def _no_spaces(part: str) -> str:
    return part.replace(" ", "Ġ")  # a space separates the two halves


def _mark_bytes(tokens: list[str], types: list[TokenType], unknown: str | None) -> None:
    for number, token in enumerate(tokens):
        if types[number] == TokenType.NORMAL:
            if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                types[number] = TokenType.BYTE
            elif token == unknown:
                types[number] = TokenType.UNKNOWN


def _scores(tokens: list[str], types: list[TokenType], merges: list[tuple[str, str]]) -> list[float]:
    """SentencePiece merges the pair with the best-scored result first, so an earlier merge is a higher score."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    scores = []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.BYTE, TokenType.UNKNOWN):
            scores.append(0.0 if kind == TokenType.BYTE else -1000.0)
        else:
            scores.append(-float(rank[token]) if token in rank else UNREACHED - len(merges))
    return scores


def _adds_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a space is added before the text, as set in tokenizer.json's normalizer or pre-tokenizer."""
    for part in _parts(tokenizer.get("normalizer"), "normalizers"):
        if part.get("type") == "Prepend":
            return True
    for part in _parts(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if part.get("type") == "Metaspace":
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            return scheme != "never"
    return False


def _parts(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part.get("type") == "Sequence" else [part]


def _write_special(writer: GGUFWriter, folder: Path, tokenizer: dict[str, Any]) -> None:
    config = read_json_if_there(folder / "tokenizer_config.json")
    ids = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    ids = {**tokenizer["model"]["vocab"], **ids}
    model = read_json(folder / "config.json")
    found: dict[str, int] = {}
    for name in SPECIAL:
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = ids.get(token) if token is not None else model.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) else number
        if number is not None:
            found[name] = number
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id}
    add |= {"unk": writer.add_unk_token_id, "pad": writer.add_pad_token_id}
    for name, number in found.items():
        add[name](number)
    more = [writer.add_eot_token_id, writer.add_eom_token_id]
    for number in further_ends(folder, found.get("eos")):
        more.pop(0)(number)
    first, last = _template_ends(tokenizer)
    writer.add_add_bos_token(first is not None and ids.get(first) == found.get("bos"))
    writer.add_add_eos_token(last is not None and ids.get(last) == found.get("eos"))
    templates = chat_templates(folder)
    for name, text in templates.items():
        writer.add_string("tokenizer.chat_template" + ("" if name == "default" else f".{name}"), text)
    if len(templates) > 1:
        writer.add_array("tokenizer.chat_templates", [name for name in templates if name != "default"])


def _template_ends(tokenizer: dict[str, Any]) -> tuple[str | None, str | None]:
    """The special tokens that the post-processor adds before and after a text."""
    for part in _parts_of_post(tokenizer.get("post_processor")):
        if part.get("type") == "TemplateProcessing" and len(part.get("single", [])) > 1:
            single = part["single"]
            first = single[0].get("SpecialToken", {}).get("id")
            last = single[-1].get("SpecialToken", {}).get("id")
            return first, last
    return None, None


def _parts_of_post(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part["processors"] if part.get("type") == "Sequence" else [part]

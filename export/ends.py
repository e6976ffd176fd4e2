"""End-of-text tokens and chat templates: decided once per bundle, and written the same everywhere.

generation_config.json, the tokenizer's end-of-text token and llama.cpp, which recognises some tokens by their text, may
each name different tokens. A text that ends in one runtime must end in all, so the set is their union.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.chat_templates import chat_templates
from ..core.errors import UserError
from ..core.files import read_json, read_json_if_there, write_json
from ..core.gguf_header import read_metadata
from ..modeling.config import eos_ids

GENERATION = "generation_config.json"
# Tokens that end a text in llama.cpp whatever its file says (llama-vocab.cpp).
BY_TEXT = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~[".split()
)


def end_tokens(checkpoint: Path) -> list[int]:
    """The ids of all tokens that end a text, ascending; empty if the checkpoint names none."""
    vocabulary = read_vocabulary(checkpoint)
    found = set(eos_ids(checkpoint))
    token = read_json_if_there(checkpoint / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token in vocabulary:
        found.add(vocabulary[token])
    return sorted(found | set(known_by_text(vocabulary)))


def known_by_text(vocabulary: dict[str, int]) -> dict[int, str]:
    """Tokens that llama.cpp recognises as end of text by their text: id → text."""
    found = {number: token for token, number in vocabulary.items() if token in BY_TEXT}
    texts = set(found.values())
    # Where there are ends of their own for it, this one ends a message and no text.
    if {"<|return|>", "<|call|>"} <= texts or {"<|calls|>", "<|flush|>"} <= texts:
        found = {number: token for number, token in found.items() if token != "<|end|>"}
    if "<|tool_response>" in texts:
        found = {number: token for number, token in found.items() if token != "</s>"}
    return found


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Every token of a folder's tokenizer.json by its text."""
    whole = read_json(folder / "tokenizer.json")
    words = (whole.get("model") or {}).get("vocab") or {}
    if isinstance(words, list):  # Unigram: [token, score] in the order of the ids
        words = {entry[0]: number for number, entry in enumerate(words)}
    return {**words, **{entry["content"]: entry["id"] for entry in whole.get("added_tokens") or []}}


def further_ends(checkpoint: Path, eos: int | None) -> list[int]:
    """End tokens that a GGUF file must name besides `eos`, because llama.cpp does not recognise their text.

    Raises `UserError` for more than the two that it has keys for.
    """
    known = known_by_text(read_vocabulary(checkpoint))
    found = [number for number in end_tokens(checkpoint) if number != eos and number not in known]
    if len(found) > 2:
        raise UserError(
            f"{checkpoint}: {len(found) + 1} tokens end a text ({GENERATION} and tokenizer), but a GGUF file can name "
            f"only three; remove ids {found[2:]} from eos_token_id in {GENERATION}, or export only ONNX"
        )
    return found


def write_generation_config(checkpoint: Path, folder: Path) -> None:
    """Write generation_config.json with all end-of-text tokens."""
    values = read_json_if_there(checkpoint / GENERATION)
    ends = end_tokens(checkpoint)
    if ends:
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if values:
        write_json(folder / GENERATION, values)


def check_gguf_texts(file: Path, checkpoint: Path) -> None:
    """`UserError` unless a GGUF file's end-of-text tokens and chat template are the checkpoint's."""
    metadata = read_metadata(file)
    vocabulary = {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    named = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")} - {None}
    _same_ends(file, {*named, *known_by_text(vocabulary)}, checkpoint)
    _same_template(file, metadata.get("tokenizer.chat_template"), checkpoint)


def check_onnx_texts(folder: Path, checkpoint: Path) -> None:
    """`UserError` unless all of an ONNX folder's end-of-text tokens and its chat template are the checkpoint's."""
    for name, path in (("genai_config.json", ("model", "eos_token_id")), (GENERATION, ("eos_token_id",))):
        value: Any = read_json_if_there(folder / name)
        for key in path:
            value = (value or {}).get(key)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if value is not None or name != GENERATION:
            _same_ends(folder / name, set(listed), checkpoint)
    _same_template(folder, chat_templates(folder).get("default"), checkpoint)


def _same_ends(where: Path, found: set[Any], checkpoint: Path) -> None:
    wanted = set(end_tokens(checkpoint))
    if wanted and found != wanted:
        raise UserError(f"{where}: its end-of-text tokens are {sorted(found)}, the checkpoint's are {sorted(wanted)}")


def _same_template(where: Path, found: str | None, checkpoint: Path) -> None:
    if found != chat_templates(checkpoint).get("default"):
        raise UserError(f"{where}: its chat template differs from the checkpoint's")
